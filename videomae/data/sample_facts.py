"""A prepared sample's KEY.json, understood: where the bytes of every frame lie. Nothing that it claims is believed
before it fits the rest."""

import base64
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kernels.launch import check

BLOCK = 512  # bytes, of tar
_MEMBER = re.compile(r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)?")
_MOST = 1 << 40  # of any number in KEY.json
_PIXELS = 1 << 26  # of a frame, twice those of 8K: nobody makes room for what a damaged KEY.json claims
# what JSON raises that is none, or says something else than it should
NOT_SAID = (LookupError, TypeError, AttributeError, OverflowError, RecursionError)
ILL_FORMED = (ValueError, *NOT_SAID)


def padded(size: int) -> int:
    """Bytes that a member's data of this size take in a tar."""
    return -(-size // BLOCK) * BLOCK


class Stream(NamedTuple):
    """Where the stored frames of one phase lie: frame k of it at begins[k], sizes[k] bytes long."""

    phase: int
    member: str  # of H.264; JPEG files have their frames' numbers
    begins: np.ndarray  # int64 [n], from the end of KEY.json in a tar, from the file's start otherwise
    sizes: np.ndarray
    sums: np.ndarray  # CRC-32: a decoder takes one damaged bit in three for a picture
    extradata: bytes = b""


class Stored(NamedTuple):
    """A sample's KEY.json, understood."""

    home: str  # the tar, or KEY's path below files/
    base: int | None  # where KEY.json's padded data end in the tar; None for files
    num_frames: int
    shape: tuple[int, int]
    rate: float
    stride: int
    streams: tuple[Stream, ...]


def understood(facts: Mapping[str, Any], home: str, base: int | None) -> Stored:
    """Raises ValueError, KeyError or TypeError when facts contradict themselves."""
    num_frames, stride, phases = facts["frames"], facts["stride"], facts["phases"]
    shape, rate = (facts["height"], facts["width"]), facts["fps"]
    whole = all(type(number) is int and 0 <= number < _MOST for number in (num_frames, stride, *shape, *phases))
    check(whole and shape[0] * shape[1] <= _PIXELS, f"{num_frames} frames of {shape[0]}x{shape[1]}, stride {stride}")
    check(0 in phases and max(phases) < stride, f"phases {phases} of a stride of {stride}")
    check(type(rate) in (int, float) and 0 <= rate < _MOST, f"{rate} frames a second")
    counts = {phase: len(range(phase, num_frames, stride)) for phase in phases}
    streams: list[Stream] = []
    if facts["codec"] == "jpeg":
        sizes = _sizes(facts["sizes"])
        check(len(sizes) == sum(counts.values()), f"{len(sizes)} frames are listed, not {sum(counts.values())}")
        sums = _sums(facts["crc32"], len(sizes))
        begins = np.zeros(len(sizes), dtype=np.int64)
        if base is not None:
            begins[1:] = np.cumsum(-(-sizes // BLOCK) * BLOCK + BLOCK)[:-1]
            begins += _place(facts["offset"])
        for phase, count in counts.items():
            start = sum(len(stream.sizes) for stream in streams)
            part = slice(start, start + count)
            streams.append(Stream(phase, "", begins[part], sizes[part], sums[part]))
    else:
        for (phase, count), stream in zip(counts.items(), facts["streams"], strict=True):
            sizes = _sizes(stream["packets"])
            check(len(sizes) == count, f"{len(sizes)} packets are listed, not {count}")
            extradata = base64.b64decode(stream["extradata"], validate=True)
            check(len(extradata) > 0, "the decoder's setup is empty")
            first = _place(stream["first"]) + (_place(stream["offset"]) if base is not None else 0)
            begins, sums = first + np.cumsum(sizes) - sizes, _sums(stream["crc32"], count)
            # of files it is a part of their name
            check(_MEMBER.fullmatch(stream["member"]) is not None, f"a member cannot be called {stream['member']}")
            streams.append(Stream(phase, stream["member"], begins, sizes, sums, extradata))
    inside = all(((one.sizes > 0) & (one.sizes < _MOST) & (one.begins >= 0)).all() for one in streams)
    check(len(streams) > 0 and num_frames > 0 and inside, "it holds no frames")
    return Stored(home, base, num_frames, shape, rate, stride, tuple(streams))


def _sizes(values: Any) -> np.ndarray:
    check(isinstance(values, list) and all(type(value) is int for value in values), "sizes must be whole numbers")
    return np.array(values, dtype=np.int64)


def _place(value: Any) -> int:
    check(type(value) is int and 0 <= value < 2**62, f"a place must be a whole number; got {value!r}")
    return value


def _sums(text: str, count: int) -> np.ndarray:
    sums = np.frombuffer(bytes.fromhex(text), ">u4")
    check(len(sums) == count, f"{len(sums)} sums are listed, not {count}")
    return sums
