"""Hugging Face's names for the same weights: one table read in both directions, and the config files that go with them.

Source: RECIPES A.12, and transformers 5.23. Its attention has query, key and value in three tensors, ours in one qkv.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.launch import check
from videomae.blocks import NORM_EPS
from videomae.model import SIZES, Input, Size
from videomae.weight_files import Stated

# (ours, theirs), each the beginning of a dotted name; a name that no row fits is the same on both sides.
# Writing takes the first row that fits; the others are spellings that are only read.
_TOP = (
    ("patch_embed.proj", "videomae.embeddings.patch_embeddings.projection"),
    ("blocks", "videomae.encoder.layer"),
    ("norm", "videomae.layernorm"),
    ("decoder.blocks", "decoder.decoder_layers"),
    ("head", "classifier"),
    # a VideoMAEModel saved without a model around it
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("blocks", "encoder.layer"),
    ("norm", "layernorm"),
)
_IN_BLOCK = (
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.q.weight", "attention.attention.query.weight"),
    ("attn.k.weight", "attention.attention.key.weight"),
    ("attn.v.weight", "attention.attention.value.weight"),
    ("attn.q_bias", "attention.attention.query.bias"),
    ("attn.v_bias", "attention.attention.value.bias"),
    ("attn.k_bias", "attention.attention.key.bias"),
    ("attn.proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    # version 4, and so every file published before version 5
    ("attn.q_bias", "attention.attention.q_bias"),
    ("attn.v_bias", "attention.attention.v_bias"),
)
_BLOCK = re.compile(r"((?:blocks|decoder\.blocks)\.\d+)\.(.+)")
_THEIRS = ("videomae.", "embeddings.", "encoder.layer.")
_PRETRAINING = ("decoder.", "mask_token", "encoder_to_decoder.")


def is_hugging_face(names: Sequence[str]) -> bool:
    """Whether these are Hugging Face's names for a VideoMAE's weights."""
    return any(name.startswith(_THEIRS) for name in names)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors under the official names, as the official file of the same model has them.

    ValueError for a key bias that is not zero, a query without its key and value, or two spellings of one name.
    """
    reverse_top, reverse_block = [(b, a) for a, b in _TOP], [(b, a) for a, b in _IN_BLOCK]
    renamed: dict[str, Tensor] = {}
    for theirs, tensor in tensors.items():
        name = _rename(theirs, reverse_top)
        if block := _BLOCK.fullmatch(name):
            name = f"{block[1]}.{_rename(block[2], reverse_block)}"
        check(name not in renamed, f"{theirs} is in the file twice, under two spellings")
        renamed[name] = tensor
    # an official pre-training file keeps the encoder under its own prefix
    prefix = "encoder." if any(name.startswith(_PRETRAINING) for name in renamed) else ""
    official: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        attention, _, last = name.rpartition(".attn.")
        if last == "k_bias":
            check(not tensor.any(), f"{name} is not zero: this architecture has no bias on keys")
            continue
        if last in ("k.weight", "v.weight") and f"{attention}.attn.q.weight" in renamed:
            continue
        if last == "q.weight":
            name, tensor = f"{attention}.attn.qkv.weight", _join(renamed, attention)
        official[name if name.startswith(_PRETRAINING) else prefix + name] = tensor
    return official


def from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_official`, in the spelling of version 5, whose key projection has no bias."""
    theirs: dict[str, Tensor] = {}
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("encoder.")
        parts = [(name, tensor)]
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix("qkv.weight")
            parts = [(f"{stem}{letter}.weight", part) for letter, part in zip("qkv", tensor.chunk(3), strict=True)]
        for part_name, part in parts:
            if block := _BLOCK.fullmatch(part_name):
                part_name = f"{block[1]}.{_rename(block[2], _IN_BLOCK)}"
            theirs[_rename(part_name, _TOP)] = part
    return theirs


def _rename(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _join(renamed: Mapping[str, Tensor], attention: str) -> Tensor:
    names = [f"{attention}.attn.{letter}.weight" for letter in "qkv"]
    missing = [name for name in names if name not in renamed]
    check(not missing, f"{attention} has a query weight but no {' and '.join(missing)}")
    return torch.cat([renamed[name] for name in names])


def stated_in(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Stated:
    """What the two configs say; ValueError when they are ill-formed, or of another architecture."""
    if not config:
        return Stated()
    kind = config.get("model_type")
    check(kind == "videomae", f"config.json must be a VideoMAE's; its model_type is {kind!r}")
    try:
        read = {"hidden_act": "gelu", "qv_bias": True, **config}
        check(read["hidden_act"] == "gelu", f"config.json must have hidden_act 'gelu'; got {read['hidden_act']!r}")
        check(read["qv_bias"] is True, "config.json must have qv_bias true: this architecture has biases on q and v")
        classifies = "VideoMAEForVideoClassification" in (config.get("architectures") or ())
        check(
            not classifies or config.get("use_mean_pooling", True),
            "config.json has use_mean_pooling false: that classifier reads the first token, ours the mean of all",
        )
        rows, columns = pair_of(config.get("patch_size", 16))
        mean, std = normalization_in(preprocessor, config.get("num_channels", 3))
        width, heads = int(config.get("hidden_size", 768)), int(config.get("num_attention_heads", 12))
        # the published ViT-S configs say so; the official weights are of 6 (RECIPES A.12)
        is_wrong = (width, heads) == (SIZES["vit_small"].width, 16)
        note = f"config.json says {heads} heads, known to be wrong for ViT-S: the model's own are used"
        return Stated(
            width=width,
            depth=int(config.get("num_hidden_layers", 12)),
            heads=None if is_wrong else heads,
            decoder_width=int(config.get("decoder_hidden_size", 384)),
            decoder_heads=int(config.get("decoder_num_attention_heads", 6)),
            frames=int(config.get("num_frames", 16)),
            image_size=pair_of(config.get("image_size", 224)),
            cube=(int(config.get("tubelet_size", 2)), rows, columns),
            mean=mean,
            std=std,
            classes=_classes_in(config.get("id2label")),
            normalized=bool(config["norm_pix_loss"]) if "norm_pix_loss" in config else None,
            notes=(note,) if is_wrong else (),
        )
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json or preprocessor_config.json is ill-formed: {error}") from error


def _classes_in(names: Any) -> tuple[str, ...] | None:
    """The classes' names by label; None where there are none, or only the LABEL_0, LABEL_1 that stand for none."""
    if not names:
        return None
    by_label = {int(label): str(name) for label, name in names.items()}
    wanted = range(len(by_label))
    check(sorted(by_label) == list(wanted), f"config.json must name the labels 0 to {len(by_label) - 1} in id2label")
    classes = tuple(by_label[label] for label in wanted)
    return None if classes == _no_names(len(classes)) else classes


def _no_names(num_classes: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{label}" for label in range(num_classes))


def pair_of(value: Any) -> tuple[int, int]:
    """Height and width, of a config that gives both or one for both."""
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def normalization_in(preprocessor: Mapping[str, Any], channels: int) -> tuple[Any, Any]:
    """Mean and std on pixels scaled to [0, 1], or None and None where nothing is said."""
    if "image_mean" not in preprocessor or "image_std" not in preprocessor:
        return None, None
    scale = preprocessor.get("rescale_factor", 1 / 255)
    plain = (
        preprocessor.get("do_normalize", True) and preprocessor.get("do_rescale", True) and abs(scale * 255 - 1) < 1e-3
    )
    check(plain, "preprocessor_config.json must divide pixels by 255, then normalise them: nothing else is supported")
    values = (preprocessor["image_mean"], preprocessor["image_std"])
    mean, std = (tuple([float(v)] * channels if isinstance(v, int | float) else map(float, v)) for v in values)
    return mean, std


def config_of(
    size: Size,
    input: Input,
    kind: str,
    *,
    decoder_depth: int,
    num_classes: int,
    final_norm: bool,
    classes: tuple[str, ...] | None = None,
    normalized: bool | None = None,
) -> dict[str, Any]:
    """The object of config.json. kind: "pretrain", "classifier" or "encoder". ValueError unless cubes are square."""
    slots, rows, columns = input.cube
    check(rows == columns, f"transformers knows square cubes only; got {input.cube}")
    architectures = {
        "pretrain": "VideoMAEForPreTraining",
        "classifier": "VideoMAEForVideoClassification",
        "encoder": "VideoMAEModel",
    }
    height, width = input.size
    config: dict[str, Any] = {
        "architectures": [architectures[kind]],
        "model_type": "videomae",
        "image_size": height if height == width else [height, width],
        "patch_size": rows,
        "num_channels": len(input.mean),
        "num_frames": input.frames,
        "tubelet_size": slots,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_act": "gelu",
        "qv_bias": True,
        "layer_norm_eps": NORM_EPS,
        # their name for "no final norm before the pooling"
        "use_mean_pooling": not final_norm,
        "decoder_hidden_size": size.decoder_width,
        "decoder_intermediate_size": 4 * size.decoder_width,
        "decoder_num_attention_heads": size.decoder_heads,
        "decoder_num_hidden_layers": decoder_depth,
        "norm_pix_loss": normalized is not False,
        "dtype": "float32",
    }
    if kind == "classifier":
        names = classes or _no_names(num_classes)
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
    return config


def preprocessor_of(input: Input) -> dict[str, Any]:
    """The object of preprocessor_config.json: shortest edge, centre crop, and the normalisation of this model."""
    height, width = input.size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(input.mean),
        "image_std": list(input.std),
    }
