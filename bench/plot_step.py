"""The picture of our step by part, measured beside the least time, from what `python -m bench.gpu` wrote. Needs no GPU.

python -m bench.plot_step bench/results/nvidia_h200
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.step_report import PICTURE
from videomae.command_line import Parser, run_main

FORWARD, BACKWARD, FLOOR = "#6aa6de", "#1f5fa8", "#e08a2c"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """One panel for each of step.json's parts: a bar for every part, the longest first."""
    import matplotlib.pyplot as plt

    rows = [len(p["measured"]) for p in found]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 0.62 * sum(rows) + 1.3 * len(found)), squeeze=False, height_ratios=rows
    )
    for axis, one in zip(axes[:, 0], found, strict=True):
        _panel(axis, one)
    axes[-1, 0].set_xlabel("microseconds a clip")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[0, 0].legend(handles, labels, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(axis: Any, one: dict[str, Any]) -> None:
    took = {part: sum(times.values()) for part, times in one["measured"].items()}
    parts = sorted(took, key=lambda part: -took[part])
    places, floors = range(len(parts)), one["floors"]
    forward = [one["measured"][part].get("forward", 0) for part in parts]
    backward = [one["measured"][part].get("backward", 0) for part in parts]
    axis.barh([y - 0.2 for y in places], forward, height=0.38, color=FORWARD, label="measured: forward, update")
    axis.barh(
        [y - 0.2 for y in places], backward, left=forward, height=0.38, color=BACKWARD, label="measured: backward"
    )
    least = [floors.get(part, 0) for part in parts]
    axis.barh([y + 0.2 for y in places], least, height=0.38, color=FLOOR, label="least, as counted")
    widest = max(*took.values(), *least)
    for y, part in zip(places, parts, strict=True):
        text = f"{took[part]:.1f}"
        if floors.get(part):
            text += f", {took[part] / floors[part]:.1f} times the least"
        axis.text(took[part] + widest * 0.01, y - 0.2, text, va="center", fontsize=8.5)
    axis.set_yticks(list(places), parts)
    axis.invert_yaxis()
    axis.set_xlim(0, widest * 1.25)
    total, floor = sum(took.values()), sum(floors.values())
    title = f"{one['size']}, {one['clips']} clips: {total:.0f} us a clip"
    axis.set_title(f"{title}, at least {floor:.0f}" if floor else title, loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m bench.plot_step", (__doc__ or "").strip())
    parser.add_argument("folder", type=Path, help="with step.json")
    given = parser.parse_args(arguments)
    found = json.loads((given.folder / "step.json").read_text())["parts"]
    if not found:
        parser.error(f"{given.folder}/step.json has no times by part")
    draw(found, given.folder / PICTURE)
    print(given.folder / PICTURE)
    return 0


if __name__ == "__main__":
    run_main(main)
