"""Weights in and out: official V1 and V2 files, Hugging Face's, and our own.

    python -m videomae.weights IN OUT --to hf|official

Parameter names are the official ones, so an official file needs no translation; `hugging_face.py` translates the other.
Our own file is safetensors under official names, with everything that building the model takes in its metadata.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.launch import check
from videomae import hugging_face
from videomae.classifier import Classifier
from videomae.model import SIZES, Encoder, Input, Size, VideoMAE
from videomae.weight_files import Stated, Stored, read, write_atomically

VERSION = "1"  # of our own files
_OURS = "videomae"  # their metadata's format
_DECODER = ("decoder.", "mask_token", "encoder_to_decoder.")
_HEAD = ("fc_norm.", "head.")
_NOT_ALWAYS = (*_DECODER, *_HEAD, "norm.")  # what one kind of model has and another has not
# names that no file should hold beside what the model takes: ignoring them would change what is computed
_TRANSFORMER = re.compile(r"(decoder\.)?(blocks\.\d+|patch_embed|pos_embed)(\.|$)|videomae\.|embeddings\.|encoder\.")


@dataclass(frozen=True)
class _Known:
    """A source that has been understood: its tensors under official names, and what it says of its model."""

    format: str
    source: str
    tensors: dict[str, Tensor]
    stated: Stated


@dataclass(frozen=True)
class Report:
    """What `load_weights` did. format: "official", "hugging face" or "videomae". used, fresh: names in the model,
    fresh ones left as they were. ignored: official names of what the file held besides. messages: what else to know."""

    format: str
    source: str
    used: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format} weights, {len(self.used)} tensors used"]
        lines += [f"  ignored: {_listing(self.ignored)}"] if self.ignored else []
        lines += [f"  fresh: {_listing(self.fresh)}"] if self.fresh else []
        return "\n".join(lines + [f"  {message}" for message in self.messages])


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> Report:
    """Load a VideoMAE, Encoder or Classifier in place: everything that belongs to it, or nothing and a ValueError.

    source: a file, a folder (Hugging Face's, ours, DeepSpeed's), a Hugging Face hub id, or a dict of tensors, bare or
    under "model" or "module". A pre-training file gives an encoder its norm, and a classifier all but fc_norm and head;
    a fine-tuning file has no norm for an encoder, whose own stays. A head of another number of classes is left fresh.
    The normalisation that the file states, if any, becomes the model's.
    """
    return _load(_checked(model), _identify(read(source)))


def model_from(source: str | Path | Mapping[str, Any]) -> tuple[VideoMAE | Encoder | Classifier, Report]:
    """The model that the file is of, its sizes read from tensors, config and metadata, and the report of loading it.

    Sources and errors as `load_weights`. Frames and image size are 16 and 224 where the file does not say.
    """
    known = _identify(read(source))
    model = _build(known)
    return model, _load(model, known)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write our own single file, atomically: official names, and in the metadata all that `model_from` needs."""
    kind, encoder = _parts(model)
    input = encoder.input
    metadata = {"format": _OURS, "version": VERSION, "kind": kind}
    stated: dict[str, Any] = {"size": asdict(encoder.size), "frames": input.frames, "image_size": input.size}
    stated |= {"cube": input.cube, "mean": input.mean, "std": input.std}
    if isinstance(model, VideoMAE):
        stated["decoder_depth"] = len(model.decoder.blocks)
    metadata |= {name: json.dumps(value) for name, value in stated.items()}
    tensors = _tensors_of(model)
    write_atomically(Path(path), lambda file: save_file(tensors, file, metadata))


def save_official(model: nn.Module, path: str | Path) -> None:
    """Write {"model": state dict} as the official code does; heads, frames and normalisation are not in such a file."""
    _parts(model)
    tensors = _tensors_of(model)
    write_atomically(Path(path), lambda file: torch.save({"model": tensors}, file))


def save_hugging_face(model: nn.Module, folder: str | Path) -> None:
    """Write a folder for transformers: model.safetensors and two configs; ValueError unless cubes are square."""
    kind, encoder = _parts(model)
    folder = Path(folder)
    check(not folder.is_file(), f"the Hugging Face format is a folder; {folder} is a file")
    config = hugging_face.config_of(
        encoder.size,
        encoder.input,
        kind,
        decoder_depth=len(model.decoder.blocks) if isinstance(model, VideoMAE) else 4,
        num_classes=model.head.out_features if isinstance(model, Classifier) else 0,
        final_norm=encoder.norm is not None,
    )
    tensors = {name: tensor.contiguous() for name, tensor in hugging_face.from_official(_tensors_of(model)).items()}
    objects = {"config.json": config, "preprocessor_config.json": hugging_face.preprocessor_of(encoder.input)}
    write_atomically(folder / "model.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    for name, value in objects.items():
        write_atomically(folder / name, partial(_write_json, value))


def _write_json(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def set_normalization(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Make mean and std, on pixels scaled to [0, 1], those of the model and of the encoder in it."""
    for module in model.modules():
        if isinstance(module, VideoMAE | Encoder):
            channels = len(module.input.mean)
            check(
                len(mean) == len(std) == channels, f"mean and std must have {channels} channels; got {mean} and {std}"
            )
            module.input = replace(module.input, mean=mean, std=std)


def _checked(model: nn.Module) -> VideoMAE | Encoder:
    if not isinstance(model, VideoMAE | Encoder):
        raise ValueError(f"weights are those of a VideoMAE, Encoder or Classifier; got {type(model).__name__}")
    return model


def _parts(model: nn.Module) -> tuple[str, Encoder]:
    """The model's kind and its encoder."""
    model = _checked(model)
    if isinstance(model, VideoMAE):
        return "pretrain", model.encoder
    return ("classifier" if isinstance(model, Classifier) else "encoder"), model


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _identify(stored: Stored) -> _Known:
    if stored.metadata.get("format") == _OURS:
        return _Known("videomae", stored.source, stored.tensors, _stated_in(stored.metadata, stored.source))
    if hugging_face.is_hugging_face(list(stored.tensors)):
        stated = hugging_face.stated_in(stored.config, stored.preprocessor)
        return _Known("hugging face", stored.source, hugging_face.to_official(stored.tensors), stated)
    return _Known("official", stored.source, stored.tensors, Stated())


def _stated_in(metadata: Mapping[str, str], source: str) -> Stated:
    version = metadata.get("version")
    check(version == VERSION, f"{source} is of format version {version}; this code reads version {VERSION}")
    try:
        size = Size(**json.loads(metadata["size"]))
        height, width = json.loads(metadata["image_size"])
        slots, rows, columns = json.loads(metadata["cube"])
        return Stated(
            width=size.width,
            depth=size.depth,
            heads=size.heads,
            decoder_width=size.decoder_width,
            decoder_heads=size.decoder_heads,
            frames=json.loads(metadata["frames"]),
            image_size=(height, width),
            cube=(slots, rows, columns),
            mean=tuple(json.loads(metadata["mean"])),
            std=tuple(json.loads(metadata["std"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has metadata that is missing or ill-formed: {error!r}") from error


def _build(known: _Known) -> VideoMAE | Encoder | Classifier:
    """A model of the tensors' sizes, its weights still its own."""
    tensors, stated = {_short(name): tensor for name, tensor in known.tensors.items()}, known.stated
    projection = tensors.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 5:
        raise ValueError(f"{known.source} is no VideoMAE: it has no patch_embed.proj.weight of five axes")
    width, _, slots, rows, columns = projection.shape
    row = next((size for size in SIZES.values() if size.width == width), None)
    heads = stated.heads or (row.heads if row else 0)
    if not heads:
        raise ValueError(f"{known.source} has width {width}, which is no known size, and does not say how many heads")
    token = tensors.get("mask_token")
    decoder_width = stated.decoder_width or (row.decoder_width if row else width // 2)
    if token is not None:
        decoder_width = token.numel()
    # V2's huge has the decoder of V1's large
    usual = {size.decoder_width: size.decoder_heads for size in SIZES.values()}
    decoder_heads = stated.decoder_heads or usual.get(decoder_width) or max(decoder_width // 64, 1)
    size = Size(width, _depth(tensors, "blocks"), heads, decoder_width, decoder_heads)
    input = Input(stated.frames or 16, stated.image_size or 224, (slots, rows, columns))
    if token is not None:
        return VideoMAE(size, input, decoder_depth=_depth(tensors, "decoder.blocks"))
    if "head.weight" in tensors:
        return Classifier(size, input, num_classes=tensors["head.weight"].shape[:1].numel())
    return Encoder(size, input, final_norm="norm.weight" in tensors)


def _load(model: VideoMAE | Encoder, known: _Known) -> Report:
    stated = known.stated
    messages = [*stated.notes, *_compare(model, known)]
    used, ignored, fresh = _match(model, known)
    unknown = [name for name in ignored if not _short(name).startswith(_NOT_ALWAYS)]
    messages += [f"not known here: {_listing(unknown)}"] if unknown else []
    if "head.weight" in ignored and "head.weight" in fresh:
        messages.append(f"the head is fresh: the file's has {len(known.tensors['head.weight'])} classes")
    targets = model.state_dict()
    casts = {(str(tensor.dtype), str(targets[name].dtype)) for name, tensor in used.items()}
    messages += [f"{theirs} weights became {ours}" for theirs, ours in sorted(casts) if theirs != ours]
    if stated.mean is not None and stated.std is not None:
        set_normalization(model, stated.mean, stated.std)
        messages.append(f"frames are normalised with the file's mean {stated.mean} and std {stated.std}")
    elif known.format == "hugging face":
        messages.append(f"no preprocessor_config.json: mean stays {model.input.mean} and std {model.input.std}")
    with torch.no_grad():
        for name, tensor in used.items():
            targets[name].copy_(tensor)
    return Report(known.format, known.source, tuple(used), tuple(ignored), tuple(fresh), tuple(messages))


def _compare(model: VideoMAE | Encoder, known: _Known) -> list[str]:
    """Messages about harmless differences between model and source; ValueError where they compute different things."""
    size, input, stated = _parts(model)[1].size, model.input, known.stated
    pairs: list[tuple[str, Any, Any]] = [
        ("width", stated.width, size.width),
        ("depth", stated.depth, size.depth),
        ("heads", stated.heads, size.heads),
        ("cube", stated.cube, input.cube),
    ]
    # a classifier's config and size name a decoder that it does not have
    if isinstance(model, VideoMAE) and "mask_token" in known.tensors:
        pairs.append(("decoder width", stated.decoder_width, size.decoder_width))
        pairs.append(("decoder heads", stated.decoder_heads, size.decoder_heads))
    wrong = [f"{name} {theirs}, the model {ours}" for name, theirs, ours in pairs if theirs not in (None, ours)]
    check(not wrong, f"{known.source} is of another model: it has {'; '.join(wrong)}")
    geometry = [("frames", stated.frames, input.frames), ("image size", stated.image_size, input.size)]
    return [
        f"the file's {name}: {theirs}, the model's: {ours}, which has positions of its own"
        for name, theirs, ours in geometry
        if theirs not in (None, ours)
    ]


def _match(model: VideoMAE | Encoder, known: _Known) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors by the model's names, ignored names, fresh names; ValueError for what is missing or does not fit."""
    targets, tensors = model.state_dict(), known.tensors
    wanted = {_short(name): name for name in targets}
    found = {_short(name): name for name in tensors}
    check(len(found) == len(tensors), f"{known.source} holds an encoder's weights twice, with and without its prefix")
    _check_depths(wanted, found, known.source)
    optional = _optional(model, tensors)
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
        if is_strict and not (short.startswith(_NOT_ALWAYS) and isinstance(model, Encoder)):
            faults.append(f"{name} is not in the model")
        else:
            ignored.append(name)
    hint = " (it is no pre-training file)" if isinstance(model, VideoMAE) and "mask_token" not in found else ""
    check(not faults, f"{known.source}{hint} does not fit the {type(model).__name__}: {_listing(faults)}")
    return used, ignored, fresh


def _optional(model: VideoMAE | Encoder, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Beginnings of the names that this model, given these tensors, keeps fresh."""
    is_finetuned = any(name.startswith(_HEAD) for name in tensors)
    if isinstance(model, Classifier):
        head = tensors.get("head.weight")
        other_classes = head is not None and head.ndim == 2 and len(head) != model.head.out_features
        return ("head.",) if other_classes else () if is_finetuned else _HEAD
    has_norm = any(_short(name).startswith("norm.") for name in tensors)
    return ("norm.",) if isinstance(model, Encoder) and is_finetuned and not has_norm else ()


def _check_depths(wanted: Iterable[str], found: Iterable[str], source: str) -> None:
    ours, theirs = _depth(wanted, "blocks"), _depth(found, "blocks")
    check(theirs in (0, ours), f"{source} has {theirs} encoder blocks, the model {ours}")
    ours, theirs = _depth(wanted, "decoder.blocks"), _depth(found, "decoder.blocks")
    advice = f"build it with decoder_depth={theirs}"
    check(0 in (ours, theirs) or ours == theirs, f"{source} has {theirs} decoder blocks, the model {ours}: {advice}")


def _depth(names: Iterable[str], prefix: str) -> int:
    """One more than the highest number of a block under prefix."""
    numbers = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _short(name: str) -> str:
    """The name as fine-tuning files have it, without the encoder's prefix."""
    return name.removeprefix("encoder.")


def _listing(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 2 and one line on stderr when the input is bad."""
    parser = argparse.ArgumentParser("videomae.weights", description="Convert weights to another format.")
    parser.add_argument("source", metavar="IN", help="a file, a folder or a Hugging Face hub id")
    parser.add_argument("target", metavar="OUT", help="for hf a folder, for official a .pth file")
    parser.add_argument("--to", choices=("hf", "official"), required=True)
    options = parser.parse_args(arguments)
    try:
        model, report = model_from(options.source)
        save = save_hugging_face if options.to == "hf" else save_official
        save(model, options.target)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"videomae.weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{report}\nwritten: {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
