"""Engines: the same losses and weights, whatever runs the step. In place of CUDA graphs stands a recorder of PyTorch's
operations: a replay repeats them on the tensors where they were recorded, and nothing of Python's."""

import pytest
import torch

import videomae
from tests.recorder import Recorder
from train.engine import WARM_UP, Compiled, Engine, Graphs, check_engine, make_engine
from train.objective import PretrainObjective
from train.optim import Optim, Schedule, Updater
from videomae.blocks import set_recompute

SIZES = {"frames": 8, "image_size": 32, "cube": (2, 8, 8), "decoder_depth": 2}
STEPS = 8


def graphs(objective, updater):
    return Graphs(objective, updater, Recorder())


def compiled(objective, updater):
    return Compiled(objective, updater, backend="aot_eager")


def start(make, device="cpu", clip_grad=None, **changes):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", **SIZES).to(device)
    objective = PretrainObjective(model, "tube", 0.75, **changes)
    config = Optim(clip_grad=clip_grad)
    updater = Updater(model, config, Schedule(1e-2, 1e-4, 2, STEPS), "float32", torch.device(device))
    return model, make(objective, updater)


def batches(device="cpu", clips=4):
    generator = torch.Generator().manual_seed(1)
    while True:
        frames = torch.randint(0, 256, (clips, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)
        keys = torch.randint(1 << 40, (clips,), generator=generator)
        yield {"frames": frames.to(device), "keys": keys.to(device), "weight": torch.ones(clips, device=device)}


def train(make, parts=1, device="cpu", **changes):
    """[loss, norm, not finite] of every step, and the weights."""
    model, engine = start(make, device, **changes)
    data, values = batches(device), []
    for step in range(STEPS):
        for _ in range(parts):
            engine.micro_batch(next(data), 1 / parts)
        values.append(engine.update(step))
    return torch.stack(values).cpu(), {name: p.detach().cpu() for name, p in model.named_parameters()}


def assert_same(one, other, rtol=1e-4):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=1e-6)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("make", [graphs, compiled], ids=["graph", "compile"])
@pytest.mark.parametrize("parts", [1, 3])
def test_losses_and_weights_agree_with_eager(make, parts):
    assert_same(train(make, parts, clip_grad=1.0), train(Engine, parts, clip_grad=1.0))


def test_dual_masking_agrees_too():
    changes = {"decoder_mask": "running-cell"}
    assert_same(train(graphs, **changes), train(Engine, **changes))


def test_learns():
    losses = train(Engine, parts=2)[0][:, 0]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("name", ["graph", "compile"])
@pytest.mark.parametrize("parts", [1, 3])
def test_losses_and_weights_agree_on_a_gpu(name, parts):
    changes = {"device": "cuda", "autocast": torch.bfloat16, "clip_grad": 1.0}

    def make(objective, updater):
        return make_engine(name, objective, updater)

    one, other = train(make, parts, **changes), train(Engine, parts, **changes)
    torch.testing.assert_close(one[0], other[0], rtol=2e-2, atol=0)
    # where a gradient is near 0, AdamW makes a whole step of its rounding: weights are compared all together
    way = torch.cat([(x.detach().cpu() - other[1][name]).flatten() for name, x in start(Engine)[0].named_parameters()])
    apart = torch.cat([(x - other[1][name]).flatten() for name, x in one[1].items()])
    assert apart.norm() < 2e-2 * way.norm()
    changes["autocast"] = None
    assert_same(train(make, parts, **changes), train(Engine, parts, **changes))


def test_a_step_with_an_unreadable_clip_is_corrected_outside_the_graph():
    outcomes = []
    for make in (Engine, graphs):
        model, engine = start(make)
        data = batches()
        for step in range(STEPS):
            batch = next(data)
            lost = step == STEPS - 1
            if lost:
                batch["weight"][1] = 0
                batch["frames"][1] = 0
            engine.micro_batch(batch, 3 / 4 if lost else 1.0)
            values = engine.update(step, real=3 if lost else 4, clips=4)
        outcomes.append((values[None], dict(model.named_parameters())))
    assert_same(*outcomes)


def test_a_step_without_a_clip_changes_nothing_and_the_next_one_goes_on():
    model, engine = start(graphs)
    data = batches()
    for step in range(WARM_UP + 1):
        engine.micro_batch(next(data), 1.0)
        engine.update(step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    empty = next(data)
    empty["weight"].zero_()
    engine.micro_batch(empty, 0.0)
    assert engine.update(WARM_UP + 1, real=0)[2] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    engine.micro_batch(next(data), 1.0)
    engine.update(WARM_UP + 2)
    assert not torch.equal(model.mask_token, before["mask_token"])


def test_a_graph_is_recorded_once_after_the_steps_that_warm_up():
    _, engine = start(graphs)
    recorder, data = engine._recorder, batches()
    for step in range(WARM_UP + 3):
        for _ in range(3):
            engine.micro_batch(next(data), 1 / 3)
        engine.update(step)
    # a step: its first micro-batch, two more, the update
    assert recorder.warmed == WARM_UP * 4
    assert recorder.captured == 3


def test_a_graph_reads_every_batch_from_where_the_first_lay():
    _, engine = start(graphs)
    data = batches()
    engine.micro_batch(next(data), 1.0)
    places = {name: x.data_ptr() for name, x in engine._inputs.items()}
    engine.update(0)
    batch = next(data)
    engine.micro_batch(batch, 1.0)
    assert {name: x.data_ptr() for name, x in engine._inputs.items()} == places
    assert all(torch.equal(engine._inputs[name], x) for name, x in batch.items())
    with pytest.raises(ValueError, match=r"the graph was made for frames \(4, 8, 32, 32, 3\); got \(2, 8, 32, 32, 3\)"):
        engine.micro_batch(next(batches(clips=2)), 1.0)


def test_the_objective_compiles_once_whatever_the_share_and_the_step():
    torch.compiler.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    model, _ = start(Engine)
    updater = Updater(model, Optim(), Schedule(1e-2, 1e-4, 2, STEPS), "float32", torch.device("cpu"))
    objective = PretrainObjective(model, "tube", 0.75)
    first = next(batches())
    objective(**first)  # einops remembers its back ends, and what it had not yet seen would be compiled twice
    engine = Compiled(objective, updater, backend=backend)
    for step, (batch, share) in enumerate(zip(batches(), (1.0, 0.75, 0.5), strict=False)):
        engine.micro_batch(batch, share)
        engine.update(step)
    assert len(seen) == 1  # fullgraph: no break either


@pytest.mark.parametrize(
    "recompute", ["norms", "block", *(pytest.param(name, marks=pytest.mark.long) for name in ("none", "mlp"))]
)
def test_recomputation_goes_with_every_engine_that_takes_it(recompute):
    def one_step(make):
        model, engine = start(make)
        set_recompute(model, recompute)
        engine.micro_batch(next(batches()), 1.0)
        return engine.update(0)

    plain = one_step(Engine)
    torch.testing.assert_close(one_step(graphs), plain)
    if recompute == "norms":
        with pytest.raises(ValueError, match="--engine compile chooses by itself"):
            check_engine("compile", torch.device("cpu"), recompute)
    else:
        torch.testing.assert_close(one_step(compiled), plain, rtol=1e-4, atol=1e-6)


def test_refuses_a_graph_without_a_gpu():
    with pytest.raises(ValueError, match="needs a GPU"):
        check_engine("graph", torch.device("cpu"), "none")
    check_engine("graph", torch.device("cuda"), "norms")
    check_engine("eager", torch.device("cpu"), "norms")
