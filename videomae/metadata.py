"""Our own weight files: safetensors under official names, with everything that building the model takes in the
metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kernels.launch import check
from videomae.data.sampling import KeyFrameClip, Sampling
from videomae.model import Input, Size
from videomae.weight_files import Stated

FORMAT = "videomae"
VERSION = "1"


def is_ours(metadata: Mapping[str, str]) -> bool:
    return metadata.get("format") == FORMAT


def metadata_of(
    kind: str,
    size: Size,
    input: Input,
    *,
    decoder_depth: int | None,
    classes: tuple[str, ...] | None,
    class_ids: tuple[int, ...] | None = None,
    key_clip: KeyFrameClip | None = None,
    aligned: bool | None = None,
    normalized: bool | None = None,
) -> dict[str, str]:
    """What a file's header says; kind: "pretrain", "classifier", "detector" or "encoder". Nothing is said of what is
    None."""
    stated: dict[str, Any] = {
        "size": asdict(size),
        "frames": input.frames,
        "image_size": input.size,
        "cube": input.cube,
        "mean": input.mean,
        "std": input.std,
        "decoder_depth": decoder_depth,
        "classes": classes,
        "class_ids": class_ids,
        "key_clip": key_clip and asdict(key_clip),
        "aligned": aligned,
        "normalized": normalized,
        "sampling": input.sampling and {"kind": input.sampling.kind, "stride": input.sampling.stride},
        "positions": input.positions_of and {"from": input.positions_of},
    }
    written = {name: json.dumps(value) for name, value in stated.items() if value is not None}
    return {"format": FORMAT, "version": VERSION, "kind": kind, **written}


def stated_in(metadata: Mapping[str, str], source: str) -> Stated:
    """The inverse of `metadata_of`; ValueError for another version, and for what is missing or ill-formed."""
    version = metadata.get("version")
    check(version == VERSION, f"{source} is of format version {version}; this code reads version {VERSION}")
    try:
        size = Size(**json.loads(metadata["size"]))
        height, width = json.loads(metadata["image_size"])
        # these three are missing where they are not known, and in files from before they were written
        sampling, positions, classes = (
            json.loads(metadata.get(x, "null")) for x in ("sampling", "positions", "classes")
        )
        return Stated(
            kind=metadata.get("kind"),
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            decoder_width=size.decoder_width,
            decoder_heads=size.decoder_heads,
            frames=json.loads(metadata["frames"]),
            image_size=(height, width),
            cube=_three(json.loads(metadata["cube"])),
            mean=tuple(json.loads(metadata["mean"])),
            std=tuple(json.loads(metadata["std"])),
            sampling=None if sampling is None else Sampling(**sampling),
            positions_of=None if positions is None else _three(positions["from"]),
            classes=None if classes is None else tuple(map(str, classes)),
            normalized=_flag(metadata, "normalized"),
            **_detectors(metadata),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{source} has metadata that is missing or ill-formed: {error!r}") from error


def _detectors(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is stated of detectors alone, where it is known."""
    ids, clip = (json.loads(metadata.get(x, "null")) for x in ("class_ids", "key_clip"))
    return {
        "class_ids": None if ids is None else tuple(map(int, ids)),
        "key_clip": None if clip is None else KeyFrameClip(**clip),
        "aligned": _flag(metadata, "aligned"),
    }


def _flag(metadata: Mapping[str, str], name: str) -> bool | None:
    value = json.loads(metadata.get(name, "null"))
    check(value in (None, True, False), f"{name} must be true or false; got {value!r}")
    return value


def _three(values: Any) -> tuple[int, int, int]:
    slots, rows, columns = map(int, values)
    return slots, rows, columns
