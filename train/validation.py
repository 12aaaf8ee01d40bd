"""How good a classifier is while it trains: one view of every video of the validation set."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from train.inference import Reading, read_views
from train.optim import PRECISIONS
from train.run import Run
from videomae.data.labelled import LabelledVideos
from videomae.data.readers import ViewReader
from videomae.wording import counted

_FEW = 8


@torch.no_grad()
def validate(
    model: nn.Module, videos: LabelledVideos, reader: ViewReader, run: Run, *, source: str, say: Callable[[str], None]
) -> dict[str, float]:
    """val_loss, val_top1 and val_top5 in per cent, and how many of the videos could not be read: those count as wrong,
    and are named.

    source: the path that the videos were found under.
    """
    was_training, dtype = model.training, PRECISIONS[run.precision]
    model.eval()
    labels = torch.tensor(videos.labels)
    loss, top1, top5, lost, nonfinite = 0.0, 0, 0, 0, 0
    # a few are read sooner than processes start
    workers = run.workers if len(videos) > _FEW else 0
    reading = Reading(workers, run.config.loader, run.config.data.cache_of(source))
    indices = range(len(videos))
    for found in read_views(reader, videos.videos.paths, indices, views=1, device=run.device, reading=reading, say=say):
        for skip in found.skips:
            say(f"validation: counted as wrong: {skip.path}: {skip.reason}")
        lost += len(found.skips)
        if not found.indices:
            continue
        with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
            parts = found.frames[:, 0].split(run.plan.micro_batch)
            logits = torch.cat([model(part).float() for part in parts]).cpu()
        wanted = labels[list(found.indices)]
        finite = logits.isfinite().all(dim=1, keepdim=True)
        # where nothing was computed, nothing is recognised
        best = (logits.topk(min(5, logits.shape[1])).indices == wanted[:, None]) & finite
        nonfinite += int((~finite).sum())
        loss += cross_entropy(logits, wanted, reduction="sum").item()
        top1, top5 = top1 + int(best[:, 0].sum()), top5 + int(best.any(1).sum())
    model.train(was_training)
    if nonfinite:
        say(f"validation: counted as wrong: {counted(nonfinite, 'video')} for which the model's outputs are not finite")
    read = len(videos) - lost
    values = {"val_top1": 100 * top1 / len(videos), "val_top5": 100 * top5 / len(videos), "val_unreadable": lost}
    return {"val_loss": loss / read, **values} if read and not nonfinite else values
