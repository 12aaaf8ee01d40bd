"""Which model weights are of: their format, the model of the tensors' sizes, and what a model is."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from kernels.launch import check
from videomae import hugging_face, image_weights, metadata
from videomae.classifier import Classifier
from videomae.detector import AVA_MEAN, AVA_STD, Detector
from videomae.model import SIZES, Encoder, Input, Size, VideoMAE
from videomae.weight_files import Stated, Stored
from videomae.weight_names import Known, bare, depth_of


def identify(stored: Stored) -> Known:
    """What was read, under official names."""
    if metadata.is_ours(stored.metadata):
        return Known("videomae", stored.source, stored.tensors, metadata.stated_in(stored.metadata, stored.source))
    if image_weights.is_image(stored.tensors):
        found = image_weights.to_official(stored.tensors, stored.source)
        stated = image_weights.stated_in(stored.config, stored.preprocessor)
        return Known(found.format, stored.source, found.tensors, stated, found.dropped)
    if hugging_face.is_hugging_face(list(stored.tensors)):
        stated = hugging_face.stated_in(stored.config, stored.preprocessor)
        return Known("hugging face", stored.source, hugging_face.to_official(stored.tensors), stated)
    return Known("official", stored.source, stored.tensors, Stated())


def build(known: Known) -> VideoMAE | Encoder:
    """A model of the tensors' sizes, its weights still its own; ValueError where they are no VideoMAE's."""
    tensors, stated = {bare(name): tensor for name, tensor in known.tensors.items()}, known.stated
    size, cube = _sizes_of(known, tensors)
    input = Input(stated.frames or 16, stated.image_size or 224, cube)
    if "mask_token" in tensors:
        return VideoMAE(size, input, decoder_depth=depth_of(tensors, "decoder.blocks"))
    if "head.weight" not in tensors:
        return Encoder(size, input, final_norm="norm.weight" in tensors)
    num_classes = tensors["head.weight"].shape[:1].numel()
    if known.is_detector:
        # an official file does not say what its frames are normalised with
        input = replace(input, mean=stated.mean or AVA_MEAN, std=stated.std or AVA_STD)
        return Detector(size, input, num_classes=num_classes, aligned=bool(stated.aligned))
    return Classifier(size, input, num_classes=num_classes)


def _sizes_of(known: Known, tensors: Mapping[str, Tensor]) -> tuple[Size, tuple[int, int, int]]:
    """The model's size and its cube; ValueError where the tensors, by bare names, are no VideoMAE's or do not tell."""
    stated, projection = known.stated, tensors.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != (4 if known.is_image else 5):
        raise ValueError(f"{known.source} is no VideoMAE: it has no patch_embed.proj.weight of five axes")
    width, _, *sides = projection.shape
    slots, rows, columns = [2, *sides] if known.is_image else sides
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
    depths = [depth_of(tensors, prefix) for prefix in ("blocks", "decoder.blocks")]
    check(sum(depths) <= len(tensors), f"{known.source} names blocks {depths}, but has only {len(tensors)} tensors")
    return Size(width, depths[0], heads, decoder_width, decoder_heads), (slots, rows, columns)


def checked(model: nn.Module) -> VideoMAE | Encoder:
    """The model itself; ValueError where it is of another kind."""
    if not isinstance(model, VideoMAE | Encoder):
        raise ValueError(
            f"weights are those of a VideoMAE, Encoder, Classifier or Detector; got {type(model).__name__}"
        )
    return model


def parts_of(model: nn.Module) -> tuple[str, Encoder]:
    """The model's kind and its encoder."""
    model = checked(model)
    if isinstance(model, VideoMAE):
        return "pretrain", model.encoder
    if isinstance(model, Detector):
        return "detector", model
    return ("classifier" if isinstance(model, Classifier) else "encoder"), model
