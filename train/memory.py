"""How much memory a training step takes at its peak, before it is run: which tensors live when, by formula.

Counted are weights, optimiser, gradients and every activation that forward keeps, at each of the moments where the peak
can be: the end of the model's forward, the loss, the backward pass of every MLP (the widest place of a block), the end
of backward. Held against what fake tensors allocate (tests/train/test_memory.py). Not counted: the CUDA context,
workspaces of libraries, the allocator's rounding; together they stay below a tenth on a full GPU. A CPU runs the
references, which take up to a fifth more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from videomae.blocks import Recompute
from videomae.masking import Counts
from videomae.model import Input, Size

# numbers kept for backward per token, in widths of the block: input of the first norm, its output, qkv, attention's
# output, input of the second norm, its output, the MLP's hidden layer before and after GELU
_INPUT, _NORMED, _QKV, _MIXED, _SUM, _NORMED2, _HIDDEN, _ACTIVE = 1, 1, 3, 1, 1, 1, 4, 4
# and in the backward pass of GELU: the gradients of the residual stream, of GELU's output and input
_GRADIENTS = 1 + 4 + 4


@dataclass(frozen=True)
class Workload:
    """A micro-batch's step. bytes_each: of an activation, 4 in float32 and 2 under autocast. A classifier has no
    decoder: depth 0, nothing decoded or predicted."""

    size: Size
    input: Input
    counts: Counts
    decoder_depth: int
    num_parameters: int
    recompute: Recompute = "none"
    bytes_each: int = 2
    accumulates: bool = False  # gradients of earlier micro-batches lie in memory from the start
    short_last_layer: bool = True  # of the decoder
    inputs_held: int = 1  # micro-batches of uint8 pixels on the device: the one in use, and those that wait
    normalized_held: int = 0  # and of pixels that were normalised before the model, into float32
    averages: bool = False  # an average of the weights lies beside them
    spread_over: int = 0  # processes that weights, gradients and moments are spread over; 0: each has all of them


@dataclass(frozen=True)
class _Layer:
    """A block: tokens that attend, those of its MLP (fewer in the decoder's last), width, heads."""

    tokens: int
    narrowed: int
    width: int
    heads: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int  # float32 parameters, two moments, their average; copies in the activations' dtype, always whole
    gradients: int
    activations: int  # everything else: what grows with the micro-batch

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.activations


def estimate(work: Workload, micro_batch: int) -> Memory:
    """The step's memory with that many clips at a time."""
    resting, gradients = _resting(work), 4 * work.num_parameters
    copies = work.bytes_each * work.num_parameters if work.bytes_each < 4 else 0
    weights = resting + int(_copied_share(work.recompute) * copies)
    frames = (
        (work.inputs_held + 4 * work.normalized_held)
        * micro_batch
        * work.input.frames
        * work.input.size[0]
        * work.input.size[1]
        * len(work.input.mean)
    )
    # backward passes through the last layers, where the peak is, before most gradients exist
    moments = [
        Memory(weights, gradients if work.accumulates else 0, frames + micro_batch * live) for live in _moments(work)
    ]
    # autocast keeps every copy until the model's forward ends, whoever makes them anew later; at the end none is left
    forward = frames + micro_batch * _forward_end(work)
    moments.append(Memory(resting + copies, gradients if work.accumulates else 0, forward))
    # micro-batches add up whole gradients; otherwise a block's are spread once they are there
    moments.append(Memory(resting, gradients if work.accumulates else gradients // max(work.spread_over, 1), frames))
    return max(moments, key=lambda memory: memory.peak)


def largest_micro_batch(work: Workload, budget: int, limit: int = 1 << 16) -> int:
    """The most clips at a time whose step takes at most budget bytes; 0 when not even one does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if estimate(work, middle).peak <= budget else (low, middle - 1)
    return low


def _resting(work: Workload) -> int:
    """Bytes that a step finds: parameters, two moments, their average. Of spread ones a share, but for the whole model
    that the first process keeps to look at, and two blocks' parameters at a time that are brought together."""
    whole = (16 if work.averages else 12) * work.num_parameters
    if work.spread_over == 0:
        return whole
    widest = 12 * max(work.size.width, work.size.decoder_width) ** 2
    return -(-whole // work.spread_over) + 4 * work.num_parameters + 2 * 4 * widest


def _copied_share(recompute: Recompute) -> float:
    """Of the weights, how many have a copy that lives until backward: a recomputed block or MLP makes its own anew."""
    return {"none": 1.0, "norms": 1.0, "mlp": 1 / 3, "block": 0.0}[recompute]


def _layers(work: Workload) -> list[_Layer]:
    size, counts = work.size, work.counts
    tokens = counts.visible + counts.decoded
    encoder = [_Layer(counts.visible, counts.visible, size.width, size.heads)] * size.depth
    if work.decoder_depth == 0:
        return encoder
    decoder = [_Layer(tokens, tokens, size.decoder_width, size.decoder_heads)] * (work.decoder_depth - 1)
    narrowed = counts.predicted if work.short_last_layer else tokens
    return [*encoder, *decoder, _Layer(tokens, narrowed, size.decoder_width, size.decoder_heads)]


def _kept(layer: _Layer, recompute: Recompute, each: int) -> int:
    """Bytes of one clip that a block keeps from its forward to its backward pass."""
    if recompute == "block":
        return layer.tokens * layer.width * _INPUT * each
    norms = recompute != "norms"
    whole = _INPUT + _QKV + (_NORMED if norms else 0)
    narrowed = _MIXED + _SUM + (_NORMED2 if norms else 0)
    narrowed += {"none": _HIDDEN + _ACTIVE, "norms": _HIDDEN, "mlp": 0}[recompute]
    # float32: mean and deviation of both norms, logarithms of attention's sums
    statistics = 4 * (2 * layer.tokens + (2 + layer.heads) * layer.narrowed)
    return (layer.tokens * whole + layer.narrowed * narrowed) * layer.width * each + statistics


def _backward(layer: _Layer, recompute: Recompute, each: int) -> int:
    """Bytes beside what was kept when GELU's gradient is computed: what was made anew for it, and gradients."""
    anew = {"none": -_ACTIVE, "norms": 0, "mlp": _HIDDEN, "block": _HIDDEN}[recompute]
    extra = (anew + _GRADIENTS) * layer.narrowed
    if recompute == "block":
        extra += (_NORMED + _QKV) * layer.tokens + (_MIXED + _SUM + _NORMED2) * layer.narrowed
    return extra * layer.width * each


def _all_kept(work: Workload) -> list[int]:
    return [_kept(layer, work.recompute, work.bytes_each) for layer in _layers(work)]


def _final_norms(work: Workload) -> tuple[int, int]:
    """Bytes of one clip: input and output of the encoder's and of the decoder's last norm."""
    size, counts, each = work.size, work.counts, work.bytes_each
    return 2 * counts.visible * size.width * each, 2 * counts.predicted * size.decoder_width * each


def _prediction(work: Workload) -> int:
    return work.counts.predicted * work.input.cube_values * work.bytes_each


def _forward_end(work: Workload) -> int:
    """Bytes of one clip's activations when the prediction is made."""
    return sum(_all_kept(work)) + sum(_final_norms(work)) + _prediction(work)


def _moments(work: Workload) -> Iterator[int]:
    """Bytes of one clip's activations, at the loss and in every block's backward pass."""
    # the loss's gradient is written while the prediction is read
    yield _forward_end(work) + _prediction(work)
    kept, (encoder_norm, _) = _all_kept(work), _final_norms(work)
    for i, layer in enumerate(_layers(work)):
        norms = encoder_norm if i >= work.size.depth else 0
        yield sum(kept[: i + 1]) + norms + _backward(layer, work.recompute, work.bytes_each)
