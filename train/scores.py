"""What an evaluation comes to: its numbers, one table a class, the confusion matrix and its picture."""

import csv
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from train.predictions import Row
from videomae.metrics import confusion, topk

_NAMED_CLASSES = 30  # in a picture: of more, every so many labels are written, and the commonest confusions beside it
_COMMONEST = 40  # confusions beside it
_LONGEST = 26  # letters of a name there


@dataclass(frozen=True)
class Scores:
    """Of all videos, each counted once; one that could not be read is wrong, and has no column of the confusion."""

    classes: tuple[str, ...]
    videos: Tensor  # int64 [C], all of these by class
    right1: Tensor
    right5: Tensor
    unreadable: Tensor
    confusion: Tensor  # int64 [C, C]

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * int(self.right1.sum()) / int(self.videos.sum())

    @property
    def top5(self) -> float:
        return 100 * int(self.right5.sum()) / int(self.videos.sum())

    @property
    def mean_class_top1(self) -> float:
        """The mean over the classes that have videos."""
        there = self.videos > 0
        return 100 * float((self.right1[there].double() / self.videos[there]).mean())

    def worst(self, most: int) -> list[tuple[int, float, int | None]]:
        """Classes of the lowest top-1: label, percent, and what they were mostly taken for; none that is perfect."""
        share = torch.where(self.videos > 0, 100 * self.right1.double() / self.videos.clamp(min=1), 100.0)
        labels = [label for label in share.argsort(stable=True)[:most].tolist() if share[label] < 100]
        wrong = self.confusion.clone().fill_diagonal_(0)
        return [(i, float(share[i]), int(wrong[i].argmax()) if wrong[i].any() else None) for i in labels]


def score(rows: Mapping[int, Row], classes: tuple[str, ...]) -> Scores:
    """The scores of all rows."""
    count = len(classes)

    def by_class(labels: list[int]) -> Tensor:
        return torch.bincount(torch.tensor(labels, dtype=torch.int64), minlength=count)

    readable = [row for row in rows.values() if row.probabilities is not None]
    labels = torch.tensor([row.label for row in readable], dtype=torch.int64)
    vectors = [torch.tensor(row.probabilities) for row in readable]
    probabilities = torch.stack(vectors) if vectors else torch.empty(0, count)
    return Scores(
        classes,
        videos=by_class([row.label for row in rows.values()]),
        right1=by_class(labels[topk(probabilities, labels, 1)].tolist()),
        right5=by_class(labels[topk(probabilities, labels, 5)].tolist()),
        unreadable=by_class([row.label for row in rows.values() if row.unreadable is not None]),
        confusion=confusion(labels, probabilities.argmax(1), count),
    )


def write_tables(scores: Scores, out: Path) -> None:
    """per_class.csv and confusion.csv: rows are labels, columns predictions."""
    names = scores.classes
    with _open_table(out / "per_class.csv") as file:
        table = csv.writer(file)
        table.writerow(("label", "class", "videos", "unreadable", "top1_right", "top5_right", "top1", "top5"))
        for label, name in enumerate(names):
            of = (scores.videos, scores.unreadable, scores.right1, scores.right5)
            videos, unreadable, right1, right5 = (int(column[label]) for column in of)
            shares = [f"{100 * right / videos:.2f}" if videos else "" for right in (right1, right5)]
            table.writerow((label, name, videos, unreadable, right1, right5, *shares))
    with _open_table(out / "confusion.csv") as file:
        table = csv.writer(file)
        table.writerow(("label \\ predicted", *names))
        table.writerows((name, *row) for name, row in zip(names, scores.confusion.tolist(), strict=True))


def _open_table(path: Path) -> IO[str]:
    # names of folders that are no UTF-8 keep their bytes
    return path.open("w", newline="", encoding="utf-8", errors="surrogateescape")


def draw_confusion(scores: Scores, path: Path, title: str) -> None:
    """The confusion matrix as a PNG: each row as shares of its label's predictions; names or counts where there is
    room, and the commonest confusions where there is not."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(scores.classes)
    few = count <= _NAMED_CLASSES
    side = max(3.2, 1.2 + 0.36 * count) if few else 11.0
    figure = Figure(figsize=(side + 2.2, side + 1.2) if few else (side + 4.6, side), layout="constrained")
    axes = figure.subplots() if few else figure.subplots(1, 2, width_ratios=(side, 4.2))[0]
    shares = scores.confusion.double() / scores.confusion.sum(1, keepdim=True).clamp(min=1)
    # white where nothing is; the root shows what is rare: most rows have one large share and many small ones
    shown = shares.where(scores.confusion > 0, float("nan")).numpy()
    image = axes.imshow(shown, cmap="magma_r", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="label", title=title)
    step = 1 if few else max(round(count / 20 / 5) * 5, 1)
    ticks = range(0, count, step)
    written = [_plain(_short(scores.classes[i])) if few else str(i) for i in ticks]
    axes.set_xticks(ticks, written, rotation=90 if few else 0)
    axes.set_yticks(ticks, written)
    if few:
        _write_counts(axes, scores.confusion, shares)
    else:
        _list_commonest(figure.axes[1], scores)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's predictions")
    with warnings.catch_warnings():
        # letters that the font lacks are drawn as boxes; the tables have the names
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=120)


def _write_counts(axes: object, counts: Tensor, shares: Tensor) -> None:
    for i, j in counts.nonzero().tolist():
        colour = "white" if shares[i, j] > 0.2 else "black"
        axes.text(j, i, int(counts[i, j]), ha="center", va="center", color=colour, fontsize=7)  # type: ignore[attr-defined]


def _list_commonest(axes: object, scores: Scores) -> None:
    wrong = scores.confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:_COMMONEST].tolist()
    lines = ["commonest confusions", "count  label -> predicted", ""]
    for place in order:
        label, predicted = divmod(place, len(scores.classes))
        if wrong[place]:
            names = [f"{i} {_short(scores.classes[i])}" for i in (label, predicted)]
            lines.append(f"{int(wrong[place]):5}  {names[0]:<{_LONGEST + 4}} -> {names[1]}")
    axes.axis("off")  # type: ignore[attr-defined]
    axes.text(0, 1, _plain("\n".join(lines)), va="top", fontsize=7, family="monospace")  # type: ignore[attr-defined]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _plain(text: str) -> str:
    # matplotlib takes what stands between two of them for a formula, and no bytes that are no letters
    return text.replace("$", r"\$").encode("utf-8", "backslashreplace").decode()
