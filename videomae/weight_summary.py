"""What a weight file is, in lines to be read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from videomae.classifier import Classifier
from videomae.detector import Detector
from videomae.model import SIZES, VideoMAE
from videomae.weight_files import Stated, read
from videomae.weight_models import build, identify, parts_of
from videomae.weight_names import listing
from videomae.wording import counted


def describe(source: str | Path | Mapping[str, Any]) -> str:
    """What the file is, in lines: kind and size of the model, its clips, classes and sampling."""
    known = identify(read(source))
    # nothing is computed: only the sizes are wanted
    with torch.device("meta"):
        model = build(known)
    (kind, encoder), stated = parts_of(model), known.stated
    size, input = encoder.size, encoder.input
    depth = f", decoder of {len(model.decoder.blocks)} blocks" if isinstance(model, VideoMAE) else ""
    depth += f", {counted(model.head.out_features, 'class')}" if isinstance(model, Classifier | Detector) else ""
    name = next((name for name, row in SIZES.items() if (row.width, row.heads) == (size.width, size.heads)), "own size")
    frames = "1 frame" if input.frames == 1 else f"{input.frames} frames"
    clip = f"{frames} of {input.size[0]}x{input.size[1]} in cubes of {'x'.join(map(str, input.cube))}"
    assumed = "" if stated.frames and stated.image_size else " (not all of it is stated in the file)"
    lines = [f"{known.source}: {known.format} weights", f"  kind      {kind}{depth}"]
    lines += [f"  size      {name}: width {size.width}, {size.depth} blocks, {size.heads} heads"]
    lines += [f"  clip      {clip}{assumed}"]
    if stated.positions_of:
        lines += [f"  positions interpolated from {'x'.join(map(str, stated.positions_of))} cubes"]
    lines += [f"  classes   {listing(stated.classes) if stated.classes else 'not stated'}"]
    return "\n".join([*lines, f"  sampling  {_sampling_in(stated)}"])


def _sampling_in(stated: Stated) -> str:
    clip = stated.key_clip
    if clip is not None:
        rate = "every rate" if clip.rate is None else f"{clip.rate:g} frames a second"
        return f"around key frames, stride {clip.stride} at {rate}, short side {clip.short_side}"
    return f"{stated.sampling.kind}, stride {stated.sampling.stride}" if stated.sampling else "not stated"
