"""Which cubes are hidden: tube, random and frame masks as index lists, each a pure function of the clip's key.

Counts are exact and the same for every clip: floor(ratio * places) of the float product, as the official code has it
(RECIPES C).
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kernels.launch import check
from videomae.keys import keys as hashed

KINDS = ("tube", "random", "frame")


@dataclass(frozen=True)
class Mask:
    """Cube numbers, ascending in every row. visible: int64 [B, V]. masked: int64 [B, M]. Every cube is in one of the
    two."""

    visible: Tensor
    masked: Tensor

    def __post_init__(self) -> None:
        same = self.visible.ndim == self.masked.ndim == 2 and len(self.visible) == len(self.masked)
        check(
            same,
            f"a mask is visible [B, V] and masked [B, M]; got {tuple(self.visible.shape)}, {tuple(self.masked.shape)}",
        )

    @property
    def num_cubes(self) -> int:
        return self.visible.shape[1] + self.masked.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        return Mask(self.visible.to(device, non_blocking=True), self.masked.to(device, non_blocking=True))

    def to_bool(self) -> Tensor:
        """[B, N], True = masked."""
        hidden = torch.zeros(len(self.masked), self.num_cubes, dtype=torch.bool, device=self.masked.device)
        return hidden.scatter_(1, self.masked, True)

    @staticmethod
    def from_bool(hidden: Tensor) -> "Mask":
        """From a boolean [B, N], True = masked. ValueError unless every clip hides the same number, at least one, and
        not all."""
        check(
            hidden.ndim == 2 and hidden.dtype == torch.bool,
            f"a mask must be bool [B, N]; got {hidden.dtype} {tuple(hidden.shape)}",
        )
        counts = hidden.sum(dim=1)
        check(
            len(counts) > 0 and bool((counts == counts[0]).all()),
            f"every clip must hide the same number of cubes; got {counts.unique().tolist()}",
        )
        num_masked, num_cubes = int(counts[0]), hidden.shape[1]
        check(0 < num_masked < num_cubes, f"a mask must hide some of the {num_cubes} cubes, not {num_masked}")
        # stable: False before True, each ascending
        order = torch.argsort(hidden.to(torch.uint8), dim=1, stable=True)
        return Mask(order[:, : num_cubes - num_masked].contiguous(), order[:, num_cubes - num_masked :].contiguous())


def tube(
    grid: tuple[int, int, int],
    ratio: float,
    *,
    keys: Tensor | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """The same floor(ratio * H' * W') places hidden in every time slot.

    grid: cubes along time, height, width. keys: int64 [B], one per clip, on the device the mask is wanted on;
    or batch and a generator, which draws them. ValueError when the ratio leaves nothing hidden or nothing visible.
    """
    slots, rows, columns = grid
    places = _draw(_keys(keys, batch, generator), rows * columns, ratio, f"places of a {rows}x{columns} map")
    through_time = torch.arange(slots, device=places.masked.device)[:, None] * (rows * columns)

    def extend(index: Tensor) -> Tensor:
        return (through_time + index[:, None, :]).flatten(1)  # [B, T' * places]

    return Mask(extend(places.visible), extend(places.masked))


def random(
    grid: tuple[int, int, int],
    ratio: float,
    *,
    keys: Tensor | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """floor(ratio * N) cubes hidden, anywhere. Arguments and errors as `tube`."""
    return _draw(_keys(keys, batch, generator), prod(grid), ratio, "cubes")


def frame(
    grid: tuple[int, int, int],
    ratio: float,
    *,
    keys: Tensor | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
) -> Mask:
    """floor(ratio * T') whole time slots hidden. Arguments and errors as `tube`."""
    slots, rows, columns = grid
    chosen = _draw(_keys(keys, batch, generator), slots, ratio, "time slots")
    within = torch.arange(rows * columns, device=chosen.masked.device)

    def extend(index: Tensor) -> Tensor:
        return (index[:, :, None] * (rows * columns) + within).flatten(1)  # [B, slots * H'W']

    return Mask(extend(chosen.visible), extend(chosen.masked))


def make(kind: str, grid: tuple[int, int, int], ratio: float, keys: Tensor) -> Mask:
    """The mask of that kind, one of KINDS; ValueError for any other."""
    check(kind in KINDS, f"mask kind must be one of {', '.join(KINDS)}; got {kind!r}")
    return {"tube": tube, "random": random, "frame": frame}[kind](grid, ratio, keys=keys)


def num_masked(kind: str, grid: tuple[int, int, int], ratio: float) -> int:
    """How many of the grid's cubes such a mask hides; errors as `tube`."""
    return make(kind, grid, ratio, torch.zeros(1, dtype=torch.int64)).masked.shape[1]


def _keys(keys: Tensor | None, batch: int | None, generator: torch.Generator | None) -> Tensor:
    if keys is not None:
        check(batch is None and generator is None, "give either keys, or batch and generator")
        check(
            keys.ndim == 1 and keys.dtype == torch.int64,
            f"keys must be int64 [B]; got {keys.dtype} {tuple(keys.shape)}",
        )
        return keys
    if batch is None or generator is None:
        raise ValueError("a mask needs keys, or batch and generator: nothing is drawn from torch's global generator")
    # 62 bits of randomness: randint's upper bound is exclusive and must fit int64
    return torch.randint(1 << 62, (batch,), generator=generator, device=generator.device)


def _draw(keys: Tensor, num_places: int, ratio: float, what: str) -> Mask:
    """Hide floor(ratio * num_places) places of each row, drawn without replacement by sorting hashes."""
    check(0 < ratio < 1, f"mask ratio must be between 0 and 1, both excluded; got {ratio}")
    hidden = int(ratio * num_places)
    check(
        0 < hidden < num_places, f"mask ratio {ratio} hides {hidden} of {num_places} {what}: none must not be, nor all"
    )
    scores = hashed(keys[:, None], torch.arange(num_places, device=keys.device))
    order = torch.argsort(scores, dim=1, stable=True)
    return Mask(order[:, hidden:].sort(dim=1).values, order[:, :hidden].sort(dim=1).values)
