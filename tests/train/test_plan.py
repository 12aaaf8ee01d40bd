"""How a batch is cut into micro-batches, and whether the memory estimate deserves its name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.plan import available_cpus, clip_bytes, free_memory, pick_device, plan_batch
from videomae.model import SIZES, Input


def test_takes_the_whole_batch_when_it_fits():
    plan = plan_batch(256, per_clip=10, fixed=0, free=10_000)
    assert (plan.micro_batch, plan.accumulation) == (256, 1)


@pytest.mark.parametrize(
    ("clips", "most", "micro"), [(2048, 100, 64), (192, 50, 48), (7, 3, 1), (12, 5, 4), (1024, 1, 1), (1024, 0, 1)]
)
def test_accumulates_in_equal_parts_that_fit(clips, most, micro):
    plan = plan_batch(clips, per_clip=1000, fixed=500, free=2 * (500 + most * 1000))
    assert (plan.micro_batch, plan.accumulation) == (micro, clips // micro)


def test_takes_a_micro_batch_by_hand_and_refuses_one_that_does_not_divide():
    assert plan_batch(12, per_clip=1, fixed=0, free=0, micro_batch=3).accumulation == 4
    with pytest.raises(ValueError, match="micro-batch 5 does not divide a step's 12 clips"):
        plan_batch(12, per_clip=1, fixed=0, free=0, micro_batch=5)


def test_estimates_what_a_step_keeps(tmp_path):
    """Saved tensors of ViT-S, counted by autograd's own hooks: within a third of the estimate."""
    import kernels
    import videomae
    from videomae import masking

    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_small", frames=8, image_size=112)
    frames = torch.randint(0, 256, (2, 8, 112, 112, 3), dtype=torch.uint8)
    mask = masking.tube(model.input.grid, 0.9, keys=torch.arange(2))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = kernels.pixel_loss(model(frames, mask), frames, mask.masked)
        estimate = 2 * clip_bytes(
            SIZES["vit_small"],
            model.input,
            num_masked=mask.masked.shape[1],
            decoder_depth=4,
            recompute=False,
            bytes_each=4,
        )
        assert loss.requires_grad
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.33)


def test_recomputing_needs_less():
    sizes = {"num_masked": 1408, "decoder_depth": 12, "bytes_each": 2}
    plain, recomputed = (clip_bytes(SIZES["vit_huge"], Input(), recompute=r, **sizes) for r in (False, True))
    assert recomputed < plain / 5


def test_refuses_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pick_device(None).type == "cpu"
    with pytest.raises(ValueError, match="no GPU"):
        pick_device("cuda")


def test_sees_this_process_cores_and_memory():
    assert available_cpus() >= 1
    assert 2**28 < free_memory(torch.device("cpu")) < 2**46
    if Path("/usr/bin/taskset").exists():
        code = "from train.plan import available_cpus; print(available_cpus())"
        out = subprocess.run(
            ["taskset", "-c", "0", sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == "1"
