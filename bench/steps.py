"""One training step of every side, on the same batch: `ours`, `transformers`, `published`.

All keep float32 weights (but `pure`, see `transformers_step`), take a fused AdamW with the same groups and rate, run
matrix products in the autocast dtype, and begin with a batch that lies on the device: for ours uint8 frames and the
clips' mask keys, from which the step draws its masks; for the others a boolean mask and the float video, made
beforehand on the CPU and not part of the step. The losses are the same.

A step runs on a GPU, on a CPU (without autocast, to compare values) and on fake tensors (`bench.traffic`).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.published import published_loss, to_video
from bench.shapes import CHANNELS, Shape
from train.engine import EngineName, make_engine
from train.objective import PretrainObjective
from train.optim import PRECISIONS, Optim, Schedule, Updater, parameter_groups
from videomae import masking
from videomae.blocks import NORM_EPS, Recompute, set_attention, set_recompute
from videomae.hugging_face import from_official
from videomae.model import SIZES, VideoMAE, pretrain_model

# of the published recipes (RECIPES A.4)
DECODER_DEPTHS = {"vit_tiny": 2, "vit_small": 4, "vit_base": 4, "vit_large": 12, "vit_huge": 12}
RATE = 1e-4
OPTIM = Optim()


@dataclass(frozen=True)
class Step:
    """run() does one step and gives its loss, detached.

    batch: what arrives on the device for every step. parts: modules, the part of the step that each one's forward is,
    and the part that follows it where one does. hidden: the boolean mask of sides that index with one, num_hidden of it
    True = masked.
    """

    model: nn.Module
    run: Callable[[], Tensor]
    batch: tuple[Tensor, ...]
    parts: tuple[tuple[nn.Module, str, str | None], ...] = ()
    hidden: Tensor | None = None
    num_hidden: int = 0


def model_of(shape: Shape, decoder_depth: int | None = None) -> VideoMAE:
    """Our model of that shape, freshly initialised; its recipe's decoder depth where none is given."""
    depth = DECODER_DEPTHS[shape.size] if decoder_depth is None else decoder_depth
    return pretrain_model(shape.size, frames=shape.frames, image_size=shape.side, decoder_depth=depth)


def our_step(
    shape: Shape,
    device: torch.device,
    autocast: torch.dtype | None = None,
    weights: VideoMAE | None = None,
    *,
    engine: EngineName = "eager",
    recompute: Recompute = "none",
    attention: str = "auto",
) -> Step:
    """What a user runs, by that engine: masks from keys, loss, backward, and the updater with its gradient norm and its
    check that loss and gradients are finite."""
    model = _ours(shape, device, weights)
    set_recompute(model, recompute)
    set_attention(model, attention)
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == autocast)
    updater = Updater(model, OPTIM, Schedule(RATE, RATE, 0, 1), precision, device)
    runner = make_engine(engine, PretrainObjective(model, mask_ratio=shape.ratio, autocast=autocast), updater)
    frames, keys = (x.to(device) for x in clips_and_keys(shape))
    inputs = {"frames": frames, "keys": keys}
    if runner.fixed:  # as the training loop does
        inputs["weight"] = torch.ones(shape.clips, device=device)

    def run() -> Tensor:
        runner.micro_batch(inputs, 1.0)
        return runner.update(0)[0]

    parts = (
        (model, "decoder", "loss"),
        (model.encoder, "embedding", None),
        (model.encoder.blocks, "encoder", None),
    )
    return Step(model, run, (frames, keys), parts)


def transformers_step(
    shape: Shape,
    device: torch.device,
    autocast: torch.dtype | None = None,
    weights: VideoMAE | None = None,
    *,
    pure: torch.dtype | None = None,
    backend: str | None = None,
) -> Step:
    """`transformers`' VideoMAEForPreTraining with torch's scaled_dot_product_attention; pure: a dtype that weights,
    video and optimiser state have instead of float32; backend: torch.compile's, which then runs the model. Needs
    transformers."""
    model = _theirs(shape, device, _ours(shape, device, weights), pure)
    call = model if backend is None else torch.compile(model, backend=backend)
    optimizer = _adamw(model)
    frames, keys = clips_and_keys(shape)
    video = to_video(frames).transpose(1, 2).contiguous().to(device, pure)  # [B, T, 3, H, W]
    hidden = masking.tube(shape.grid, shape.ratio, keys=keys).to_bool().to(device)

    def run() -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss = call(pixel_values=video, bool_masked_pos=hidden).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    parts = (
        (model, "decoder", None),
        (model.videomae, "encoder", None),
        (model.videomae.embeddings, "embedding", None),
        (model.decoder, "decoder", "loss"),
    )
    return Step(model, run, (video, hidden), parts, hidden, shape.clips * shape.num_masked)


def published_step(
    shape: Shape, device: torch.device, autocast: torch.dtype | None = None, weights: VideoMAE | None = None
) -> Step:
    """`bench.published`: our weights, the official way; with float16 a gradient scaler."""
    model = _ours(shape, device, weights)
    optimizer = _adamw(model)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    frames, keys = clips_and_keys(shape)
    video = to_video(frames).to(device)
    hidden = masking.tube(shape.grid, shape.ratio, keys=keys).to_bool().to(device)

    def run() -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss = published_loss(model, video, hidden)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Step(model, run, (video, hidden), (), hidden, shape.clips * shape.num_masked)


def clips_and_keys(shape: Shape) -> tuple[Tensor, Tensor]:
    """The batch of every side: uint8 [B, T, H, W, 3] of noise, int64 [B]; on the CPU."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape.clips, shape.frames, shape.side, shape.side, CHANNELS)
    frames = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=generator)
    return frames, torch.arange(shape.clips)


def _ours(shape: Shape, device: torch.device, weights: VideoMAE | None) -> VideoMAE:
    """A model of its own for every side, with these weights or random ones."""
    with device:
        if weights is None:
            return model_of(shape)
        model = model_of(shape, len(weights.decoder.blocks))
    model.load_state_dict(weights.state_dict())
    return model


def _theirs(shape: Shape, device: torch.device, ours: VideoMAE, dtype: torch.dtype | None) -> Any:
    import transformers

    size = SIZES[shape.size]
    config = transformers.VideoMAEConfig(
        image_size=shape.side,
        num_frames=shape.frames,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=size.decoder_width,
        decoder_num_hidden_layers=len(ours.decoder.blocks),
        decoder_num_attention_heads=size.decoder_heads,
        decoder_intermediate_size=4 * size.decoder_width,
        use_mean_pooling=False,
        layer_norm_eps=NORM_EPS,
        attn_implementation="sdpa",
    )
    with device:
        model = transformers.VideoMAEForPreTraining._from_config(config, dtype=dtype or torch.float32)
    model.decoder.norm.eps = NORM_EPS  # which the config does not reach
    model.load_state_dict(from_official(ours.state_dict()))
    return model.train()


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimiser of our updater, for another side."""
    groups = parameter_groups(model, OPTIM.weight_decay)
    return torch.optim.AdamW(groups, lr=RATE, betas=OPTIM.betas, eps=OPTIM.eps, fused=True)


class Parts:
    """Which part of a step an op belongs to: what runs forward now, or did when the backward node was made.

    First comes the part `batch`, the masks' drawing included; what follows the backward pass is the optimiser.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._stack = ["batch"]
        self._starts, self._names = [0], ["batch"]
        self._last = "batch"

    @contextmanager
    def during(self, module: nn.Module, inside: str, after: str | None) -> Iterator[None]:
        """Inside, the module's forward is the part `inside`, and what follows it the part `after`."""

        def leave(*_: Any) -> None:
            self.leave()
            if after is not None:
                self._stack[-1] = after
                self._mark()

        hooks = [
            module.register_forward_pre_hook(lambda *_: self.enter(inside)),
            module.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, part: str) -> None:
        self._stack.append(part)
        self._mark()

    def leave(self) -> None:
        if len(self._stack) > 1:
            self._stack.pop()
        self._mark()

    def see(self, func: Any, args: tuple) -> None:
        """Follow torch.profiler.record_function, whose name may be that of a part."""
        if func is torch.ops.profiler._record_function_enter_new.default:
            if args[0].startswith("part: "):  # and so is what comes after it, up to the next
                self._stack[-1] = args[0].removeprefix("part: ")
            self.enter(self._stack[-1])
        elif func is torch.ops.profiler._record_function_exit._RecordFunction:
            self.leave()

    def now(self) -> tuple[str, bool]:
        """The part, and whether this is the backward pass."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._stack[-1], False
        self._stack = ["optimiser"]
        number = node._sequence_nr()
        if number < 1 << 63:  # nodes that store a leaf's gradient have no number of their own
            self._last = self._names[bisect_right(self._starts, number) - 1]
        return self._last, True

    def _mark(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._names.append(self._stack[-1])
