"""Where a layer's attention goes, over space and time: the weights that its queries give to every cube, and a sheet of
them.

The weights are the softmax's of the layer itself, computed anew from what it is given. They say which cubes a layer
mixes, not what a prediction rests on.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels.launch import check
from train.one_clip import Moments
from train.reconstruction import chosen_slots, header_of
from train.strip import Row, draw_strip, fitted
from videomae.blocks import Attention
from videomae.masking import Mask
from videomae.model import Encoder, Input, VideoMAE
from videomae.weight_names import listing

_AT_ONCE = 1 << 25  # weights in memory
_CELL = (112, 128)  # pixels of a frame: its least and its most
_HEAT = 0.7  # how much of a cell is colour, the rest its frame in grey
_HIDDEN, _QUERY = (190, 190, 190), (0, 255, 80)


class Layer(NamedTuple):
    """One of a part's blocks, counted from 1."""

    part: Literal["encoder", "decoder"]
    number: int


@dataclass(frozen=True)
class Query:
    """Whose attention is shown: one cube's (time slot, row, column, from 0 on), or the mean over many (cube None)."""

    cube: tuple[int, int, int] | None = None

    @classmethod
    def parse(cls, text: str, grid: tuple[int, int, int]) -> "Query":
        """`mean` or `SLOT,ROW,COLUMN`; ValueError for anything else."""
        if text == "mean":
            return cls()
        found = re.fullmatch(r"(\d+),(\d+),(\d+)", text)
        wanted = f"mean, or a cube as SLOT,ROW,COLUMN below {','.join(map(str, grid))}"
        if found is None or any(int(place) >= side for place, side in zip(found.groups(), grid, strict=True)):
            raise ValueError(f"query must be {wanted}; got {text}")
        slot, row, column = map(int, found.groups())
        return cls((slot, row, column))

    def number(self, grid: tuple[int, int, int]) -> int | None:
        """Of the cube, in the clip's order."""
        if self.cube is None:
            return None
        slot, row, column = self.cube
        return (slot * grid[1] + row) * grid[2] + column


class Map(NamedTuple):
    """shares [A, T', H', W'], float32: of each head's attention, which add up to 1; NaN for cubes that have no token.
    queries, tokens: their numbers."""

    layer: Layer
    shares: Tensor
    queries: int
    tokens: int


def parse_layers(texts: Sequence[str], model: VideoMAE | Encoder) -> list[Layer]:
    """`7` is the encoder's 7th block, `last` its last, `all` all of them; `decoder.2`, `decoder.last` and `decoder.all`
    the decoder's. ValueError for what the model does not have."""
    depths = {"encoder": len((model.encoder if isinstance(model, VideoMAE) else model).blocks)}
    if isinstance(model, VideoMAE):
        depths["decoder"] = len(model.decoder.blocks)
    layers: list[Layer] = []
    for text in texts:
        found = re.fullmatch(r"(?:(encoder|decoder)\.)?(\d+|last|all)", text)
        if found is None:
            raise ValueError(f"a layer is a number, last, all, decoder.NUMBER, decoder.last or decoder.all; got {text}")
        part: Any = found[1] or "encoder"
        check(part in depths, f"layer {text}: these weights have no decoder")
        depth = depths[part]
        numbers = range(1, depth + 1) if found[2] == "all" else [depth if found[2] == "last" else int(found[2])]
        check(all(1 <= n <= depth for n in numbers), f"layer {text}: the {part} has the layers 1 to {depth}")
        layers += [Layer(part, number) for number in numbers]
    return list(dict.fromkeys(layers))


def attention_maps(
    model: VideoMAE | Encoder,
    frames: Tensor,
    layers: Sequence[Layer],
    *,
    query: Query,
    mask: Mask | None = None,
    autocast: torch.dtype | None = None,
) -> list[Map]:
    """The attention of each layer for a clip, uint8 [1, T, H, W, 3]. mask: the encoder sees only its visible cubes;
    None: all; a decoder needs one. The mean is over all of an encoder's queries, and over a decoder's hidden cubes.
    ValueError as `check_query`."""
    encoder = model.encoder if isinstance(model, VideoMAE) else model
    grid, device = model.input.grid, encoder.positions.device
    if mask is not None and any(layer.part == "encoder" for layer in layers):
        check_query(query, grid, mask)
    there, frames = (None if mask is None else mask.to(device)), frames.to(device)
    visible = None if there is None else there.visible
    parts: dict[str, Any] = {"encoder": encoder.blocks}
    cubes = {"encoder": torch.arange(model.input.num_cubes, device=device) if visible is None else visible[0]}
    decodes = any(layer.part == "decoder" for layer in layers)
    if decodes:
        if there is None or not isinstance(model, VideoMAE):
            raise ValueError("a decoder's attention is that of a masked clip")
        parts["decoder"] = model.decoder.blocks
        cubes["decoder"] = torch.cat((there.visible[0], there.decoded[0]))
    modules = {layer: parts[layer.part][layer.number - 1].attn for layer in layers}
    with torch.inference_mode():
        with (
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
            _inputs_of(list(modules.values())) as given,
        ):
            _ = model(frames, there) if decodes else encoder.blocks(encoder.embed(frames, visible))
        maps = []
        for layer, module in modules.items():
            numbers = cubes[layer.part]
            asked = _queries(layer, query.number(grid), numbers, there)
            shares = mean_weights(module, given[module][0], asked).cpu()
            whole = torch.full((len(shares), model.input.num_cubes), torch.nan)
            whole[:, numbers.cpu()] = shares
            maps.append(Map(layer, whole.unflatten(1, grid), len(asked), len(numbers)))
    return maps


def _queries(layer: Layer, number: int | None, cubes: Tensor, mask: Mask | None) -> Tensor:
    """Which tokens ask."""
    if number is not None:
        return (cubes == number).nonzero().flatten()
    every = torch.arange(len(cubes), device=cubes.device)
    # the last layer asks for no others, and it is for these that a decoder is there
    return every if layer.part == "encoder" or mask is None else every[-mask.predicted.shape[1] :]


def check_query(query: Query, grid: tuple[int, int, int], mask: Mask) -> None:
    """ValueError for a cube that the mask hides: the encoder has no token of it."""
    number = query.number(grid)
    if number is not None and not bool((mask.visible == number).any()):
        places = [
            f"{n // (grid[1] * grid[2])},{n // grid[2] % grid[1]},{n % grid[2]}" for n in mask.visible[0].tolist()
        ]
        raise ValueError(f"the query's cube is hidden by the mask; visible are {listing(places)}")


@contextmanager
def _inputs_of(modules: Sequence[Attention]) -> Iterator[dict[Attention, Tensor]]:
    """What each of the modules is given inside."""
    given: dict[Attention, Tensor] = {}

    def keep(module: Any, arguments: tuple[Any, ...]) -> None:
        given[module] = arguments[0]

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def mean_weights(attention: Attention, x: Tensor, queries: Tensor) -> Tensor:
    """The attention's weights for tokens x [L, D], float32 [A, L], averaged over these queries; every row adds up to
    1."""
    length, width = x.shape
    weight = attention.qkv.weight[: 2 * width].float()
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias))).float()
    with torch.autocast(x.device.type, enabled=False):
        both = functional.linear(x.float(), weight, bias).view(length, 2, attention.heads, -1)
        q, k = both[queries, 0], both[:, 1]
        total = torch.zeros(attention.heads, length, device=x.device)
        for part in q.split(max(_AT_ONCE // (attention.heads * length), 1)):
            scores = torch.einsum("qad,kad->aqk", part, k) * q.shape[-1] ** -0.5
            total += scores.softmax(dim=2).sum(dim=1)
    return total / len(queries)


def draw_attention(
    maps: Sequence[Map],
    frames: Tensor,
    input: Input,
    moments: Moments,
    *,
    query: Query,
    each_head: bool,
    title: str,
    seen: str,
) -> np.ndarray:
    """A sheet, uint8 [h, w, 3], of one clip's maps, frames [T, H, W, 3]: a row for each layer, or for each head of it;
    a column for each time slot, or eight of them. seen: which tokens there were, in words."""
    columns = chosen_slots(input)
    if query.cube is not None:
        # the query's time slot is always shown, instead of the nearest
        wanted = query.cube[0] * input.cube[0]
        columns[min(range(len(columns)), key=lambda i: abs(columns[i] - wanted))] = wanted
    headers = [header_of(moments, column) for column in columns]
    clip = frames.numpy()
    originals = [_with_query(fitted(clip[column], *_CELL), column, input, query) for column in columns]
    rows = [Row("original" + ("\n(green: the query's cube)" if query.cube else ""), originals)]
    for one in maps:
        heads = one.shares if each_head else one.shares.mean(dim=0, keepdim=True)
        for number, shares in enumerate(heads, 1):
            rows.append(_row(one, shares, number if each_head else None, clip, columns, input, query))
    rows.append(Row("the colours, from 0\nto the row's brightest", [_scale(originals[0].shape[1])], is_first=True))
    notes = [
        f"Attention weights: the softmax of each layer's queries and keys. {seen}",
        "Brightness: a cube's weight; 1 x even: as if all tokens got the same. Light grey: no token.",
        "Below each picture: how much of all attention goes to this time slot.",
        "It shows which cubes a layer mixes, not what a prediction rests on.",
    ]
    return draw_strip(title, headers, rows, notes)


def _row(
    one: Map, shares: Tensor, head: int | None, clip: np.ndarray, columns: Sequence[int], input: Input, query: Query
) -> Row:
    times = (shares * one.tokens).numpy()
    most = float(np.nanmax(times))
    by_slot = shares.nansum(dim=(1, 2))
    slots = [column // input.cube[0] for column in columns]
    cells = [
        _with_query(fitted(_heated(clip[column], times[slot] / max(most, 1e-12), input), *_CELL), column, input, query)
        for column, slot in zip(columns, slots, strict=True)
    ]
    which = "mean of the heads" if head is None else f"head {head} of {len(one.shares)}"
    asked = "query: the green cube" if query.cube else f"mean over {one.queries:,} queries"
    if query.cube is None and one.layer.part == "decoder":
        asked = f"mean over the {one.queries:,}\nhidden cubes' queries"
    label = f"{one.layer.part} layer {one.layer.number}\n{which}\n{asked}\nbrightest: {most:.1f} x even"
    captions = [f"{100 * float(by_slot[slot]):.1f} %" for slot in slots]
    return Row(label, cells, captions, is_first=head is None or head == 1)


def _colours(heat: np.ndarray) -> np.ndarray:
    """Of numbers from 0 to 1, whose shape gets an axis of three colours, 0 to 255."""
    from matplotlib import colormaps

    return colormaps["inferno"](heat)[..., :3] * 255


def _scale(width: int) -> np.ndarray:
    line = _HEAT * _colours(np.linspace(0, 1, width)) + (1 - _HEAT) * 128
    return np.repeat(line.round().astype(np.uint8)[None], 32, axis=0)


def _heated(frame: np.ndarray, heat: np.ndarray, input: Input) -> np.ndarray:
    """uint8 [H, W, 3]: the frame in grey under colours of heat [H', W'], 0 to 1 or NaN."""
    _, down, across = input.cube
    large = heat.repeat(down, axis=0).repeat(across, axis=1)
    grey = frame.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    mixed = _HEAT * _colours(np.nan_to_num(large)) + (1 - _HEAT) * grey[..., None]
    return np.where(np.isnan(large)[..., None], np.array(_HIDDEN), mixed.round()).astype(np.uint8)


def _with_query(cell: np.ndarray, column: int, input: Input, query: Query) -> np.ndarray:
    """The cell, a line around the query's cube where it is in this time slot."""
    if query.cube is None or query.cube[0] != column // input.cube[0]:
        return cell
    (_, row, place), (_, rows, columns) = query.cube, input.grid
    height, width = cell.shape[:2]
    top, bottom = row * height // rows, (row + 1) * height // rows
    left, right = place * width // columns, (place + 1) * width // columns
    marked = cell.copy()
    marked[top:bottom, left:right] = _QUERY
    inside = np.s_[top + 2 : bottom - 2, left + 2 : right - 2]
    marked[inside] = cell[inside]
    return marked
