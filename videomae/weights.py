"""Weights in and out: official V1 and V2 files, Hugging Face's, image transformers', and our own.

    python -m videomae.weights IN                          # what it is
    python -m videomae.weights IN OUT --to hf|official

Parameter names are the official ones, so an official file needs no translation; `hugging_face.py` and
`image_weights.py` translate the others. Our own file is safetensors under official names, with everything that building
the model takes in its metadata (`metadata.py`).
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.launch import check
from videomae import hugging_face, image_weights, metadata
from videomae.classifier import Classifier
from videomae.command_line import Parser, run_main
from videomae.detector import Detector
from videomae.inputs import POSITIONS, Positions, adopt, choose_positions, set_normalization, set_positions
from videomae.model import Encoder, Input, VideoMAE
from videomae.weight_files import Stated, read, write_atomically
from videomae.weight_models import build, checked, identify, parts_of
from videomae.weight_names import NOT_ALWAYS, Known, bare, grouped, listing, match
from videomae.weight_summary import describe
from videomae.wording import counted

__all__ = [
    "Report",
    "describe",
    "load_weights",
    "model_from",
    "save_hugging_face",
    "save_official",
    "save_weights",
    "set_normalization",
]


@dataclass(frozen=True)
class Report:
    """What `load_weights` did.

    format: "official", "hugging face" or "videomae", for clips; "image (timm)" or "image (hugging face)".
    used, fresh: names in the model, fresh ones left as they were. ignored: official names of what the file held
    besides. messages: what else to know.
    """

    format: str
    source: str
    used: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format} weights, {counted(len(self.used), 'tensor')} used"]
        lines += [f"  ignored: {grouped(self.ignored)}"] if self.ignored else []
        lines += [f"  fresh: {grouped(self.fresh)}"] if self.fresh else []
        return "\n".join(lines + [f"  {message}" for message in self.messages])


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], *, positions: Positions = "fresh") -> Report:
    """Load a VideoMAE, Encoder, Classifier or Detector in place: everything that belongs to it, or nothing and a
    ValueError.

    source: a file, a folder (Hugging Face's, ours, DeepSpeed's), a Hugging Face hub id, or a dict of tensors, bare or
    under "model" or "module". A pre-training file gives an encoder its norm, and a classifier all but fc_norm and head;
    a fine-tuning file has no norm for an encoder, whose own stays. A head of another number of classes is left fresh,
    and so is a detector's with a classifier's file, or the other way round.
    The normalisation that the file states, if any, becomes the model's, but a detector takes only a detector's; so do
    its sampling, and its classes' names and ids where the model has none. An image transformer, as which a file of one
    frame counts where cubes have several, gives its blocks and its kernel, spread over the cube's frames.
    positions: what a model of another grid gets, "fresh" its own table, "interpolate" the table of the file's grid,
    resized; a file without frames and image size counts as 16 and 224.
    """
    check(positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}; got {positions!r}")
    return _load(checked(model), identify(read(source)), positions)


def model_from(source: str | Path | Mapping[str, Any]) -> tuple[VideoMAE | Encoder, Report]:
    """The model that the file is of, its sizes read from tensors, config and metadata, and the report of loading it.

    Sources and errors as `load_weights`. Frames and image size are 16 and 224 where the file does not say; an image
    transformer becomes an Encoder, its cubes of two frames.
    """
    known = identify(read(source))
    model = build(known)
    return model, _load(model, known, "fresh")


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write our own single file, atomically: official names, and in the metadata all that `model_from` needs."""
    _writer_of(model, _tensors_of(model))(path)


def copy_weights(model: nn.Module) -> Callable[[str | Path], None]:
    """The weights as they are now, in memory of the host; to be called with the path that `save_weights` would write
    to, whatever the model has become."""
    return _writer_of(model, {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()})


def _writer_of(model: nn.Module, tensors: dict[str, Tensor]) -> Callable[[str | Path], None]:
    kind, encoder = parts_of(model)
    depth = len(model.decoder.blocks) if isinstance(model, VideoMAE) else None
    own: dict[str, Any] = {}
    if isinstance(model, VideoMAE):
        own = {"normalized": model.normalized}
    elif isinstance(model, Detector):
        own = {"class_ids": _ids_of(model), "key_clip": model.key_clip, "aligned": model.aligned}
    stated = metadata.metadata_of(
        kind, encoder.size, encoder.input, decoder_depth=depth, classes=_classes_of(model), **own
    )
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return lambda path: write_atomically(Path(path), lambda file: save_file(tensors, file, stated))


def save_official(model: nn.Module, path: str | Path) -> None:
    """Write {"model": state dict} as the official code does; heads, frames and normalisation are not in such a file.

    ValueError where positions are interpolated: the official code would compute its own.
    """
    _check_positions(parts_of(model)[1].input)
    tensors = _tensors_of(model)
    write_atomically(Path(path), lambda file: torch.save({"model": tensors}, file))


def save_hugging_face(model: nn.Module, folder: str | Path) -> None:
    """Write a folder for transformers: model.safetensors and two configs.

    ValueError unless cubes are square, where positions are interpolated, as transformers would compute its own, and for
    a detector, which it does not have.
    """
    kind, encoder = parts_of(model)
    check(kind != "detector", "transformers has no VideoMAE that detects: --to official, save_official or save_weights")
    _check_positions(encoder.input)
    folder = Path(folder)
    check(not folder.is_file(), f"the Hugging Face format is a folder; {folder} is a file")
    config = hugging_face.config_of(
        encoder.size,
        encoder.input,
        kind,
        decoder_depth=len(model.decoder.blocks) if isinstance(model, VideoMAE) else 4,
        num_classes=model.head.out_features if isinstance(model, Classifier) else 0,
        final_norm=encoder.norm is not None,
        classes=_classes_of(model),
        normalized=model.normalized if isinstance(model, VideoMAE) else None,
    )
    tensors = {name: tensor.contiguous() for name, tensor in hugging_face.from_official(_tensors_of(model)).items()}
    objects = {"config.json": config, "preprocessor_config.json": hugging_face.preprocessor_of(encoder.input)}
    write_atomically(folder / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    for name, value in objects.items():
        write_atomically(folder / name, partial(_write_json, value))


def _write_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _check_positions(input: Input) -> None:
    check(
        input.positions_of is None,
        f"this model's positions are interpolated from those of {input.positions_of} cubes, which only our own format "
        "can say (save_weights)",
    )


def _classes_of(model: nn.Module) -> tuple[str, ...] | None:
    if not isinstance(model, Classifier | Detector) or model.classes is None:
        return None
    wanted = model.head.out_features
    check(len(model.classes) == wanted, f"classes must name all {wanted} classes; got {len(model.classes)} names")
    return tuple(model.classes)


def _ids_of(model: Detector) -> tuple[int, ...] | None:
    if model.class_ids is None:
        return None
    wanted, ids = model.head.out_features, tuple(model.class_ids)
    check(len(set(ids)) == len(ids) == wanted, f"class_ids must be {wanted} different ones; got {ids}")
    return ids


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _load(model: VideoMAE | Encoder, known: Known, positions: Positions) -> Report:
    messages = [*known.stated.notes, *_compare(model, known)]
    if _begins_with_images(model, known):
        messages += _on_images(model, known)
        known = _for_clips(model, known, positions)
    used, ignored, fresh = match(model, known)
    origin, said = choose_positions(model.input, known.stated, positions, known.source)
    messages += said + _remarks(model, known, used, ignored) + _take_over(model, known, used)
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in used.items():
            targets[name].copy_(tensor)
    set_positions(model, origin)
    return Report(known.format, known.source, tuple(used), (*known.dropped, *ignored), tuple(fresh), tuple(messages))


def _take_over(model: VideoMAE | Encoder, known: Known, used: Mapping[str, Tensor]) -> list[str]:
    """What the file says beside weights becomes the model's, where it is for a model of this kind; messages about
    it."""
    stated, input = known.stated, model.input
    if isinstance(model, Detector) and not known.is_detector:
        # that pre-training normalises in another way is how it is published (RECIPES H.3)
        is_other = stated.mean is not None and (stated.mean, stated.std) != (input.mean, input.std)
        kept = f"frames are normalised as the detector does, not as the file says: mean {input.mean}, std {input.std}"
        return [kept] if is_other else []
    messages = adopt(model, stated)
    if isinstance(model, VideoMAE) and model.normalized is None:
        model.normalized = stated.normalized
    if stated.mean is None and known.format not in ("official", "videomae"):
        unknown = "normalisation is not stated, there is no preprocessor_config.json"
        messages.append(f"{unknown}: mean stays {input.mean} and std {input.std}")
    if isinstance(model, Detector):
        if model.key_clip is None:
            model.key_clip = stated.key_clip
        elif stated.key_clip not in (None, model.key_clip):
            messages.append(f"the file's clips: {stated.key_clip}, the model's, which stay: {model.key_clip}")
    if isinstance(model, Classifier | Detector) and "head.weight" in used:
        messages += _name_classes(model, stated)
    return messages


def _remarks(model: nn.Module, known: Known, used: Mapping[str, Tensor], ignored: list[str]) -> list[str]:
    """Messages about names that nobody knows, norm and head that are not the file's, and other precisions."""
    unknown = [name for name in ignored if not bare(name).startswith(NOT_ALWAYS)]
    messages = [f"not known here: {listing(unknown)}"] if unknown else []
    if isinstance(model, Detector) and "norm.weight" not in used:
        messages.append("the final norm is fresh, in a new model weight 1 and bias 0: fine-tuned weights have none")
    if isinstance(model, Classifier | Detector) and "head.weight" in ignored:
        whose = "" if known.is_detector == isinstance(model, Detector) else "is of another kind, and "
        messages.append(f"the head is fresh: the file's {whose}has {len(known.tensors['head.weight'])} classes")
    targets = model.state_dict()
    casts = {(str(tensor.dtype), str(targets[name].dtype)) for name, tensor in used.items()}
    return messages + [f"{theirs} weights became {ours}" for theirs, ours in sorted(casts) if theirs != ours]


def _begins_with_images(model: VideoMAE | Encoder, known: Known) -> bool:
    """Whether weights of images are to begin a model of clips: an image model's, or one frame's, for longer cubes."""
    return known.is_image or known.stated.frames == 1 < model.input.cube[0]


def _for_clips(model: VideoMAE | Encoder, known: Known, positions: Positions) -> Known:
    """An image model's tensors with a kernel for this model's cubes; ValueError where it cannot take an image model."""
    what = f"{known.source} is an image model"
    check(
        not isinstance(model, VideoMAE), f"{what}, without a decoder for clips: load it into an Encoder or Classifier"
    )
    check(positions == "fresh", f"{what}, whose positions are not those of clips: positions must be 'fresh'")
    tensors = image_weights.inflated(known.tensors, model.input.cube, known.source)
    # what it says of time is not said of clips
    return replace(known, tensors=tensors, stated=replace(known.stated, frames=None, sampling=None))


def _on_images(model: VideoMAE | Encoder, known: Known) -> list[str]:
    """Messages about what becomes of an image model's kernel, head and positions."""
    head = ", its head not used" if known.is_image else ""
    return [
        f"an image model: its kernel is spread over {model.input.cube[0]} frames{head}",
        f"positions: the model's own, of {'x'.join(map(str, model.input.grid))} cubes",
    ]


def _name_classes(model: Classifier | Detector, stated: Stated) -> list[str]:
    """Take over the file's names and ids of its classes, unless the model has its own; messages about
    both."""
    messages, wanted = [], model.head.out_features
    for attribute, what in (("classes", "names"), ("class_ids", "numbers")):
        theirs, ours = getattr(stated, attribute), getattr(model, attribute, None)
        if theirs is None or not hasattr(model, attribute):
            continue
        if len(theirs) != wanted:
            messages.append(f"the file {what} {len(theirs)} classes, not the head's {wanted}: they are not used")
        elif ours is None:
            setattr(model, attribute, theirs)
        elif tuple(ours) != theirs:
            messages.append(f"the file's classes have other {what} or another order; the model keeps its own")
    return messages


def _compare(model: VideoMAE | Encoder, known: Known) -> list[str]:
    """Messages about harmless differences between model and source; ValueError where they compute different things."""
    size, input, stated = parts_of(model)[1].size, model.input, known.stated
    pairs: list[tuple[str, Any, Any]] = [
        ("width", stated.width, size.width),
        ("depth", stated.depth, size.depth),
        ("heads", stated.heads, size.heads),
    ]
    if not _begins_with_images(model, known):
        pairs.append(("cube", stated.cube, input.cube))
    if isinstance(model, Detector):
        pairs.append(("aligned", stated.aligned, model.aligned))
    # a classifier's config and size name a decoder that it does not have
    if isinstance(model, VideoMAE) and "mask_token" in known.tensors:
        pairs.append(("decoder width", stated.decoder_width, size.decoder_width))
        pairs.append(("decoder heads", stated.decoder_heads, size.decoder_heads))
    wrong = [f"{name} {theirs}, the model {ours}" for name, theirs, ours in pairs if theirs not in (None, ours)]
    check(not wrong, f"{known.source} is of another model: it has {'; '.join(wrong)}")
    geometry = [("frames", stated.frames, input.frames), ("image size", stated.image_size, input.size)]
    return [
        f"the file's {name}: {theirs}, the model's: {ours}"
        for name, theirs, ours in geometry
        if theirs not in (None, ours)
    ]


def _newest_of(source: str) -> str:
    """Of a run folder its newest checkpoint, anything else as it is."""
    steps = [path for path in Path(source).glob("checkpoints/step_*") if path.name[5:].isdigit()]
    return str(max(steps, key=lambda path: int(path.name[5:]), default=source))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 and one line on stderr when the input is bad."""
    parser = Parser(
        "videomae.weights",
        "Convert weights, or say what they are.",
        example="python -m videomae.weights runs/pretrain-mine exported --to hf",
    )
    parser.add_argument("source", metavar="IN", help="a file, a folder, also of a run, or a Hugging Face hub id")
    parser.add_argument("target", metavar="OUT", nargs="?", help="for hf a folder, for official a .pth file")
    parser.add_argument("--to", choices=("hf", "official"), help="the format of OUT; without both, IN is described")
    options = parser.parse_args(arguments)
    if (options.target is None) != (options.to is None):
        parser.error("OUT and --to go together")
    try:
        source = _newest_of(options.source)
        if options.to is None:
            print(describe(source))
            return 0
        model, report = model_from(source)
        save = save_hugging_face if options.to == "hf" else save_official
        save(model, options.target)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"videomae.weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{report}\nwritten: {options.target}")
    return 0


if __name__ == "__main__":
    run_main(main)
