"""The table of kernels, from made-up events and from a real profile of a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import step_profile
from bench.step_profile import kernels_of, kind_of, page, profiled


def kernel(name, us, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=span, is_user_annotation=annotation)


def op(name, *kernels):
    started = [SimpleNamespace(name=kernel_name, duration=us) for kernel_name, us in kernels]
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, kernels=started)


ALONE = [kernel("_forward_kernel", 3.0), kernel("nvjet_tst", 10.0), kernel("_forward_kernel", 4.0)]
ALONE.append(kernel("Optimizer.step#AdamW.step", 99.0, annotation=True))


def test_kernels_are_added_up_by_the_op_that_started_them():
    ops = [op("videomae::layer_norm", ("_forward_kernel", 3.0)), op("aten::mm", ("nvjet_tst", 10.0))]
    ops += [op("videomae::bias_gelu", ("_forward_kernel", 4.0)), op("aten::view")]
    assert kernels_of(ALONE + ops) == {
        "aten::mm: nvjet_tst": [1, 10.0],
        "videomae::bias_gelu: _forward_kernel": [1, 4.0],
        "videomae::layer_norm: _forward_kernel": [1, 3.0],
    }
    assert list(kernels_of(ALONE + ops))[0] == "aten::mm: nvjet_tst"


def test_a_graph_s_kernels_which_no_op_started_go_by_their_names():
    assert kernels_of([*ALONE, op("cudaGraphLaunch")]) == {"nvjet_tst": [1, 10.0], "_forward_kernel": [2, 7.0]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm: nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix products"),
        ("aten::mm: void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("videomae::attention: _forward_kernel", "attention"),
        ("videomae::layer_norm_backward: _backward_kernel", "ours"),
        ("_backward_kernel", "ours"),
        ("aten::_fused_adamw_: void at::native::multi_tensor_apply_kernel", "optimiser"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("aten::add: void at::native::vectorized_elementwise_kernel", "others"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_the_page_has_kinds_and_kernels():
    lines = page("Engine eager", kernels_of(ALONE), clips=2)
    assert "0.02 ms of kernels for 2 clips." in lines
    assert "| matrix products | 1 | 10 | 5.00 | 58.8% |" in lines
    assert "| ours | 2 | 7 | 3.50 | 41.2% |" in lines
    assert "| `_forward_kernel` | 2 | 7 | 3.50 | 41.2% |" in lines
    assert "No kernel ran on a device." in page("Engine eager", {}, clips=2)


def test_a_profile_of_a_cpu_has_its_ops_and_no_kernels():
    events = profiled(lambda: torch.ones(4) @ torch.ones(4), torch.device("cpu"))
    assert "aten::dot" in {event.name for event in events}
    assert kernels_of(events) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert step_profile.main([str(tmp_path / "profile.md")]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
