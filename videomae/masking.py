"""Which cubes are hidden from the encoder, and which of them the decoder predicts: index lists, each a pure function of
the clip's key.

Tube, random and frame masks hide cubes from the encoder; a running cell (VideoMAE V2's dual masking) has the decoder
skip some as well. Counts are exact and the same for every clip: floor(ratio * places) of the float product, as the
official code has it (RECIPES C).
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import check
from videomae.keys import keys as hashed

KINDS = ("tube", "random", "frame")
DECODER_KINDS = ("none", "running-cell")
_CELL = -1  # the number of a running cell's draw: no place has it, so the encoder's mask tells nothing of the cell


@dataclass(frozen=True)
class Mask:
    """Cube numbers, int64. visible [B, V] and masked [B, M] are ascending in every row; every cube is in one of them.

    decoded [B, K]: the cubes that stand in the decoder as mask tokens. predicted [B, P]: those of them whose pixels are
    predicted and count in the loss, which are the last P columns of decoded; before them stand cubes that the encoder
    saw, both parts ascending. Unless they are given, both are masked itself.
    """

    visible: Tensor
    masked: Tensor
    decoded: Tensor = None  # type: ignore[assignment]
    predicted: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        same = self.visible.ndim == self.masked.ndim == 2 and len(self.visible) == len(self.masked)
        check(
            same,
            f"a mask is visible [B, V] and masked [B, M]; got {tuple(self.visible.shape)}, {tuple(self.masked.shape)}",
        )
        check((self.decoded is None) == (self.predicted is None), "a mask has both decoded and predicted, or neither")
        if self.decoded is None:
            object.__setattr__(self, "decoded", self.masked)
            object.__setattr__(self, "predicted", self.masked)
            return
        decoded, predicted, masked = (tuple(part.shape) for part in (self.decoded, self.predicted, self.masked))
        same = len(decoded) == len(predicted) == 2 and decoded[0] == predicted[0] == masked[0]
        check(
            same and 0 < predicted[1] <= min(decoded[1], masked[1]),
            f"decoded is [B, K] and predicted [B, P], P at least 1 and at most K and M, with masked {masked}; "
            f"got {decoded}, {predicted}",
        )

    @property
    def num_cubes(self) -> int:
        return self.visible.shape[1] + self.masked.shape[1]

    def to(self, device: torch.device | str) -> "Mask":
        plain = self.decoded is self.masked and self.predicted is self.masked
        own = () if plain else (self.decoded, self.predicted)
        return Mask(*(part.to(device, non_blocking=True) for part in (self.visible, self.masked, *own)))

    def to_bool(self) -> Tensor:
        """[B, N], True = masked, that is hidden from the encoder."""
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


def running_cell(mask: Mask, grid: tuple[int, int, int], ratio: float, keys: Tensor) -> Mask:
    """The tube mask with VideoMAE V2's decoder mask over it: floor(4 * ratio) places of every 2x2 cell of the map are
    skipped by the decoder, others in each time slot (RECIPES C).

    Row by row the cell is a ring of skipped places before kept ones, read from start + t + 1 in slot t; start is drawn
    for each clip; at an odd border the cell is cut. What is kept stands in the decoder, whether the encoder saw it or
    not; what is kept and masked is predicted. keys: int64 [B], on the mask's device. A ratio of exactly 0 gives back
    the mask, as V1 decodes it. ValueError for any other that keeps all of a cell or nothing, for time slots that are no
    multiple of 4, and for a mask that is no tube; where that is only known on a GPU, such a clip's cubes lie outside
    the grid instead, which makes its loss NaN.
    """
    _check_keys(keys)
    if ratio == 0:
        return Mask(mask.visible, mask.masked)
    skipped = _skipped_of_cell(ratio)
    slots, rows, columns = grid
    num_cubes, places = prod(grid), rows * columns
    check(keys.device == mask.masked.device, f"keys are on {keys.device}, the mask on {mask.masked.device}")
    check(slots % 4 == 0, f"a running cell comes round every 4 time slots: they must be a multiple of 4; got {slots}")
    same = mask.num_cubes == num_cubes and len(mask.masked) == len(keys)
    wanted = f"{len(keys)} clips of {num_cubes} cubes: {tuple(grid)}"
    check(same, f"the mask is for {len(mask.masked)} clips of {mask.num_cubes} cubes, keys and grid are for {wanted}")
    is_tube = _is_tube(mask, slots, places)
    # why both counts are known before anything is drawn: a place of the map reads the ring at start + its place in the
    # cell + t + 1, and over four slots in sequence that is each of the four once, so it is kept in 4 - skipped of any
    # four slots, whatever the start. This holds for every place, cut cells or not; a tube hides whole places
    kept_slots = slots // 4 * (4 - skipped)
    num_decoded, num_predicted = places * kept_slots, mask.masked.shape[1] // slots * kept_slots

    cube = torch.arange(num_cubes, device=keys.device)
    time, row, column = cube // places, cube // columns % rows, cube % columns
    start = hashed(keys, _CELL) & 3
    pointer = start[:, None] + (time + 1 + row % 2 * 2 + column % 2)  # [B, N]
    group = torch.where(pointer % 4 < skipped, 0, mask.to_bool() + 1)
    # stable: skipped cubes first, then kept ones that the encoder saw, then predicted ones, each ascending
    order = torch.argsort(group, dim=1, stable=True)
    order = torch.where(is_tube[:, None], order, num_cubes)
    decoded, predicted = (order[:, num_cubes - count :].contiguous() for count in (num_decoded, num_predicted))
    return Mask(mask.visible, mask.masked, decoded, predicted)


def make(
    kind: str,
    grid: tuple[int, int, int],
    ratio: float,
    keys: Tensor,
    decoder_kind: str = "none",
    decoder_ratio: float = 0.5,
) -> Mask:
    """The mask of that kind, one of KINDS, and for the decoder one of DECODER_KINDS: "none" decodes all that is masked.
    ValueError for any other, and as `tube` and `running_cell`."""
    check(kind in KINDS, f"mask kind must be one of {', '.join(KINDS)}; got {kind!r}")
    check(
        decoder_kind in DECODER_KINDS, f"decoder mask must be one of {', '.join(DECODER_KINDS)}; got {decoder_kind!r}"
    )
    # refused by its name: by chance a random mask may be a tube, and on a GPU nobody looks
    fits = decoder_kind == "none" or kind == "tube" or decoder_ratio == 0
    check(fits, f"a running-cell decoder mask needs a tube mask: with a {kind} mask, clips differ in what is predicted")
    mask = {"tube": tube, "random": random, "frame": frame}[kind](grid, ratio, keys=keys)
    return mask if decoder_kind == "none" else running_cell(mask, grid, decoder_ratio, keys)


class Counts(NamedTuple):
    """Cubes of each clip, as in `Mask`: V, M, K and P."""

    visible: int
    masked: int
    decoded: int
    predicted: int


def counts(
    kind: str, grid: tuple[int, int, int], ratio: float, decoder_kind: str = "none", decoder_ratio: float = 0.5
) -> Counts:
    """How many of the grid's cubes are in each part of such a mask; errors as `make`."""
    mask = make(kind, grid, ratio, torch.zeros(1, dtype=torch.int64), decoder_kind, decoder_ratio)
    return Counts(*(part.shape[1] for part in (mask.visible, mask.masked, mask.decoded, mask.predicted)))


def num_masked(kind: str, grid: tuple[int, int, int], ratio: float) -> int:
    """How many of the grid's cubes such a mask hides from the encoder; errors as `tube`."""
    return counts(kind, grid, ratio).masked


def _keys(keys: Tensor | None, batch: int | None, generator: torch.Generator | None) -> Tensor:
    if keys is not None:
        check(batch is None and generator is None, "give either keys, or batch and generator")
        _check_keys(keys)
        return keys
    if batch is None or generator is None:
        raise ValueError("a mask needs keys, or batch and generator: nothing is drawn from torch's global generator")
    # 62 bits of randomness: randint's upper bound is exclusive and must fit int64
    return torch.randint(1 << 62, (batch,), generator=generator, device=generator.device)


def _check_keys(keys: Tensor) -> None:
    check(keys.ndim == 1 and keys.dtype == torch.int64, f"keys must be int64 [B]; got {keys.dtype} {tuple(keys.shape)}")


def _skipped_of_cell(ratio: float) -> int:
    """Of a cell's four places, how many the decoder skips; ValueError when none or all."""
    skipped = int(4 * ratio) if 0 <= ratio < 1 else 4
    check(
        0 < skipped < 4,
        f"decoder mask ratio must be 0, or from 0.25 to below 1, so that a cell of 4 skips some, not all; got {ratio}",
    )
    return skipped


def _is_tube(mask: Mask, slots: int, places: int) -> Tensor:
    """bool [B]: whether a clip hides the same places in every time slot. ValueError where a clip does not and finding
    out needs no wait for a device."""
    message = "a running-cell decoder mask needs a tube mask: this one does not hide the same places in every time slot"
    check(mask.masked.shape[1] % slots == 0, message)
    first = torch.arange(slots, device=mask.masked.device)[:, None] * places
    hidden = mask.masked.unflatten(1, (slots, -1)) - first  # [B, T', places]
    is_tube = (hidden == hidden[:, :1]).flatten(1).all(dim=1)
    if is_tube.is_cpu and not torch.compiler.is_compiling():
        check(bool(is_tube.all()), message)
    return is_tube


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
