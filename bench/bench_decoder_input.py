"""decoder_input: the decoder's sequence from visible tokens, mask token and positions.

pytest bench/bench_decoder_input.py --benchmark-only
"""

import pytest
import torch
from torch import Tensor

import kernels
from bench.compare import Contest, Inputs, Result, Setting, Work, results
from bench.pairs import SIZES, beside_each_other, beside_transformers, on_cpu, on_gpu
from bench.shapes import CPU_CLIPS, Shape, shape_of
from kernels.decoder_input import decoder_input_ref
from videomae.clip import sinusoid_positions


def eager(
    visible: Tensor, mask_token: Tensor, positions: Tensor, visible_index: Tensor, masked_index: Tensor
) -> Tensor:
    return torch.cat((visible + positions[visible_index], mask_token + positions[masked_index]), dim=1)


def contest(shape: Shape, setting: Setting) -> Contest:
    width, item = shape.decoder_width, setting.dtype.itemsize
    seen, hidden, index = (shape.clips * n for n in (shape.num_visible, shape.num_masked, 8 * shape.num_cubes))

    def make(seed: int) -> Inputs:
        generator = torch.Generator(setting.device).manual_seed(seed)
        visible = torch.randn(shape.clips, shape.num_visible, width, generator=generator, device=setting.device)
        token = torch.randn(width, generator=generator, device=setting.device)
        positions = sinusoid_positions(shape.num_cubes, width).to(setting.device, setting.dtype)
        mask = shape.mask(seed, setting.device)
        return {
            "visible": visible.to(setting.dtype).requires_grad_(),
            "mask_token": token.to(setting.dtype).requires_grad_(),
            "positions": positions,
            "visible_index": mask.visible,
            "masked_index": mask.masked,
        }

    work = {
        "forward": Work(seen * width * item + index, (seen + hidden) * width * item),  # reads visible, indices
        "backward": Work((seen + hidden) * width * item, seen * width * item),  # reads dout; writes dvisible
    }
    where = f"B={shape.clips} V={shape.num_visible} M={shape.num_masked} E={width}"
    contenders = {"ours": kernels.decoder_input, "eager": eager}
    return Contest("decoder_input", shape.size, where, make, contenders, decoder_input_ref, work)


def contests(shape: Shape, setting: Setting) -> list[Contest]:
    return [contest(shape, setting)]


def rows(shape: Shape, setting: Setting) -> list[Result]:
    return results(contest(shape, setting), setting)


def as_transformers(visible: Tensor, mask_token: Tensor, table: Tensor, hidden: Tensor, **_: Tensor) -> Tensor:
    """What VideoMAEForPreTraining does between encoder and decoder. table [1, N, E]; hidden: bool [B, N]."""
    rows = table.expand(len(visible), -1, -1).type_as(visible).detach().to(visible.device, copy=True)
    seen = rows[~hidden].reshape(visible.shape)
    masked = rows[hidden].reshape(len(visible), -1, visible.shape[-1])
    return torch.cat((visible + seen, mask_token[None, None] + masked), dim=1)


@on_cpu
@pytest.mark.benchmark(group="decoder_input")
def test_decoder_input_beside_transformers(benchmark, capsys):
    shape = shape_of("vit_base", CPU_CLIPS)
    one = contest(shape, Setting.cpu())
    inputs = one.make(0)
    extra = {"table": inputs["positions"][None], "hidden": shape.mask(0, Setting.cpu().device).to_bool()}
    beside_transformers(benchmark, capsys, one, lambda **named: as_transformers(**named, **extra), inputs)


@on_gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="decoder_input")
def test_decoder_input_beside_pytorch(benchmark, capsys, size):
    beside_each_other(benchmark, capsys, contests(shape_of(size), Setting.gpu()))
