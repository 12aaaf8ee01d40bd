"""Fuzzing's targets that are binary, or of several files: checkpoints, weights, prepared sets."""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from tests.fuzz import Target
from tests.fuzz_inputs import (
    NUMBERS,
    changed_bytes,
    changed_json,
    changed_lines,
    changed_text,
    changed_values,
    changed_zip,
    json_text,
    one_changed,
    values,
    words,
)
from tests.videomae.data.test_shards import make_set
from tests.videos import moving_frames, write_video
from train import checkpoint
from train.checkpoint import Checkpointing, Damaged
from train.moments import read_tensors
from videomae import weights
from videomae.data import shards
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.labelled import find_labelled
from videomae.data.prepare_sample import Encoding, Task
from videomae.data.prepare_set import Plan
from videomae.data.sample_facts import padded
from videomae.model import Encoder, Input, Size, VideoMAE

_SIZE, _INPUT = Size(width=8, depth=1, heads=2, decoder_width=8, decoder_heads=2), Input(2, 16)
_HUGE = (-1, 0, 7, 2**20, 2**31, 2**40, 2**62, 2**64)


class Harmful:
    """Does what nobody wants when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._call = call, arguments

    def __reduce__(self) -> Any:
        return self._call


def _deep(levels: int) -> bytes:
    """A pickle of lists inside each other."""
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _twice(levels: int) -> bytes:
    """A pickle's values that each hold the one before twice: the last one is on the stack."""
    steps = b"".join(b"h" + bytes([n, 104, n]) + b"\x86q" + bytes([n + 1]) for n in range(levels))
    return b"\x80\x02)q\x00" + steps


# what a pickle may hold that no checkpoint does
_PICKLES = (
    pickle.dumps(Harmful(os.system, "touch harm")),
    pickle.dumps(Harmful(eval, "open('harm', 'w')")),
    pickle.dumps(Harmful(getattr, 1, "real")),
    pickle.dumps(collections.OrderedDict(a=argparse.Namespace(x=1)), 2),
    pickle.dumps({"model": {"a": 1}}, 2),
    pickle.dumps([1, 2], 2),
    # torch searches its own message of an error, which quotes this, in a time that grows with its square
    b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.",
    b"\x80\x02" + _text("a" * 100_000) + b")R.",
    b"\x80\x02" + _text("a" * 100_000) + b")\x81.",
    _twice(60) + b")R.",
    _twice(60) + b"}h<K\x01s.",
    b"\x80\x02c_codecs\nencode\n" + _text("".join(map(chr, range(0x4E00, 0x9000)))) + _text("punycode") + b"\x86R.",
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
    b"\x80\x02cnumpy\ndtype\n" + _text("V2147483647") + b"\x85R.",
    _deep(10_000),
    _deep(100_000),
    b"\x80\x02" + b"(" * 50_000,
    b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",  # a frame of exabytes
    b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"a.",  # bytes of a terabyte
    b"\x80\x02\x8a\x04aaaa.",
    b"\x80\x02Nr" + (2**31 - 1).to_bytes(4, "little") + b".",  # a memo of as many places
    b"I" + b"9" * 5000 + b"\n.",
    b"",
)


class Checkpoints(Target):
    """Every file of a checkpoint, with the sums made right: only what was read, or Damaged."""

    name, share, refusals = "checkpoints", 7, (Damaged,)

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        (outside / "secret").write_bytes(b"x" * 4096)
        torch.manual_seed(0)
        state = {"config": {"a": [1, None]}, "videos": "0" * 16, "micro_batch": 4, "precision": "float32", "scaler": {}}
        moments = {f"{name}.exp_avg": torch.rand(shape) for name, shape in (("a", (2, 3)), ("b.c", (4,)), ("d", ()))}
        models = {"model.safetensors": Encoder(_SIZE, _INPUT)}
        taken = checkpoint.take(7, models, moments.items(), state | {"rng": torch.get_rng_state()})
        path = checkpoint.write(outside / "checkpoints", taken, Checkpointing())
        self._files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        self._index = pickle.loads(self._files["optimizer/.metadata"])

    def inputs(self) -> st.SearchStrategy[tuple[dict, bool]]:
        each = {name: changed_bytes(data) for name, data in self._files.items()}
        state = self._files["state.pt"]
        inner = changed_bytes(_member(state, "data.pkl"))
        each["state.pt"] = st.one_of(
            each["state.pt"],
            changed_zip(state, "data.pkl", inner),
            changed_zip(state, "data.pkl", st.sampled_from(_PICKLES)),
            st.builds(_saved, st.dictionaries(st.sampled_from((*checkpoint._KEYS, "x")), values, max_size=9)),
            st.sampled_from(_PICKLES),
        )
        index = each["optimizer/.metadata"]
        each["optimizer/.metadata"] = st.one_of(
            index, index, st.sampled_from(_PICKLES), st.builds(self._other_index, words, st.sampled_from(_HUGE))
        )
        each["files.json"] = changed_json(json.loads(self._files["files.json"]))
        return st.tuples(one_changed(each), st.integers(0, 9).map(bool))

    def _other_index(self, name: str, number: int) -> bytes:
        """An index that names other files, or claims other sizes."""
        data = pickle.dumps(self._index, 2)
        if number < 0:
            short = name.encode("utf-8", "surrogatepass")[:200]
            old = b"X\x0c\0\0\0__0_0.distcp"
            assert old in data
            return data.replace(old, b"X" + len(short).to_bytes(4, "little") + short)
        packed = pickle.dumps(number, 2)[2:-1]
        return data.replace(pickle.dumps(2, 2)[2:-1] + pickle.dumps(3, 2)[2:-1], packed + pickle.dumps(3, 2)[2:-1])

    def put(self, value: tuple[dict, bool]) -> None:
        changed, fixes = value
        self.write({f"step_7/{k}": v for k, v in self._files.items()}, {f"step_7/{k}": v for k, v in changed.items()})
        if fixes and "files.json" not in changed:
            path = self.root / "step_7"
            (path / "files.json").write_text(json.dumps(checkpoint._sums(path)))

    def parse(self, value: tuple[dict, bool]) -> None:
        path = self.root / "step_7"
        if not value[1]:  # the sums stand before it
            with contextlib.suppress(ValueError, OSError, RuntimeError):
                read_tensors(path / "optimizer")
        checkpoint.read_state(path)


def _write_asked(target: Target, files: dict[str, bytes], value: dict[str, bytes | None]) -> None:
    """Of several folders only those of which a file is changed: most of the time goes into writing."""
    asked = {name.split("/")[0] for name in value}
    target.write({name: data for name, data in files.items() if name.split("/")[0] in asked}, value)


def _member(data: bytes, name: str) -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(one) for one in archive.namelist() if one.endswith(name))


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _safetensors(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


class Weights(Target):
    """Files and folders of weights: described, and loaded into models."""

    name, share = "weights", 6

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        (outside / "secret").write_bytes(b"x" * 4096)
        torch.manual_seed(0)
        self._encoder, self._whole = Encoder(_SIZE, _INPUT), VideoMAE(_SIZE, _INPUT, decoder_depth=1)
        weights.save_weights(self._encoder, outside / "ours.safetensors")
        weights.save_official(self._whole, outside / "official.pth")
        weights.save_hugging_face(self._encoder, outside / "hf")
        tensors = load_file(outside / "ours.safetensors")
        image = {k: v[:, :, 0].contiguous() if v.ndim == 5 else v for k, v in tensors.items()}
        (outside / "image.safetensors").write_bytes(save(image))
        shard = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        self._files = {
            "ours.safetensors": (outside / "ours.safetensors").read_bytes(),
            "official.pth": (outside / "official.pth").read_bytes(),
            "image/model.safetensors": (outside / "image.safetensors").read_bytes(),
            "image/config.json": json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}).encode(),
            "sharded/model.safetensors.index.json": json.dumps(shard).encode(),
            "sharded/model-1.safetensors": (outside / "ours.safetensors").read_bytes(),
            **{f"hf/{path.name}": path.read_bytes() for path in (outside / "hf").iterdir()},
        }

    def inputs(self) -> st.SearchStrategy[dict]:
        each = {}
        for name, data in self._files.items():
            if name.endswith(".json"):
                each[name] = changed_json(json.loads(data))
            elif name.endswith(".safetensors"):
                each[name] = st.one_of(changed_bytes(data), self._changed_header(data), self._changed_header(data))
            else:
                pickled = st.one_of(changed_bytes(_member(data, "data.pkl")), st.sampled_from(_PICKLES))
                each[name] = st.one_of(changed_bytes(data), changed_zip(data, "data.pkl", pickled))
        return one_changed(each)

    def _changed_header(self, data: bytes) -> st.SearchStrategy[bytes]:
        """Shapes, offsets, names and metadata; where it names the metadata's values, JSON inside of JSON."""
        size = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
        out = st.one_of(changed_json(header), changed_text(json.dumps(header)), _renamed(header))
        if stated := header.get("__metadata__"):
            parsed = {k: json.loads(v) for k, v in stated.items() if k not in ("format", "kind")}
            out = st.one_of(
                out,
                *[
                    changed_values(parsed).map(
                        lambda new: json.dumps(
                            {**header, "__metadata__": {**stated, **{k: json_text(v) for k, v in dict(new).items()}}}
                            if isinstance(new, dict)
                            else header
                        ).encode()
                    )
                ]
                * 2,
            )
        return out.map(lambda new: _safetensors(new, rest))

    def put(self, value: dict) -> None:
        _write_asked(self, self._files, value)
        self._asked = sorted({name.split("/")[0] for name in value})

    def parse(self, value: dict) -> None:
        faults = []
        calls = (weights.describe, weights.model_from, self._into_whole, self._into_encoder)
        for name in self._asked:
            for call in calls:
                try:
                    call(self.root / name)
                except ValueError as error:
                    faults.append(error)
        # each is of another kind of model: not all calls can take it
        if len(faults) == len(calls) * len(self._asked):
            raise faults[0]

    def _into_whole(self, path: Path) -> None:
        weights.load_weights(VideoMAE(_SIZE, _INPUT, decoder_depth=1), path)

    def _into_encoder(self, path: Path) -> None:
        weights.load_weights(Encoder(_SIZE, _INPUT), path, positions="fresh" if "image" in str(path) else "interpolate")


@st.composite
def _renamed(draw, header: dict) -> bytes:
    """A header in which a tensor has another name: of a block far away, of a harmful kind, or twice."""
    name = draw(st.sampled_from(sorted(header)))
    number = draw(st.sampled_from((*NUMBERS, "3", "999999999")))
    new = draw(
        st.sampled_from((name.replace(".0.", f".{number}."), f"module.{name}", f"blocks.{number}.x", f"{name}.x"))
    )
    return json.dumps({(new if one == name else one): what for one, what in header.items()}).encode()


class Sets(Target):
    """The index of a prepared set, in shards and in files."""

    name, share = "shard index", 6
    codec = "jpeg"

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        (outside / "secret").write_bytes(b"x" * 4096)
        self._files = {}
        sources = {f"c {k}/v.{k}.mp4": write_video(outside / f"{k}.mp4", moving_frames(3, seed=k)) for k in range(2)}
        for layout, codec in (("shards", "jpeg"), ("files", "h264-fast")):
            made = make_set(outside / layout, sources, [1, 0], layout=layout, codec=codec)
            files = [path for path in made.rglob("*") if path.is_file()]
            self._files |= {f"{layout}/{path.relative_to(made)}": path.read_bytes() for path in files}
        settings = {"format": 1, "shards": 2, "settings": {}}
        self._files["begun/.work/settings.json"] = json.dumps(settings).encode()

    def inputs(self) -> st.SearchStrategy[dict]:
        each = {}
        for layout in ("shards", "files"):
            each[f"{layout}/dataset.json"] = changed_json(json.loads(self._files[f"{layout}/dataset.json"]))
            rows = [json.loads(line) for line in self._files[f"{layout}/index.jsonl"].splitlines()]
            each[f"{layout}/index.jsonl"] = changed_lines(rows)
        each["begun/.work/settings.json"] = changed_json(json.loads(self._files["begun/.work/settings.json"]))
        return one_changed(each)

    def put(self, value: dict) -> None:
        _write_asked(self, self._files, value)

    def parse(self, value: dict) -> None:
        faults = []
        for name in sorted({name.split("/")[0] for name in value}):
            try:
                plan = Plan(self.root / name, Encoding(), "shards", 2, (Task(0, "k", "p", "s", 1),))
                if plan.is_begun or plan.is_finished:
                    plan.check_same()
            except ValueError:
                pass  # it is of other videos
            try:
                found = shards.read_index(self.root / name)
                find_labelled(self.root / name)
                for path in found.paths[:1]:
                    Video(path).read([0])
            except (ValueError, UnreadableVideo) as error:
                faults.append(error)
        if faults:
            raise ValueError(str(faults[0])) from faults[0]


class Samples(Sets):
    """KEY.json in a shard and among files, and the shard around it: read, or unreadable, and nothing else."""

    name, share, refusals = "samples", 4, (UnreadableVideo,)

    def __init__(self, root: Path, outside: Path) -> None:
        super().__init__(root, outside)
        self._tar = self._files["shards/shard-00000.tar"]
        self._json = next(name for name in self._files if name.startswith("files/files/") and name.endswith(".json"))

    def inputs(self) -> st.SearchStrategy[dict]:
        return one_changed(
            {
                "shards/shard-00000.tar": st.one_of(
                    changed_bytes(self._tar), changed_values(self._first_json()).map(self._with_json)
                ),
                self._json: st.one_of(changed_json(json.loads(self._files[self._json])), self._escaping()),
            }
        )

    def _first_json(self) -> Any:
        info = tarfile.TarInfo.frombuf(self._tar[:512], "utf-8", "strict")
        return json.loads(self._tar[512 : 512 + info.size])

    def _with_json(self, document: Any) -> bytes:
        """The shard with another first KEY.json, its header made right."""
        text = json_text(document).encode("utf-8", "surrogatepass")
        info = tarfile.TarInfo.frombuf(self._tar[:512], "utf-8", "strict")
        rest = self._tar[512 + padded(info.size) :]
        info.size = len(text)
        return info.tobuf(tarfile.USTAR_FORMAT) + text.ljust(padded(len(text)), b"\0") + rest

    def _escaping(self) -> st.SearchStrategy[bytes]:
        """A member's name that leads out of the folder."""
        facts = json.loads(self._files[self._json])
        ways = (
            "x/../../../../../outside/secret",
            "x/../../../dataset.json",
            "x/../secret",
            str(self.outside / "secret"),
        )

        def led(way: str) -> bytes:
            streams = [{**stream, "member": way} for stream in facts["streams"]]
            return json.dumps({**facts, "streams": streams}).encode()

        return st.sampled_from(ways).map(led)

    def put(self, value: dict) -> None:
        super().put(value)
        (self.root / self._json.replace(".json", ".x")).mkdir(parents=True, exist_ok=True)
        shards._stored.cache_clear()

    def parse(self, value: dict) -> None:
        faults = []
        for layout in sorted({name.split("/")[0] for name in value}):
            for path in shards.read_index(self.root / layout).paths[:2]:
                try:
                    video = Video(path)
                    assert video.rate is not None
                    frames = video.read([0, len(video) - 1], allow_nearest=True)
                    assert frames.shape[0] == 2
                except UnreadableVideo as error:
                    faults.append(error)
        if faults:
            raise faults[0]


FILES: tuple[Callable[..., Target], ...] = (Checkpoints, Weights, Sets, Samples)
