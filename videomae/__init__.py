"""VideoMAE: masked autoencoders for video. Models, masks and weights; `train` holds the commands."""

from videomae import masking
from videomae.classifier import classifier
from videomae.model import encoder, pretrain_model

__version__ = "0.1.0"
__all__ = ["classifier", "encoder", "load_weights", "masking", "pretrain_model"]


def __getattr__(name: str) -> object:
    # not imported above: python -m videomae.weights would find itself imported already, and warn
    if name == "load_weights":
        from videomae.weights import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
