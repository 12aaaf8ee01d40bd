"""Image transformers as the beginning of a video one: ImageMAE, timm and DeiT, Hugging Face's ViT, ViTMAE and DeiT, and
our own, which are models of clips of one frame.

Their kernel is spread over the cube's frames and divided by their number, so that a still gives its image's tokens
(I3D, arXiv 1705.07750). Class tokens, learned positions, heads and decoders have no place here and are dropped; so is
the bias of keys, which adds one number to all that a query compares, and a softmax does not change with it.
Sources: the names in timm 1.0 and ImageMAE, and in transformers 5.23, which spells them in memory as not on disk.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from kernels.launch import check
from videomae import hugging_face
from videomae.weight_files import Stated

PROJECTION = "patch_embed.proj.weight"
_PROJECTIONS = (PROJECTION, "embeddings.patch_embeddings.projection.weight")
_MODELS = ("vit", "vit_mae", "vit_msn", "deit")
# Hugging Face's names in memory, and those on disk, which are VideoMAE's too
_SPELLINGS = (
    (r"^(vit|deit)\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_KEPT = re.compile(
    r"(patch_embed\.proj|norm|blocks\.\d+\.(norm1|norm2|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias)"
    r"|blocks\.\d+\.attn\.(qkv\.weight|q_bias|v_bias)"
)
_DROPPED = re.compile(
    # timm and ImageMAE
    r"(cls|dist|reg|mask)_token|pos_embed|(head|head_dist|fc_norm|pre_logits\.fc)\.(weight|bias)|decoder_\w+(\.\w+)*"
    # Hugging Face
    r"|embeddings\.(cls_token|distillation_token|mask_token|position_embeddings)|(pooler|decoder)\.\w+(\.\w+)*"
    r"|(cls_|distillation_)?classifier\.(weight|bias)|encoder\.layer\.\d+\.attention\.attention\.key\.bias"
)


class Found(NamedTuple):
    """An image model's tensors under official names, its kernel still of two axes, and the names that were dropped."""

    format: str
    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]


def is_image(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are an image transformer's weights: the kernel has no time."""
    return any(name.endswith(_PROJECTIONS) and tensor.ndim == 4 for name, tensor in tensors.items())


def to_official(tensors: Mapping[str, Tensor], source: str) -> Found:
    """ValueError for names that are neither used nor known to be superfluous: they would change what is computed."""
    is_timm = PROJECTION in tensors
    spelled = {name if is_timm else _as_on_disk(name): tensor for name, tensor in tensors.items()}
    check(len(spelled) == len(tensors), f"{source} holds a tensor twice, under two spellings")
    dropped = tuple(name for name in spelled if _DROPPED.fullmatch(name))
    kept = {name: tensor for name, tensor in spelled.items() if name not in dropped}
    official = _split_biases(kept) if is_timm else hugging_face.to_official(kept)
    strange = [name for name in official if not _KEPT.fullmatch(name)]
    check(not strange, f"{source} is an image model of another architecture: it has {', '.join(strange[:8])}")
    return Found("image (timm)" if is_timm else "image (hugging face)", official, dropped)


def _as_on_disk(name: str) -> str:
    for pattern, other in _SPELLINGS:
        name = re.sub(pattern, other, name)
    return name


def _split_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            split[f"{stem}q_bias"], _, split[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            split[name] = tensor
    return split


def inflated(tensors: Mapping[str, Tensor], cube: tuple[int, int, int], source: str) -> dict[str, Tensor]:
    """The tensors for clips: the kernel [D, C, dy, dx], ours [D, C, 1, dy, dx], becomes [D, C, dt, dy, dx], each frame
    having 1/dt of it.

    ValueError where there is no such kernel, and unless patches have the cube's height and width.
    """
    name, (slots, *sides) = next((name for name in tensors if name.endswith(PROJECTION)), PROJECTION), cube
    kernel = tensors.get(name)
    if kernel is None or kernel.ndim not in (4, 5) or kernel.shape[2:-2].numel() != 1:
        raise ValueError(f"{source} is no image model: it has no {PROJECTION} of one frame")
    patch = list(kernel.shape[-2:])
    check(patch == sides, f"{source} has patches of {_by(patch)} pixels, the model's cubes have {_by(sides)}")
    still = kernel if kernel.ndim == 5 else kernel.unsqueeze(2)
    return {**tensors, name: (still / slots).repeat(1, 1, slots, 1, 1)}


def _by(sides: list[int]) -> str:
    return "x".join(map(str, sides))


def stated_in(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Stated:
    """What the config files of Hugging Face or timm say; ValueError when they are of another architecture."""
    try:
        if "pretrained_cfg" in config:
            mean, std = (tuple(map(float, config["pretrained_cfg"][name])) for name in ("mean", "std"))
            return Stated(mean=mean, std=std)
        if not config:
            return Stated()
        kind = config.get("model_type")
        check(
            kind in _MODELS, f"config.json must be of an image model ({', '.join(_MODELS)}); its model_type is {kind!r}"
        )
        act = config.get("hidden_act", "gelu")
        check(act == "gelu", f"config.json must have hidden_act 'gelu'; got {act!r}")
        mean, std = hugging_face.normalization_in(preprocessor, config.get("num_channels", 3))
        return Stated(
            width=int(config.get("hidden_size", 768)),
            depth=int(config.get("num_hidden_layers", 12)),
            heads=int(config.get("num_attention_heads", 12)),
            image_size=hugging_face.pair_of(config.get("image_size", 224)),
            mean=mean,
            std=std,
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json or preprocessor_config.json is ill-formed: {error!r}") from error
