"""A whole step of fine-tuning, against one written from the formulas alone: a plain transformer in float64, pixels that
are erased, cut and blended one clip after another, soft targets, AdamW. And that every setting of a run reaches what it
is for."""

import contextlib
import math

import pytest
import torch
from torch.nn import functional

import videomae
from tests.recorder import Recorder
from train import cli
from train.checkpoint import Saver
from train.distributed import ALONE
from train.engine import Compiled, Engine, Graphs
from train.finetune import Finetuning
from train.finetune_recipes import FINETUNE
from train.inference import Views
from train.loop import Asked, _save, _step
from train.run import prepare
from train.skipped import Skipped
from train.validation import validate
from videomae.blocks import set_recompute
from videomae.clip import interpolated_positions
from videomae.data.dataset import Order, Sample, mask_keys
from videomae.data.feed import OnDevice
from videomae.data.loader import Batch, Skip
from videomae.data.mix import Erasing, draw_erasing
from videomae.data.rand_augment import RandAugment
from videomae.data.readers import LabelledClipReader
from videomae.data.sampling import Sampling
from videomae.keys import Draws, key
from videomae.weights import save_weights

CLASSES, VIDEOS, VIEWS, SIDE = 5, 9, 2, 16
BASE = "demo --model.size vit_tiny --model.frames 4 --model.image-size 16 --model.cube 2 8 8 --batch-size 8 --steps 40"
BASE += " --data.views-per-decode 2 --workers 0 --validate-every 0 --log.tensorboard false --optim.layer-decay 0.5"
BASE += " --mix.probability 1 --erasing.probability 0.6 --model.init-scale 20 --seed 4 --device cpu"
DROPS = ["--model.drop-path", "0.5", "--model.head-dropout", "0.4"]
LOST = 3  # the number of an unreadable video
AT = 10  # the step: past the warm-up, its clips cross from one epoch into the next


class Watched(Engine):
    """Keeps the gradients that an update was made of."""

    def _step(self, grad_factor, skip):
        values = super()._step(grad_factor, skip)
        self.gradients = [p.grad.clone() for p in self._updater.parameters]
        return values


class Said(list):
    say = list.append


def start(tmp_path, *flags):
    """A run on videos that are never read."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "train.csv").write_text("".join(f"{i}.mp4 {i % CLASSES}\n" for i in range(VIDEOS)))
    given = [*BASE.split(), "--data", str(tmp_path / "train.csv"), "--out", str(tmp_path / "run"), *map(str, flags)]
    config = cli.parse(given, FINETUNE, "demo", prog="", about="")
    run, _ = prepare(Finetuning(config))
    return run


def pixels_of(sample):
    """uint8 [T, H, W, 3] of a clip, by its name."""
    generator = torch.Generator().manual_seed(key(*sample) % 2**31)
    coarse = torch.randint(0, 256, (4, 4, 4, 3), dtype=torch.uint8, generator=generator)
    return coarse.repeat_interleave(SIDE // 4, 1).repeat_interleave(SIDE // 4, 2)


def fed(run, samples):
    """What the loader would hand out for them."""
    lost = [sample.index == LOST for sample in samples]
    frames = torch.stack([pixels_of(s) * (not gone) for s, gone in zip(samples, lost, strict=True)])
    skips = tuple(Skip(s, f"{s.index}.mp4", "broken") for s, gone in zip(samples, lost, strict=True) if gone)
    weight = 1 - torch.tensor(lost).float()
    batch = Batch(frames, weight, mask_keys(run.config.seed, samples), tuple(samples), skips)
    return OnDevice(batch, frames, weight, batch.keys, lambda: 0.0)


def one_step(run, engine, step=AT):
    order = Order(VIDEOS, run.config.seed, VIEWS)
    micro = run.plan.micro_batch
    first = step * run.plan.accumulation
    batches = (fed(run, order.samples((first + i) * micro, micro)) for i in range(run.plan.accumulation))
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, 0)
    return _step(run, engine, step, batches, skipped, Said(), Asked([], ALONE))["values"]


# -- the same from the formulas


def shares_of(draws):
    """lam, and CutMix's box or None (RECIPES E.1)."""

    def beta(alpha):
        w = (1 - draws.uniform()) ** (1 / alpha)
        x = math.sqrt(1 - w) * math.cos(2 * math.pi * draws.uniform())
        return (1 + x / math.sqrt(w + x * x)) / 2

    draws.uniform()  # always mixed
    if draws.uniform() >= 0.5:
        return beta(0.8), None
    side = int(SIDE * math.sqrt(1 - beta(1.0))) // 2
    y, x = draws.below(SIDE), draws.below(SIDE)
    rows, columns = (range(max(c - side, 0), min(c + side, SIDE)) for c in (y, x))
    return 1 - len(rows) * len(columns) / SIDE**2, (rows, columns)


def clips_of(samples, seed, group=2 * VIEWS):
    """Pixels, float64 [B, C, T, H, W], and soft targets [B, C] of a batch."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    keys = [key(seed, *sample, 3) for sample in samples]
    clips = []
    for sample, k in zip(samples, keys, strict=True):
        clip = (pixels_of(sample).double() / 255 - mean) / std
        box = draw_erasing(Erasing(0.6), k, (SIDE, SIDE))
        if box is not None:
            shape = (4, box.bottom - box.top, box.right - box.left, 3)
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(key(k, -4)))
            clip[:, box.top : box.bottom, box.left : box.right] = noise.double()
        clips.append(clip)
    smooth = 0.1 / CLASSES
    hard = [[smooth + 0.9 * (c == s.index % CLASSES) for c in range(CLASSES)] for s in samples]
    hard = torch.tensor(hard, dtype=torch.float64)
    mixed, targets, kinds = [], [], set()
    for i, sample in enumerate(samples):
        begin = i - i % group
        j = begin + group - 1 - i % group
        lam, box = shares_of(Draws(keys[begin], -2))
        if LOST in (sample.index, samples[j].index):
            lam, box = 1.0, None
        lam = torch.tensor(lam, dtype=torch.float32).double().item()
        kinds.add("none" if lam == 1 else "mixup" if box is None else "cutmix")
        out = clips[i].clone()
        if box is None:
            out = lam * out + (1 - lam) * clips[j]
        else:
            for row in box[0]:
                for column in box[1]:
                    out[:, row, column] = clips[j][:, row, column]
        mixed.append(out.permute(3, 0, 1, 2))
        targets.append(lam * hard[i] + (1 - lam) * hard[j])
    return torch.stack(mixed), torch.stack(targets), kinds


def vit(w, x, rates, dropout):
    """Logits of a ViT by RECIPES A.1 to A.6, dropping by PyTorch's own generator."""
    width, heads, count = 64, 4, len(x)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dropped(branch, rate):
        if rate == 0:
            return branch
        keep = torch.rand(count, 1, 1) >= rate
        return branch * keep / (1 - rate)

    x = functional.conv3d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(2, 8, 8))
    x = x.flatten(2).transpose(1, 2)
    place, column = torch.arange(x.shape[1])[:, None].double(), torch.arange(width)
    angle = place / 10000 ** (2 * (column // 2) / width)
    x = x + torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()
    for i, rate in enumerate(rates):
        name = f"blocks.{i}"
        normed = norm(x, f"{name}.norm1")
        bias = torch.cat([w[f"{name}.attn.q_bias"], torch.zeros(width).double(), w[f"{name}.attn.v_bias"]])
        qkv = normed @ w[f"{name}.attn.qkv.weight"].T + bias
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        shares = (q * (width // heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
        out = (shares @ v).transpose(1, 2).flatten(2)
        x = x + dropped(out @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"], rate)
        hidden = norm(x, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        active = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + dropped(active @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"], rate)
    pooled = norm(x.mean(1), "fc_norm")
    if dropout:
        pooled = functional.dropout(pooled, dropout)
    return pooled @ w["head.weight"].T + w["head.bias"]


def reference(weights, run, *, drops, step=AT):
    """Loss, gradients and what is mixed how, of the same step."""
    w = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    micro, clips = run.plan.micro_batch, run.plan.clips
    samples = Order(VIDEOS, run.config.seed, VIEWS).samples(step * clips, clips)
    read = [sample.index != LOST for sample in samples]
    loss, kinds = torch.zeros((), dtype=torch.float64), set()
    for begin in range(0, clips, micro):
        part = samples[begin : begin + micro]
        frames, targets, found = clips_of(part, run.config.seed)
        torch.manual_seed(key(run.config.seed, step, key(run.config.seed, *part[0], 3)))
        logits = vit(w, frames, (0.0, 0.5) if drops else (0.0, 0.0), 0.4 if drops else 0.0)
        each = -(targets * logits.log_softmax(1)).sum(1)
        loss = loss + (each * torch.tensor(read[begin : begin + micro])).sum() / sum(read)
        kinds |= found
    return loss.detach(), dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True)), kinds, read


@pytest.mark.parametrize("micro", [16, 4])
@pytest.mark.parametrize("drops", [False, True])
def test_loss_gradients_and_weights_are_those_of_the_formulas(micro, drops, tmp_path):
    run = start(tmp_path, "--micro-batch", micro, *(DROPS if drops else []))
    run.model.double()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    loss, gradients, kinds, read = reference(before, run, drops=drops)
    # the step has seen everything: both ways to mix, and clips that could not be read
    assert kinds == {"mixup", "cutmix", "none"}
    assert 0 < read.count(False) < len(read)
    clips = run.plan.clips
    assert len({s.epoch for s in Order(VIDEOS, run.config.seed, VIEWS).samples(AT * clips, clips)}) == 2
    engine = Watched(run.objective, run.updater)
    values = one_step(run, engine)
    assert values[0].item() == pytest.approx(loss.item(), rel=1e-6)
    rate = run.schedule.at(AT)
    layers = {"patch_embed": 1 / 8, "blocks.0": 1 / 4, "blocks.1": 1 / 2}
    for (name, p), ours in zip(run.model.named_parameters(), engine.gradients, strict=True):
        g = gradients[name]
        torch.testing.assert_close(
            ours, g, rtol=1e-5, atol=1e-6 * g.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )
        # AdamW's first step
        lr = rate * next((factor for layer, factor in layers.items() if name.startswith(layer)), 1.0)
        wanted = before[name] * (1 - lr * (0 if p.ndim <= 1 else 0.05)) - lr * ours / (ours.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-8)


def trained(make, tmp_path, *flags, recompute="none", steps=6):
    """[loss, norm, not finite] of some steps, the last of them with a clip that cannot be read, and the weights."""
    run = start(tmp_path, "--micro-batch", 8, *flags)
    set_recompute(run.model, recompute)
    engine = make(run.objective, run.updater)
    values = [one_step(run, engine, step) for step in range(AT - steps + 1, AT + 1)]
    return torch.stack(values), {name: p.detach() for name, p in run.model.named_parameters()}


@pytest.mark.parametrize("recompute", ["norms", "mlp", "block"])
def test_what_is_dropped_is_the_same_when_it_is_computed_anew(recompute, tmp_path):
    plain = trained(Engine, tmp_path / "plain", *DROPS, steps=2)
    again = trained(Engine, tmp_path / "again", *DROPS, steps=2, recompute=recompute)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("drops", [[], DROPS], ids=["", "drops"])
@pytest.mark.parametrize("name", ["graph", pytest.param("compile", marks=pytest.mark.long)])
def test_engines_train_alike(name, drops, recompute, tmp_path, monkeypatch):
    def make(objective, updater):
        if name == "graph":
            return Graphs(objective, updater, Recorder())
        torch._dynamo.reset()  # of the compilations before, which count against a limit
        return Compiled(objective, updater, backend="aot_eager")

    eager = trained(Engine, tmp_path / "eager", *drops)
    # as on a GPU, where there are graphs: what is drawn changes no shape
    monkeypatch.setattr("videomae.blocks.is_known", lambda _: False)
    other = trained(make, tmp_path / "other", *drops, recompute=recompute)
    torch.testing.assert_close(other[0], eager[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other[1], eager[1], rtol=1e-3, atol=2e-4)


# -- what a run is made of


def test_every_setting_reaches_the_reader_and_the_model(tmp_path):
    flags = "--augment.area 0.3 0.6 --augment.aspect 0.9 1.2 --augment.flip false --rand-augment.ops 3 --allow-nearest"
    flags += " --sampling.kind uniform --sampling.stride 4 --model.recompute mlp --model.init-scale 5 --smoothing 0.3"
    flags += " --rand-augment.magnitude 5 --precision bfloat16"
    run = start(tmp_path, *[*DROPS, *flags.split()])
    assert run.verb.reader() == LabelledClipReader(
        *(4, (SIDE, SIDE), Sampling("uniform"), 4, RandAugment(magnitude=5, ops=3)),
        area=(0.3, 0.6),
        aspect=(0.9, 1.2),
        flip=False,
        nearest=True,
        decoder=run.config.data.decoder,
    )
    model = run.model
    assert model.blocks.recompute == "mlp"
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.5]
    assert model.fc_dropout.p == 0.4
    assert model.head.weight.std().item() == pytest.approx(5 * 0.02, rel=0.2)
    assert (run.objective.smoothing, run.objective.autocast) == (0.3, torch.bfloat16)
    assert model.input.sampling == Sampling("uniform")


def test_without_operations_no_clip_is_augmented(tmp_path):
    assert start(tmp_path, "--rand-augment.ops", 0).verb.reader().rand_augment is None


def test_positions_are_interpolated_if_asked_for_and_stay_so_in_every_part_of_the_run(tmp_path):
    longer = videomae.encoder("vit_tiny", frames=8, image_size=32, cube=(2, 8, 8))
    save_weights(longer, tmp_path / "longer.safetensors")
    given = ("--weights", tmp_path / "longer.safetensors", "--ema", 0.9)
    fresh = start(tmp_path / "fresh", *given).model.positions
    run = start(tmp_path / "bent", *given, "--positions", "interpolate")
    wanted = interpolated_positions((4, 4, 4), (2, 2, 2), 64)
    assert torch.equal(run.model.positions, wanted)
    assert not torch.equal(fresh, wanted)
    run.verb.after_update(run, 1)
    saver = Saver(run.out / "checkpoints", run.config.checkpoint, print)
    _save(run, saver, 1)
    saver.finish()
    again = start(tmp_path / "bent", *given, "--positions", "interpolate")
    assert again.start == 1
    for model in (again.model, again.verb._average.module):
        assert torch.equal(model.positions, wanted)


@pytest.mark.parametrize("averaged", [False, True])
def test_validates_the_average_of_the_weights_where_there_is_one(averaged, tmp_path, monkeypatch):
    run = start(tmp_path, *DROPS, *(["--ema", "0.9"] if averaged else []))
    seen = []
    monkeypatch.setattr(
        "train.finetune.validate", lambda model, *_, **__: seen.append(model) or {"val_top1": 0.0, "val_top5": 0.0}
    )
    run.verb._val = run.verb.train_set
    assert run.verb.validate(run, Said(), 1)["val_top1"] == 0
    assert seen == [run.verb._average.module if averaged else run.model]


def test_validation_draws_nothing_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    run = start(tmp_path, *DROPS)
    videos, frames = run.verb.train_set, torch.stack([pixels_of((0, i, 0)) for i in range(VIDEOS)])
    found = [
        Views((0, 1, 2), frames[:3, None], ()),
        Views((), frames[:0, None], (Skip(Sample(0, 3, 0), "3.mp4", "broken"),)),
    ]
    found.append(Views(tuple(range(4, VIDEOS)), frames[4:, None], ()))
    monkeypatch.setattr("train.validation.read_views", lambda *_, **__: iter(found))
    said = Said()
    model = run.model.train()
    values = [validate(model, videos, None, run, source="", say=said.say) for _ in range(2)]
    assert values[0] == values[1]
    assert model.training
    assert model.blocks[1].training
    assert said == ["validation: counted as wrong: 3.mp4: broken"] * 2
    read = [i for i in range(VIDEOS) if i != 3]
    logits, labels = model.eval()(frames[read]), torch.tensor([i % CLASSES for i in read])
    assert values[0]["val_loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert values[0]["val_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / VIDEOS)
    assert (values[0]["val_top5"], values[0]["val_unreadable"]) == (pytest.approx(100 * 8 / 9), 1)
    run.precision, seen = "bfloat16", []
    model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    monkeypatch.setattr("train.validation.read_views", lambda *_, **__: iter(found))
    validate(model, videos, None, run, source="", say=said.say)
    assert set(seen) == {torch.bfloat16}


def test_bfloat16_is_that_of_the_model_and_the_loss_is_float32(tmp_path):
    losses = []
    for precision in ("float32", "bfloat16"):
        run = start(tmp_path / precision, "--precision", precision)
        batch = fed(run, Order(VIDEOS, run.config.seed, VIEWS).samples(0, 8))
        dtypes = []
        run.model.head.register_forward_hook(lambda module, inputs, out, seen=dtypes: seen.append(out.dtype))
        loss = run.objective(**run.verb.inputs(run, batch, 0))
        assert dtypes == [torch.float32 if precision == "float32" else torch.bfloat16]
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize(("every", "at"), [(1.0, [2, 3, 4, 5, 6]), (0.5, [1, 2, 3, 4, 5, 6]), (3.0, [4, 6]), (0.0, [])])
def test_validates_at_the_first_step_after_so_many_epochs_and_at_the_end(every, at, tmp_path, monkeypatch):
    # nine videos, eight of them a step, with two views each
    run = start(tmp_path, "--steps", 6, "--validate-every", every)
    run.verb._val = run.verb.train_set
    seen = []
    monkeypatch.setattr(run.verb, "_validate", lambda run, log, done: seen.append(done))
    log = Said()
    log.pause = contextlib.nullcontext
    for done in range(1, 7):
        run.verb.after_step(run, log, done)
    assert seen == at
