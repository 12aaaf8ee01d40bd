"""Where weights come from: what the config.json of their run, or Hugging Face's, says of how they were trained."""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Target(NamedTuple):
    """What the weights were trained to predict. source: who says so, in words; trained: with which masks, if known."""

    normalized: bool
    source: str
    trained: str = ""


def stride_of(source: str) -> int | None:
    """With which stride the run of these weights sampled its clips; None where that is not known. ValueError as
    `target_of`."""
    run = _run_of(source)
    stride = None if run is None else _config_of(run).get("sampling.stride")
    return stride if type(stride) is int and stride >= 1 else None


def target_of(source: str, stated: bool | None, wanted: str) -> Target:
    """What the weights of a source predict: as wanted, or as they state, or their run; else what published weights do.
    Raises ValueError for a config.json that cannot be read."""
    run = _run_of(source)
    trained = ""
    noted = None
    if run is not None:
        known = _config_of(run)
        trained = f"; trained with {known.get('mask.kind')} masks of ratio {known.get('mask.ratio')}"
        # pictures tell the squared error of all weights
        loss = known.get("target.loss", "mse")
        trained += "" if loss == "mse" else f" by the {loss} loss"
        noted = known.get("target.normalize")
    if wanted != "auto":
        return Target(wanted == "normalized", "as --target says", trained)
    if stated is not None:
        return Target(stated, "the weights say so", trained)
    if run is not None and isinstance(noted, bool):  # weights from before they said so
        return Target(noted, f"{run / 'config.json'} says so", trained)
    return Target(True, "assumed, as the weights do not say; --target pixels if they were trained on plain pixels")


def _run_of(source: str) -> Path | None:
    """The run folder of ours that a checkpoint, or a file in one, lies in."""
    for folder in Path(source).expanduser().resolve().parents:
        if folder.name == "checkpoints" and (folder.parent / "config.json").is_file():
            return folder.parent
    return None


def _config_of(run: Path) -> dict[str, Any]:
    """What a run was started with, by the names of its flags. ValueError for what is no config.json of ours."""
    try:
        return dict(json.loads((run / "config.json").read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} is none of a run: {error!r}") from error
