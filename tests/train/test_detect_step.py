"""A whole step of detection, against one written from the formulas alone (RECIPES H): boxes that follow the clip one
after another, features sampled place by place, the loss box by box, AdamW with layers' own rates. Everything but the
transformer's blocks is computed anew, in float64."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import conv3d, logsigmoid

from tests.train.test_finetune_step import Said, Watched
from tests.videomae.data.test_key_frame_reader import write
from train import cli
from train.detect import Detection
from train.detect_recipes import DETECT
from train.distributed import ALONE
from train.loop import Asked, _step
from train.run import prepare
from train.skipped import Skipped
from videomae.data.dataset import Order, mask_keys
from videomae.data.feed import OnDevice
from videomae.data.loader import Batch, Skip
from videomae.keys import Draws, key

SIDES, SHORT, LENGTH, SEED = (32, 48), 50, 4, 6  # of crops, whole frames, clips
VIDEOS = {"wide.mkv": (60, 90), "upright.mkv": (80, 56)}
CLASSES = ("jump", "run", "sit")
# boxes by key frame: corners, person and classes
PEOPLE = {
    ("wide.mkv", "0.2"): [((0.1, 0.2, 0.5, 0.9), 1, (0, 2)), ((0.1, 0.2, 0.5, 0.9), 2, (1,))],
    ("wide.mkv", "0.24"): [((0.0, 0.0, 1.0, 1.0), 1, (1,))],
    ("wide.mkv", "0.32"): [((0.93, 0.1, 0.99, 0.3), 1, (0, 1, 2)), ((0.3, 0.3, 0.6, 0.7), 1, (2,))],
    ("upright.mkv", "0.2"): [((0.2, 0.05, 0.9, 0.45), 4, (1,)), ((0.6, 0.5, 0.7, 0.6), 5, (0,))],
    ("upright.mkv", "0.28"): [((0.4, 0.8, 0.6, 1.0), 1, (2, 0))],
}
BASE = "demo --model.size vit_tiny --model.frames 4 --model.cube 2 8 8 --batch-size 6 --steps 30 --seed 6 --device cpu"
BASE += f" --model.image-size {SIDES[0]} {SIDES[1]} --clip.short-side {SHORT} --augment.flip true --augment.colour true"
BASE += " --augment.max-boxes 2 --model.init-scale 20 --optim.layer-decay 0.5 --data.views-per-decode 2 --sum-over 3"
BASE += " --workers 0 --validate-every 0 --log.tensorboard false"
LOST = 2  # the number of a key frame that cannot be read
AT = 7  # the step: past the warm-up


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movies")
    rng = np.random.default_rng(0)
    for name, (height, width) in VIDEOS.items():
        coarse = rng.integers(0, 256, (14, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        frames = coarse.repeat(4, 1).repeat(4, 2)[:, :height, :width]
        write(folder / name, frames, codec="ffv1")
    lines = [
        f"{name},{second},{','.join(map(str, box))},{CLASSES[label]},{person}\n"
        for (name, second), people in PEOPLE.items()
        # as AVA's rows, classes of one person are not next to each other
        for place in range(3)
        for box, person, labels in people
        for label in labels[place : place + 1]
    ]
    (folder / "train.csv").write_text("path,second,x1,y1,x2,y2,label,person\n" + "".join(lines))
    return folder


def start(movies, out, *flags):
    given = [*BASE.split(), "--data", str(movies), "--out", str(out), *map(str, flags)]
    run, _ = prepare(Detection(cli.parse(given, DETECT, "demo", prog="", about="")))
    return run


def fed(run, samples):
    """What the loader would hand out for them."""
    reader = run.verb.reader()
    frames = torch.zeros(len(samples), *reader.shape, dtype=torch.uint8)
    lost = [sample.index == LOST for sample in samples]
    for sample, clip, gone in zip(samples, frames, lost, strict=True):
        if not gone:
            reader.read_into(run.videos.paths[sample.index], [sample], [clip.numpy()])
    skips = tuple(Skip(s, "lost", "broken") for s, gone in zip(samples, lost, strict=True) if gone)
    weight = 1 - torch.tensor(lost).float()
    batch = Batch(frames, weight, mask_keys(SEED, samples), tuple(samples), skips)
    return OnDevice(batch, frames, weight, batch.keys, lambda: 0.0)


# -- the same from the formulas


def key_frame(index):
    """Of the list's, in order of video and second: (height, width), and boxes with their labels."""
    order = sorted(PEOPLE, key=lambda one: (list(VIDEOS).index(one[0]), float(one[1])))
    return VIDEOS[order[index][0]], [(box, labels) for box, _, labels in PEOPLE[order[index]]]


def sides_of(box, frame, sample):
    """A box in pixels of the crop, each side by itself (H.3, H.4); whether it was mirrored."""
    (height, width), short = frame, min(frame)
    tall, broad = int(SHORT * height / short), int(SHORT * width / short)
    draws = Draws(SEED, *sample, 4)
    top, left = draws.below(tall - SIDES[0] + 1), draws.below(broad - SIDES[1] + 1)
    for _ in range(3):
        draws.uniform()  # of colours
    is_mirrored = draws.below(2) == 1

    def inside(x, last):
        return min(max(x, 0), last)

    x1, x2 = box[0] * width * broad / width, (box[2] * width - 1) * broad / width
    y1, y2 = box[1] * height * tall / height, (box[3] * height - 1) * tall / height
    x1, x2 = (inside(x - left, SIDES[1] - 1) for x in (x1, x2))
    y1, y2 = (inside(y - top, SIDES[0] - 1) for y in (y1, y2))
    if is_mirrored:
        x1, x2 = SIDES[1] - 1 - x2, SIDES[1] - 1 - x1
    return (x1, y1, x2, y2), is_mirrored


def jittered(box, draws):
    x1, y1, x2, y2 = box
    w, h = x2 - x1 + 1, y2 - y1 + 1
    x1 += w * (-0.2 + 0.3 * draws.uniform())
    y1 += h * (-0.1 + 0.15 * draws.uniform())
    x2 += w * (-0.1 + 0.3 * draws.uniform())
    y2 += h * (-0.05 + 0.15 * draws.uniform())
    x1, y1 = min(max(x1, 0), SIDES[1] - 2), min(max(y1, 0), SIDES[0] - 2)
    return x1, y1, max(min(x2, SIDES[1] - 1), x1 + 1), max(min(y2, SIDES[0] - 1), y1 + 1)


def sampled(features, y, x):
    """Features [h, w, D] at one place, bilinearly; up to one place outside they are those of the edge."""
    rows, columns = features.shape[:2]
    if not (-1 <= y <= rows and -1 <= x <= columns):
        return torch.zeros_like(features[0, 0])
    y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
    top, left = min(int(y), rows - 2), min(int(x), columns - 2)
    down, right = y - top, x - left
    upper = (1 - right) * features[top, left] + right * features[top, left + 1]
    lower = (1 - right) * features[top + 1, left] + right * features[top + 1, left + 1]
    return (1 - down) * upper + down * lower


def pooled(features, box):
    """The largest of the 7 x 7 bins (H.4)."""
    x1, y1, x2, y2 = (side / 8 for side in box)
    w, h = max(x2 - x1, 1) / 7, max(y2 - y1, 1) / 7
    across, down = math.ceil(w), math.ceil(h)
    bins = []
    for row, column in product(range(7), range(7)):
        places = product(range(down), range(across))
        values = [
            sampled(features, y1 + h * (row + (i + 0.5) / down), x1 + w * (column + (j + 0.5) / across))
            for i, j in places
        ]
        bins.append(sum(values) / len(values))
    return torch.stack(bins).max(dim=0).values


def features_of(model, frames):
    """[B, h, w, D] of uint8 frames (A.1, A.2, H.3, H.4)."""
    mean = torch.tensor([122.7717, 115.9465, 102.9801], dtype=torch.float64)
    x = ((frames.double() - mean) / 57.375).permute(0, 4, 1, 2, 3)
    proj = model.patch_embed.proj
    x = conv3d(x, proj.weight, proj.bias, stride=(2, 8, 8)).flatten(2).transpose(1, 2).contiguous()
    place, column = torch.arange(x.shape[1])[:, None].double(), torch.arange(x.shape[2])
    angle = place / 10000 ** (2 * (column // 2) / x.shape[2])
    x = model.blocks(x + torch.where(column % 2 == 0, angle.sin(), angle.cos()).float())
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight + model.norm.bias
    return x.unflatten(1, (LENGTH // 2, SIDES[0] // 8, SIDES[1] // 8)).mean(1)


def reference(model, run):
    """Loss, gradients, and what was there to be seen, of the same step."""
    micro, clips = run.plan.micro_batch, run.plan.clips
    samples = Order(len(run.videos), SEED, 2).samples(AT * clips, clips)
    num_read = sum(sample.index != LOST for sample in samples)
    loss, seen = torch.zeros((), dtype=torch.float64), set()
    for begin in range(0, clips, micro):
        part = samples[begin : begin + micro]
        frames = fed(run, part).frames
        torch.manual_seed(key(SEED, AT, key(SEED, *part[0], 3)))
        for sample, features in zip(part, features_of(model, frames), strict=True):
            frame, people = key_frame(sample.index)
            if sample.index == LOST:
                seen.add("lost")
                continue
            draws = Draws(SEED, *sample, 5)
            for box, labels in people:
                sides, is_mirrored = sides_of(box, frame, sample)
                seen |= {"mirrored"} if is_mirrored else {"plain"}
                seen |= {"outside"} if sides[0] == sides[2] or sides[1] == sides[3] else set()
                sides = [float(np.float32(side)) for side in jittered(sides, draws)]
                logits = model.head.weight @ pooled(features, sides) + model.head.bias
                signs = torch.tensor([1.0 if c in labels else -1.0 for c in range(len(CLASSES))], dtype=torch.float64)
                loss = loss - logsigmoid(signs * logits).mean()
    # a GPU of three clips adds up over its boxes, and GPUs are averaged
    loss = loss * 3 / num_read
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)), seen


@pytest.mark.parametrize(("micro", "drop"), [(12, 0.0), pytest.param(4, 0.5, marks=pytest.mark.long)])
def test_loss_gradients_and_weights_are_those_of_the_formulas(micro, drop, movies, tmp_path):
    run = start(movies, tmp_path / "run", "--micro-batch", micro, "--model.drop-path", drop)
    run.model.double()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    loss, gradients, seen = reference(copy.deepcopy(run.model), run)
    # the step has seen everything
    assert seen >= {"mirrored", "plain", "outside", "lost"}
    engine = Watched(run.objective, run.updater)
    samples = Order(len(run.videos), SEED, 2).samples(AT * run.plan.clips, run.plan.clips)
    batches = (fed(run, samples[i : i + micro]) for i in range(0, len(samples), micro))
    skipped = Skipped(run.out / "skipped.jsonl", run.videos.paths, 0)
    values = _step(run, engine, AT, batches, skipped, Said(), Asked([], ALONE))["values"]
    assert values[0].item() == pytest.approx(loss.item(), rel=1e-6)
    rate = run.schedule.at(AT)
    # the final norm learns as the head does
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
