"""VideoMAE: masked autoencoders for video. Models, masks and weights; `train` holds the commands."""

from importlib import import_module

_broken: Exception | None = None
try:
    from videomae import masking
    from videomae.classifier import classifier
    from videomae.detector import detector
    from videomae.model import encoder, pretrain_model
# python -m videomae.doctor says what is missing, and is in this package; who asks for the names above is told below
except (ImportError, OSError) as error:
    _broken = error

__version__ = "0.1.0"
__all__ = [
    "classifier",
    "detector",
    "encoder",
    "load_weights",
    "masking",
    "model_from",
    "pretrain_model",
    "video_features",
]

# not imported above: python -m videomae.weights would find itself imported already, and warn; and models shall do
# without the packages that read videos
_WHERE = {
    "load_weights": "videomae.weights",
    "model_from": "videomae.weights",
    "video_features": "videomae.features",
}


def __getattr__(name: str) -> object:
    if _broken is not None and name in __all__:
        raise ImportError(f"videomae.{name}: {_broken}; python -m videomae.doctor says more") from _broken
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
