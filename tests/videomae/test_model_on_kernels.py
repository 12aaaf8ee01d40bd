"""The whole model by its kernels gives what it gives by the references: prediction, loss, every gradient."""

import pytest
import torch

import kernels
import videomae
from kernels import launch
from videomae import masking
from videomae.blocks import RECOMPUTE, set_recompute

# 4 x 32 x 32, cubes of 2 x 8 x 8: 32 cubes, of which 24 are hidden
SIZES = {"frames": 4, "image_size": 32, "cube": (2, 8, 8)}


def by_references(monkeypatch):
    monkeypatch.setattr(launch, "_interpret", False)


def losses(model, frames, mask, labels=None):
    model.zero_grad()
    if labels is None:
        out = model(frames, mask)
        loss = kernels.pixel_loss(out, frames, mask.masked, cube=SIZES["cube"])
    else:
        out = model(frames)
        loss = torch.nn.functional.cross_entropy(out, labels)
    loss.backward()
    return {"out": out.detach(), "loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(got, wanted):
    for name, truth in wanted.items():
        # the reference on a CPU and the kernel sum in another order
        torch.testing.assert_close(got[name].cpu(), truth.cpu(), atol=2e-5 * truth.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("recompute", ["none", *(pytest.param(name, marks=pytest.mark.long) for name in RECOMPUTE[1:])])
def test_pretraining(recompute, kernel_device, monkeypatch):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", decoder_depth=2, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, where errors would hide
            parameter.add_(torch.randn_like(parameter) * 0.02)
    set_recompute(model, recompute)
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mask = masking.tube((2, 4, 4), 0.75, keys=torch.arange(2))
    got = losses(model.to(kernel_device), frames.to(kernel_device), mask.to(kernel_device))
    by_references(monkeypatch)
    assert_same(got, losses(model.cpu(), frames, mask))


def test_classification(kernel_device, monkeypatch):
    torch.manual_seed(0)
    model = videomae.classifier("vit_tiny", num_classes=5, drop_path=0.0, init_scale=1.0, **SIZES)
    frames, labels = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8), torch.tensor([1, 4])
    got = losses(model.to(kernel_device), frames.to(kernel_device), None, labels.to(kernel_device))
    by_references(monkeypatch)
    assert_same(got, losses(model.cpu(), frames, None, labels))


def test_every_op_of_a_pretraining_step_runs_its_kernel(kernel_device, monkeypatch):
    started = []
    start = launch.launch
    for op in ("cube_embed", "decoder_input", "pixel_loss", "layer_norm", "bias_gelu"):
        module = __import__(f"kernels.{op}", fromlist=[op])

        def listed(kernel, *arguments, op=op, **options):
            started.append(op)
            return start(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", listed)
    model = videomae.pretrain_model("vit_tiny", decoder_depth=1, **SIZES).to(kernel_device)
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, device=kernel_device)
    losses(model, frames, masking.tube((2, 4, 4), 0.75, keys=torch.arange(1)).to(kernel_device))
    # two encoder blocks, one decoder block, two final norms; forward and backward
    counts = {op: started.count(op) for op in set(started)}
    assert counts == {"cube_embed": 4, "decoder_input": 2, "pixel_loss": 2, "layer_norm": 16, "bias_gelu": 6}


def test_the_second_norm_adds_the_bias_of_attention(kernel_device, monkeypatch):
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=32, decoder_depth=1).to(kernel_device)
    added, layer_norm = [], kernels.layer_norm

    def listed(x, residual, weight, bias, eps, x_bias=None):
        added.append(x_bias)
        return layer_norm(x, residual, weight, bias, eps, x_bias)

    monkeypatch.setattr(kernels, "layer_norm", listed)
    mask = masking.random(model.input.grid, 0.5, keys=torch.arange(2)).to(kernel_device)
    model(torch.zeros(2, 4, 32, 32, 3, dtype=torch.uint8, device=kernel_device), mask)
    biases = [p for name, p in model.named_parameters() if name.endswith("attn.proj.bias")]
    assert {id(bias) for bias in added if bias is not None} == {id(bias) for bias in biases}


def test_no_weight_of_a_block_is_needed_once_it_is_done(kernel_device):
    """As when blocks are sharded or moved away one by one: what a block gives holds all its biases."""
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=32, decoder_depth=2).to(kernel_device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, device=kernel_device)
    mask = masking.random(model.input.grid, 0.5, keys=torch.arange(2)).to(kernel_device)
    with torch.no_grad():
        wanted = model(frames, mask)
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.register_forward_hook(lambda block, *_: [p.fill_(float("nan")) for p in block.parameters()] and None)
        assert torch.equal(model(frames, mask), wanted)


def test_a_linear_layer_that_was_replaced_or_hooked_is_called(kernel_device):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=32, decoder_depth=1)
    block = model.encoder.blocks[0].to(kernel_device)
    x, called = torch.randn(2, 5, 64, device=kernel_device), []
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.register_forward_hook(lambda *_: called.append(1))
    block(x, None)
    assert len(called) == 3
    block.mlp.fc1 = Doubled(64, 256).to(kernel_device)
    torch.testing.assert_close(block.mlp(x), block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(x))))
