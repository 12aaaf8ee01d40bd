"""Which tensors of a source belong to a model, by name and shape, and which of either have no counterpart."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from kernels.launch import check
from videomae.classifier import Classifier
from videomae.detector import Detector
from videomae.model import Encoder, VideoMAE
from videomae.weight_files import Stated

_DECODER = ("decoder.", "mask_token", "encoder_to_decoder.")
_HEAD = ("fc_norm.", "head.")
_OF_CONTRAST = ("projector.", "predictor.")
NOT_ALWAYS = (*_DECODER, *_HEAD, *_OF_CONTRAST, "norm.")  # what one kind of model has and another has not
# names that no file should hold beside what the model takes: ignoring them would change what is computed
_TRANSFORMER = re.compile(r"(decoder\.)?(blocks\.\d+|patch_embed|pos_embed)(\.|$)|videomae\.|embeddings\.|encoder\.")


@dataclass(frozen=True)
class Known:
    """A source that has been understood: its tensors under official names, what it says of its model, and the names of
    an image model's tensors that have no place here."""

    format: str
    source: str
    tensors: dict[str, Tensor]
    stated: Stated
    dropped: tuple[str, ...] = ()

    @property
    def is_image(self) -> bool:
        return self.format.startswith("image")

    @property
    def is_detector(self) -> bool:
        """Whether the head is a detector's: of official files, the one that follows a final norm."""
        if self.format != "official":
            return self.stated.kind == "detector"
        names = {bare(name) for name in self.tensors}
        return {"norm.weight", "head.weight"} <= names and not any(name.startswith("fc_norm.") for name in names)


def match(model: VideoMAE | Encoder, known: Known) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors by the model's names, ignored names, fresh names; ValueError for what is missing or does not fit."""
    targets, tensors = model.state_dict(), known.tensors
    wanted = {bare(name): name for name in targets}
    found = {bare(name): name for name in tensors}
    check(len(found) == len(tensors), f"{known.source} holds an encoder's weights twice, with and without its prefix")
    _check_depths(wanted, found, known.source)
    optional = _optional(model, known)
    used: dict[str, Tensor] = {}
    ignored: list[str] = []
    fresh: list[str] = []
    faults: list[str] = []
    for short, name in wanted.items():
        if short.startswith(optional):
            fresh.append(name)
        elif short not in found:
            faults.append(f"{name} is missing")
        elif (shape := tensors[found[short]].shape) != targets[name].shape:
            faults.append(f"{name} must be {tuple(targets[name].shape)}, not {tuple(shape)}")
        else:
            used[name] = tensors[found[short]]
    for short, name in found.items():
        if short in wanted and not short.startswith(optional):
            continue
        is_strict = isinstance(model, VideoMAE) or _TRANSFORMER.match(short)
        if is_strict and not (short.startswith(NOT_ALWAYS) and isinstance(model, Encoder)):
            faults.append(f"{name} is not in the model")
        else:
            ignored.append(name)
    hint = " (it is no pre-training file)" if isinstance(model, VideoMAE) and "mask_token" not in found else ""
    check(not faults, f"{known.source}{hint} does not fit the {type(model).__name__}: {listing(faults)}")
    return used, ignored, fresh


def _optional(model: VideoMAE | Encoder, known: Known) -> tuple[str, ...]:
    """Beginnings of the names that this model, given these tensors, keeps fresh."""
    tensors = known.tensors
    has_head = any(name.startswith(_HEAD) for name in tensors)
    if isinstance(model, Classifier | Detector):
        head = tensors.get("head.weight")
        other_classes = head is not None and head.ndim == 2 and len(head) != model.head.out_features
    if isinstance(model, Classifier):
        return _HEAD if known.is_detector or not has_head else ("head.",) if other_classes else ()
    is_finetuned = has_head or any(name.startswith(_HEAD) for name in known.dropped)
    has_norm = any(bare(name).startswith("norm.") for name in tensors)
    norm = ("norm.",) if isinstance(model, Encoder) and is_finetuned and not has_norm else ()
    if isinstance(model, Detector):
        return norm if known.is_detector and not other_classes else (*norm, "head.")
    return norm


def _check_depths(wanted: Iterable[str], found: Iterable[str], source: str) -> None:
    ours, theirs = depth_of(wanted, "blocks"), depth_of(found, "blocks")
    check(theirs in (0, ours), f"{source} has {theirs} encoder blocks, the model {ours}")
    ours, theirs = depth_of(wanted, "decoder.blocks"), depth_of(found, "decoder.blocks")
    advice = f"build it with decoder_depth={theirs}"
    check(0 in (ours, theirs) or ours == theirs, f"{source} has {theirs} decoder blocks, the model {ours}: {advice}")


def depth_of(names: Iterable[str], prefix: str) -> int:
    """One more than the highest number of a block under prefix."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def bare(name: str) -> str:
    """The name as fine-tuning files have it, without the encoder's prefix."""
    return name.removeprefix("encoder.")


def listing(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def grouped(names: Iterable[str], most: int = 8) -> str:
    """Names of tensors; of more than so many the modules that hold them: `decoder.* (45), norm.weight`."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return listing([f"{group}.* ({len(held)})" if len(held) > 1 else held[0] for group, held in groups.items()], most)
