"""Every back end that is usable here against the reference, the others through stand-ins; which is chosen, and why."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import tiles
from kernels.attention import attention_ref
from kernels.tiles import Target
from tests.kernels.harness import assert_works_compiled, values_and_gradients
from tests.tolerance import assert_as_good_as_torch
from tests.videomae.attention_packages import installed, stand_in
from videomae import attention
from videomae.attention import BACKENDS, Choice, attend, choose

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = torch.device("cuda", 0)
H200, T4, A100 = Target("NVIDIA H200", 90, 132), Target("Tesla T4", 75, 40), Target("NVIDIA A100", 80, 108)
PACKAGES = ("flash-attn", "flash-attn-4", "xformers")


@pytest.fixture(autouse=True)
def forget():
    """Choices and the table are remembered; what another test assumed must not be."""
    remembered = (attention._decide, attention.table)
    for one in remembered:
        one.cache_clear()
    yield
    for one in remembered:
        one.cache_clear()


def qkv_of(shape=(2, 37, 2, 64), dtype=torch.float32, device=DEVICE):
    batch, length, heads, width = shape
    torch.manual_seed(0)
    return (torch.randn(batch, length, 3, heads, width) * 1.5).to(device, dtype)


def tail(full, last):
    return full if last is None else full[:, -last:]


def plain(qkv):
    """PyTorch, written out, at qkv's own dtype."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def assert_is_attention(function, qkv, last):
    """Values and gradient as near the float64 reference as twice what PyTorch errs at qkv's dtype."""
    upstream = torch.randn(tail(plain(qkv), last).shape).to(qkv)
    got = values_and_gradients(lambda x: function(x, last), [qkv.clone().requires_grad_()], [upstream])
    wide = [qkv.double().requires_grad_()]
    truth = values_and_gradients(lambda x: tail(attention_ref(x), last), wide, [upstream.double()])
    same = values_and_gradients(lambda x: tail(plain(x), last), [qkv.clone().requires_grad_()], [upstream])
    for g, t, s in zip(got, truth, same, strict=True):
        assert g.shape == t.shape
        assert_as_good_as_torch(g, t, s)


# odd lengths, more and fewer than a block of 64; heads of every size but H, and of H
SHAPES = [(2, 37, 2, 64), (1, 129, 3, 80)]


@pytest.mark.parametrize("last", [None, 1, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["64 wide", "80 wide"])
@pytest.mark.parametrize("name", BACKENDS)
def test_it_is_attention(name, shape, dtype, last):
    refusal = BACKENDS[name].refusal(torch.device(DEVICE), dtype, shape[1], shape[3])
    if refusal:
        pytest.skip(f"{name} {refusal}")
    assert_is_attention(lambda x, last: attend(x, name, last), qkv_of(shape, dtype), last)


def test_auto_is_attention_too():
    assert_is_attention(lambda x, last: attend(x, last=last), qkv_of(), 37)


class Listing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_gradients_of_q_k_and_v_are_joined_in_one_copy():
    qkv = qkv_of((2, 5, 2, 8)).requires_grad_()
    parts = attention._split(qkv, None, None)
    upstreams = [torch.randn_like(part) for part in parts]
    with Listing() as listing:
        (gradient,) = torch.autograd.grad(parts, qkv, upstreams)
    assert torch.equal(gradient, torch.stack(upstreams, 2))
    assert set(listing.ops) <= {"stack", "cat", "view", "_unsafe_view", "detach"}
    assert sum(op in ("stack", "cat") for op in listing.ops) == 1


@pytest.mark.parametrize("last", [None, 4])
@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_the_bias_that_qkv_holds_gets_its_gradient(name, last):
    # float64, which kernels refuse, and both take on a CPU: by their references
    qkv = qkv_of((2, 11, 2, 8), device="cpu").double().requires_grad_()
    bias = torch.randn(48, dtype=torch.float64).requires_grad_()
    attached = attention.attend(qkv + bias.view(3, 2, 8), name, last)
    detached = attention.attend(qkv + bias.detach().view(3, 2, 8), name, last, bias)
    assert torch.equal(attached, detached)
    upstream = torch.randn_like(attached)
    for one, other in zip(
        *(torch.autograd.grad(out, (qkv, bias), upstream) for out in (attached, detached)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("last", [None, 1, 11])
@pytest.mark.parametrize("shape", SHAPES, ids=["64 wide", "80 wide"])
@pytest.mark.parametrize("name", PACKAGES)
def test_the_adapter_calls_a_stand_in_by_its_real_signature(name, shape, last, monkeypatch):
    stand_in(monkeypatch, name)
    assert_is_attention(lambda x, last: attend(x, name, last), qkv_of(shape, device="cpu"), last)


@pytest.mark.parametrize("last", [None, 11])
@pytest.mark.parametrize("name", PACKAGES)
def test_the_adapter_compiles_around_a_stand_in(name, last, monkeypatch):
    stand_in(monkeypatch, name)
    upstream = torch.randn(2, last or 37, 128)
    assert_works_compiled(lambda x: attend(x, name, last), (qkv_of(device="cpu"),), (upstream,))


def test_deterministic_algorithms_are_asked_of_a_stand_in(monkeypatch):
    """The stand-ins compare what they are told with what torch was told."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for name in ("flash-attn", "flash-attn-4"):
        stand_in(monkeypatch, name)
        for last in (None, 3):
            qkv, upstream = qkv_of(device="cpu").requires_grad_(), torch.randn(2, last or 37, 128)
            got = values_and_gradients(lambda x, name=name, last=last: attend(x, name, last), [qkv], [upstream])
            wanted = values_and_gradients(lambda x, last=last: attend(x, "sdpa", last), [qkv], [upstream])
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_adapter_of_flash_attn_4_is_registered_as_torch_wants_it(monkeypatch):
    stand_in(monkeypatch, "flash-attn-4")
    q, k, v = (x.detach().requires_grad_() for x in qkv_of((1, 5, 2, 16), device="cpu").unbind(2))
    torch.library.opcheck(attention._cute_forward_op, (q[:, -3:], k, v))


@pytest.mark.parametrize("name", ["sdpa", "triton"])
@pytest.mark.parametrize("last", [None, 11])
def test_it_compiles_in_one_piece(name, last):
    assert_works_compiled(lambda x: attend(x, name, last), (qkv_of(),), (torch.randn(2, last or 37, 128),))


@pytest.mark.parametrize("last", [None, 11])
def test_a_pinned_backend_compiles_in_one_piece(last):
    """PyTorch has a flash attention for CPUs too, which attend refuses."""
    run, upstream = BACKENDS["sdpa-flash"].run, torch.randn(2, last or 37, 128)
    assert_works_compiled(lambda x: run(x, last, None), (qkv_of(device="cpu"),), (upstream,))


class Layer(nn.Linear):
    backend = "auto"

    def forward(self, x, last=None):
        return attend(super().forward(x).view(*x.shape[:2], 3, 2, 16), self.backend, last)


@pytest.mark.parametrize("dynamic", [None, True])
def test_inside_a_module_the_choice_is_a_constant(dynamic, monkeypatch):
    asked = []
    decide = attention._decide
    monkeypatch.setattr(attention, "_decide", lambda *question: asked.append(question) or decide(*question))
    torch._dynamo.reset()
    layer, graphs = Layer(32, 96), []
    compiled = torch.compile(
        layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=dynamic
    )
    for batch in (2, 3, 4):
        x = torch.randn(batch, 7, 32)
        torch.testing.assert_close(compiled(x, 3), layer(x, 3))
    assert len(graphs) <= 2  # the second for any batch
    assert len(asked) == len(graphs) + 3  # once each, and without torch.compile each time
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(compiled(x, 3), layer(x, 3))  # another length is traced anew
    assert asked[-1][3] == 9


def test_a_refusal_comes_through_torch_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: attend(x, "flash-attn"), backend="eager")
    with pytest.raises(ValueError, match="attention by flash-attn: it"):
        compiled(qkv_of(device="cpu"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("last", [None, 11])
@pytest.mark.parametrize("name", BACKENDS)
def test_on_a_gpu_it_compiles_and_can_be_captured(name, last):
    """Within rounding: the sums of some back ends have no fixed order."""
    refusal = BACKENDS[name].refusal(torch.device(DEVICE), torch.bfloat16, 160, 64)
    if refusal:
        pytest.skip(f"{name} {refusal}")
    qkv, upstream = qkv_of((2, 160, 3, 64), torch.bfloat16).requires_grad_(), torch.randn(2, last or 160, 192)
    function, upstream = partial(attend, backend=name, last=last), upstream.to(qkv)
    eager = values_and_gradients(function, [qkv], [upstream])
    compiled = values_and_gradients(torch.compile(function, fullgraph=True), [qkv], [upstream])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values_and_gradients(function, [qkv], [upstream])
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    for one, other, third in zip(eager, compiled, captured, strict=True):
        atol = 2 * torch.finfo(one.dtype).eps * one.abs().max().item()
        torch.testing.assert_close(other, one, rtol=0, atol=atol)
        torch.testing.assert_close(third, one, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("shape", "backend", "last", "says"),
    [
        ((2, 5, 96), "auto", None, r"qkv must be \[B, L, 3, A, d\]; got shape \(2, 5, 96\)"),
        ((2, 5, 2, 1, 16), "auto", None, r"got shape \(2, 5, 2, 1, 16\)"),
        ((2, 5, 3, 1, 16), "auto", 0, "last must be 1 to 5 tokens; got 0"),
        ((2, 5, 3, 1, 16), "sdpa", 6, "last must be 1 to 5 tokens; got 6"),
        ((2, 5, 3, 1, 16), "flash", None, "must be auto, flash-attn, flash-attn-4, xformers, .*; got 'flash'"),
        ((2, 5, 3, 1, 16), "xformers", None, "attention by xformers: it needs a CUDA GPU; the tensors are on cpu"),
        ((2, 5, 3, 1, 129), "triton", None, "attention by triton: it takes heads up to 128 wide, not 129"),
    ],
)
def test_attend_refuses(shape, backend, last, says):
    with pytest.raises(ValueError, match=says):
        attend(torch.zeros(shape), backend, last)


def ask(wanted="auto", device=CUDA, dtype=torch.bfloat16, length=160, head_width=64):
    return choose(wanted, device=device, dtype=dtype, length=length, head_width=head_width)


@pytest.mark.parametrize(
    ("target", "wanted", "more", "says"),
    [
        (T4, "triton", {}, "triton: it needs sm_80 or newer; this GPU is sm_75"),
        (T4, "sdpa-flash", {}, "needs sm_80"),
        (A100, "flash-attn-4", {}, "needs sm_90 or newer; this GPU is sm_80"),
        (H200, "flash-attn", {"dtype": torch.float32}, "takes bfloat16 and float16, not float32"),
        (H200, "triton", {"dtype": torch.float64}, "takes bfloat16 and float16 and float32, not float64"),
        (H200, "flash-attn", {"head_width": 257}, "takes heads up to 256 wide, not 257"),
        (H200, "flash-attn-4", {"head_width": 136}, "takes heads up to 128 wide in steps of 8, not 136"),
        (H200, "xformers", {"head_width": 60}, "takes heads up to 256 wide in steps of 8, not 60"),
        (H200, "sdpa-cudnn", {"head_width": 84}, "takes heads up to 128 wide in steps of 8, not 84"),
    ],
)
def test_a_gpu_that_cannot_is_refused(target, wanted, more, says, monkeypatch):
    installed(monkeypatch)
    with tiles.assuming(target), pytest.raises(ValueError, match=says):
        ask(wanted, **more)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_refused_by_name(name, monkeypatch):
    installed(monkeypatch)
    with tiles.assuming(H200), pytest.raises(ValueError, match=f"^attention by {name}: it is not installed$"):
        ask(name)


def test_flash_attn_4_is_not_taken_for_flash_attn(monkeypatch):
    """They share a module, and each could be imported where only the other is installed."""
    stand_in(monkeypatch, "flash-attn-4")
    with pytest.raises(ValueError, match="flash-attn: it is not installed"), tiles.assuming(H200):
        ask("flash-attn")
    installed(monkeypatch, "flash-attn")
    with pytest.raises(ValueError, match="flash-attn-4: it is not installed"), tiles.assuming(H200):
        ask("flash-attn-4")


def test_a_package_that_does_not_import_is_refused_with_its_reason(monkeypatch):
    installed(monkeypatch, "flash-attn")

    def fails(module):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(attention, "import_module", fails)
    says = "installed but does not import: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10$"
    with tiles.assuming(H200), pytest.raises(ValueError, match=says):
        ask("flash-attn")


def test_an_old_cudnn_is_refused_where_it_is_wrong(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with tiles.assuming(H200):
        with pytest.raises(ValueError, match="needs cuDNN 9.15.1 for lengths that are no multiple of 128; this is 910"):
            ask("sdpa-cudnn")
        assert ask("sdpa-cudnn", length=256).name == "sdpa-cudnn"
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
        with pytest.raises(ValueError, match="needs cuDNN, which this PyTorch lacks"):
            ask("sdpa-cudnn", length=512)


def test_a_build_without_flash_attention_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with tiles.assuming(H200), pytest.raises(ValueError, match="sdpa-flash: it is not part of this build"):
        ask("sdpa-flash")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_without_a_gpu_torch_chooses(dtype):
    cpu = torch.device("cpu")
    assert ask(device=cpu, dtype=dtype) == Choice("sdpa", "no GPU: torch chooses")
    assert ask("triton", device=cpu, dtype=dtype) == Choice("triton", "asked for")


MEASURED = {
    H200.key: {
        "160x64": {"choice": "flash-attn", "us": {"flash-attn": 5.0, "sdpa": 8.0, "xformers": 7.0, "triton": 6.0}},
        "1568x64": {"choice": "sdpa-flash", "us": {"sdpa-flash": 900.0, "sdpa": 901.0}},
        "160x80": {"choice": "triton", "us": {"triton": 1.0, "sdpa": 2.0}},
    },
    A100.key: {"160x64": {"choice": "triton", "us": {"triton": 1.0}}},
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """An H200, flash-attn installed, and the table of MEASURED."""
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(MEASURED))
    monkeypatch.setattr(attention, "TABLE", path)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    attention.table.cache_clear()
    stand_in(monkeypatch, "flash-attn")
    with tiles.assuming(H200):
        yield path


@pytest.mark.parametrize(
    ("length", "head_width", "name"),
    [
        (160, 64, "flash-attn"),
        (80, 64, "flash-attn"),  # just half
        (320, 64, "flash-attn"),  # just twice
        (784, 64, "sdpa-flash"),
        (3136, 64, "sdpa-flash"),
        (160, 80, "triton"),
    ],
)
def test_auto_goes_by_the_nearest_measured_length(length, head_width, name, measured):
    assert ask(length=length, head_width=head_width) == Choice(name, "measured on NVIDIA H200")


def test_of_two_near_lengths_the_nearer_by_ratio_wins(measured):
    table = json.loads(measured.read_text())
    table[H200.key]["300x64"] = {"choice": "sdpa", "us": {"sdpa": 1.0}}
    measured.write_text(json.dumps(table))
    assert ask(length=225).name == "sdpa"  # 300 / 225 < 225 / 160, though 160 is nearer by difference
    assert ask(length=218).name == "flash-attn"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"length": 79}, "no measurement near 79 tokens with heads of 64: torch chooses"),
        ({"length": 321}, "no measurement near 321 tokens with heads of 64: torch chooses"),
        ({"length": 1568, "head_width": 80}, "no measurement near 1568 tokens with heads of 80: torch chooses"),
        ({"dtype": torch.float32}, "no measurement in float32: torch chooses"),
    ],
)
def test_beyond_what_was_measured_torch_chooses(more, why, measured):
    assert ask(**more) == Choice("sdpa", why)


def test_another_gpu_has_no_measurement(measured):
    for other in (T4, replace(H200, capability=100), replace(H200, name="NVIDIA H200 NVL")):
        attention._decide.cache_clear()
        with tiles.assuming(other):
            assert ask() == Choice("sdpa", "no measurement for this GPU: torch chooses")


def test_the_next_fastest_measured_one_replaces_a_missing_package(measured, monkeypatch):
    installed(monkeypatch)
    assert ask() == Choice("triton", "next fastest measured on NVIDIA H200: flash-attn is not installed")


def test_where_none_of_the_measured_ones_can_run_torch_chooses(measured, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    table = {H200.key: {"160x64": {"choice": "sdpa-flash", "us": {"sdpa-flash": 1.0, "forgotten": 2.0}}}}
    measured.write_text(json.dumps(table))
    assert ask() == Choice("sdpa", "nothing measured on NVIDIA H200 can run: torch chooses")


def test_auto_never_takes_what_was_not_measured(measured, monkeypatch):
    """Not even where everything is installed."""
    for name in PACKAGES:
        stand_in(monkeypatch, name)
    monkeypatch.setattr(metadata, "version", lambda name: "0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99999)
    with tiles.assuming(replace(H200, name="another")):
        assert ask().name == "sdpa"
        for name in {*BACKENDS} - {"sdpa"}:
            assert ask(name) == Choice(name, "asked for, untested here")
    attention._decide.cache_clear()
    attention.table.cache_clear()
    measured.write_text(json.dumps({H200.key: {"160x64": {"choice": "forgotten", "us": {"forgotten": 2.0}}}}))
    assert ask().name == "sdpa"


def test_what_is_asked_for_is_labelled_measured_where_it_was(measured):
    assert ask("triton") == Choice("triton", "asked for, measured on NVIDIA H200")
    assert ask("triton", length=5).why == "asked for, measured on NVIDIA H200"
    assert ask("sdpa") == Choice("sdpa", "asked for")


def test_the_answer_is_remembered(measured, monkeypatch):
    looked = []
    nearest = attention._nearest
    monkeypatch.setattr(attention, "_nearest", lambda *given: looked.append(given) or nearest(*given))
    assert ask() is ask()
    with pytest.raises(ValueError, match="got 'no'"):
        ask("no")
    assert len(looked) == 1
    ask(length=161)
    assert len(looked) == 2


@pytest.mark.long
def test_importing_it_imports_no_package_and_touches_no_gpu(tmp_path):
    for name in ("flash_attn", "xformers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, videomae.attention as a; "
    code += "a.attend(torch.zeros(1, 4, 3, 1, 8)); assert not torch.cuda.is_initialized(); print('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "fine\n", done.stderr


def test_the_shipped_table_is_sound_and_ships():
    for shapes in json.loads(attention.TABLE.read_text()).values():
        for shape, entry in shapes.items():
            assert re.fullmatch(r"\d+x\d+", shape)
            assert entry["choice"] in entry["us"]
            assert set(entry["us"]) <= set(BACKENDS)
    project = (ROOT / "pyproject.toml").read_text()
    assert '"attention.json"' in project
    for name in PACKAGES:
        assert re.search(rf"^{name} = \[", project, re.M), f"no extra for {name}"


def test_the_docstring_names_every_back_end():
    assert re.findall(r"^    ([a-z0-9-]+)  ", attention.__doc__, re.M) == list(BACKENDS)
