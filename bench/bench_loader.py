"""Clips per second and core, from file to uint8 clip: originals, prepared sets, and the published float path, in turn.

    pytest bench/bench_loader.py --benchmark-only

One process, one thread, then the loader with one worker and with two; writes results/loader.json and loader.md. The
files are Kinetics-like: 340 x 256, H.264 with a 250-frame GOP, from clips/test_kinetics.mp4 (10 s) and
clips/arm_wrestling.mp4 of the folder that VIDEOMAE_TEST_DATA names; without it a synthetic one is encoded. All read 16
frames at stride 4 from the same starts.
"""

import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.loader import measure_loader
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("av", reason="the data path needs PyAV")
pytest.importorskip("decord", reason="the published path needs decord")

from videomae.data.augment import Augment, multi_scale_crop  # noqa: E402
from videomae.data.dataset import CROP, FRAMES, Order, Sample, find_videos  # noqa: E402
from videomae.data.decode import Video  # noqa: E402
from videomae.data.prepare import main as prepare  # noqa: E402
from videomae.data.readers import ClipReader  # noqa: E402
from videomae.keys import Draws  # noqa: E402

RESULTS = Path(__file__).with_name("results")
ROUNDS = 25


# what the pipeline has to reach, clips/s and core by set and views per decode; and two workers beside one
GOALS = {("h264-fast", 1): 50, ("jpeg", 1): 95, ("jpeg", 4): 200}
SCALING = 1.8


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of Kinetics-like files."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    clips = Path(os.environ.get("VIDEOMAE_TEST_DATA", root)) / "clips"
    folder = tmp_path_factory.mktemp("videos")
    for name in ("test_kinetics.mp4", "arm_wrestling.mp4"):
        if (clips / name).exists():
            shutil.copy(clips / name, folder)
    return folder if any(folder.iterdir()) else _synthetic(folder / "synthetic.mp4").parent


@pytest.fixture(scope="module")
def video(originals):
    return str(max(originals.iterdir()))


@pytest.fixture(scope="module")
def sets(originals, tmp_path_factory):
    """The originals, and what `prepare` makes of them, every frame kept."""
    found = {"original": find_videos(originals)}
    for codec in ("h264-fast", "jpeg"):
        out = tmp_path_factory.mktemp(codec) / "set"
        assert prepare([str(originals), str(out), "--codec", codec]) == 0
        found[codec] = find_videos(out)
    return found


@pytest.fixture(scope="module")
def figures():
    """What the benches of this file measure; written when all have run."""
    taken: dict = {"machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()}}
    yield taken
    if {"published", "one core", "scaling"} <= taken.keys():
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "loader.json").write_text(json.dumps(taken, indent=1) + "\n")
        (RESULTS / "loader.md").write_text(_page(taken))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _synthetic(path: Path) -> Path:
    """300 frames of a drifting texture with some noise: about as hard to decode as a real clip."""
    import av

    rng = np.random.default_rng(0)
    texture = np.asarray(Image.fromarray(rng.integers(0, 256, (64, 90, 3), dtype=np.uint8)).resize((720, 512)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 340, 256, "yuv420p", 250
        for t in range(300):
            noise = rng.integers(0, 12, (256, 340, 3), dtype=np.uint8)
            image = texture[t // 2 : t // 2 + 256, t : t + 340] // 2 + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    return path


def published_float_path(path: str, epoch: int) -> torch.Tensor:
    """Decode, PIL crop and resize frame by frame, stack, divide, normalise: float32 [3, 16, 224, 224]."""
    import decord

    decoder = decord.VideoReader(path, num_threads=1)
    start = Draws(0, epoch, 0, FRAMES).below(len(decoder) - 64 + 1)
    frames = decoder.get_batch([start + 4 * k for k in range(16)]).asnumpy()
    crop = multi_scale_crop(*frames.shape[1:3], (224, 224), Augment().scales, Draws(0, epoch, 0, 0, CROP))
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    images = [Image.fromarray(frame).crop(box).resize((224, 224), Image.Resampling.BILINEAR) for frame in frames]
    stacked = np.concatenate([np.asarray(image) for image in images], axis=2)  # [224, 224, 48]
    tensor = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values).repeat(16)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return tensor.sub_(mean).div_(std).view(16, 3, 224, 224).transpose(0, 1)


@pytest.mark.benchmark(group="file to clip, one core")
def test_clips_come_faster_than_by_the_published_path(benchmark, capsys, video, figures):
    torch.set_num_threads(1)
    reader = ClipReader(frames=16, size=(224, 224), stride=4, augment=Augment(), seed=0)
    times: dict[str, list[float]] = {"ours": [], "published": [], "decoding alone": []}

    def in_turn() -> None:
        epoch = len(times["ours"])
        start = Draws(0, epoch, 0, FRAMES).below(len(Video(video)) - 64 + 1)
        runs = {
            "ours": lambda: reader.read(video, [Sample(epoch, 0, 0)])[0],
            "published": lambda: published_float_path(video, epoch),
            "decoding alone": lambda: Video(video).read([start + 4 * k for k in range(16)]),
        }
        results = {}
        for name, run in runs.items():
            begin = time.perf_counter()
            results[name] = run()
            times[name].append(time.perf_counter() - begin)
        # the same frames and crop: the float path's pixels are ours within the resize's rounding
        mean, std = (torch.tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        ours = (torch.from_numpy(results["ours"]).float() / 255 - mean) / std
        assert (ours - results["published"].permute(1, 2, 3, 0)).abs().max() < 3 / 255 / 0.224

    benchmark.pedantic(in_turn, rounds=ROUNDS, warmup_rounds=2)
    rates = {name: 1 / statistics.median(t[2:]) for name, t in times.items()}
    ratios = [b / a for a, b in zip(times["ours"][2:], times["published"][2:], strict=True)]
    ratio = statistics.median(ratios)
    benchmark.extra_info.update(ratio=ratio, **rates)
    figures["published"] = {"clips_per_second": rates, "ratio": ratio, "ratios": [min(ratios), max(ratios)]}
    with capsys.disabled():
        listing = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(f"\nclips/s on one core: {listing}; median ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    assert ratio >= 1.7


@pytest.mark.benchmark(group="file to clip, one core")
def test_prepared_sets(benchmark, capsys, sets, figures):
    """A clip of every set and number of views, in turn."""
    torch.set_num_threads(1)
    contenders = {(name, views): _reads(videos, views) for name, videos in sets.items() for views in (1, 2, 4)}
    times: dict[tuple[str, int], list[float]] = {contender: [] for contender in contenders}

    def in_turn() -> None:
        for contender, read in contenders.items():
            begin = time.perf_counter()
            read(len(times[contender]))
            times[contender].append(time.perf_counter() - begin)

    benchmark.pedantic(in_turn, rounds=2 * ROUNDS, warmup_rounds=2)
    rates = {contender: contender[1] / statistics.median(t[2:]) for contender, t in times.items()}
    bytes_each = {name: sum(_bytes(path) for path in videos.paths) / len(videos) for name, videos in sets.items()}
    figures["one core"] = [
        {"set": name, "views": views, "clips_per_second": rate, "bytes_per_video": bytes_each[name]}
        for (name, views), rate in rates.items()
    ]
    with capsys.disabled():
        print(
            "\nclips/s on one core: "
            + ", ".join(f"{name} x{views} {rate:.0f}" for (name, views), rate in rates.items())
        )
    for contender, goal in GOALS.items():
        assert rates[contender] >= goal, contender


def _reads(videos, views):
    """Read all views of the n-th clip."""
    reader = ClipReader(frames=16, size=(224, 224), stride=4, augment=Augment(), seed=0, views=views)
    out = [np.empty(reader.shape, dtype=np.uint8) for _ in range(views)]

    def read(n: int) -> None:
        index = n % len(videos)
        reader.read_into(videos.paths[index], [Sample(n, index, view) for view in range(views)], out)

    return read


def _bytes(path: str) -> int:
    """Of a file; of a stored video, its part of the shard."""
    if "::" not in path:
        return Path(path).stat().st_size
    root, key = Path(path.partition("::")[0]).parent, path.partition("::")[2].rpartition("@")[0]
    rows = map(json.loads, (root / "index.jsonl").read_text().splitlines())
    return next(row["size"] for row in rows if row["key"] == key)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.benchmark(group="file to batch, the loader")
def test_two_workers_make_twice_as_many(benchmark, capsys, sets, figures):
    """One worker and two, in turn."""
    reader = ClipReader(frames=16, size=(224, 224), stride=4, augment=Augment(), seed=0)
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in sets}

    def in_turn() -> None:
        for name, videos in sets.items():
            for workers, measured in rates[name].items():
                order = Order(len(videos), 0)
                measured.append(measure_loader(reader, videos, order, workers=workers, batch=8, seconds=4))

    benchmark.pedantic(in_turn, rounds=3)
    ratios = {name: statistics.median(b / a for a, b in zip(by[1], by[2], strict=True)) for name, by in rates.items()}
    figures["scaling"] = {
        name: {"clips_per_second": {n: statistics.median(m) for n, m in by.items()}, "ratio": ratios[name]}
        for name, by in rates.items()
    }
    with capsys.disabled():
        print("\ntwo workers beside one: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    assert min(ratios.values()) >= SCALING


def _page(figures: dict) -> str:
    published, machine = figures["published"], figures["machine"]
    low, high = published["ratios"]
    lines = [
        "# From file to clip",
        "",
        "Written by `pytest bench/bench_loader.py --benchmark-only`.",
        f"{machine['cores']} cores ({machine['processor']});",
        "16 frames of 224 x 224 at stride 4 from Kinetics-like files, 340 x 256. Medians of runs in turn.",
        "",
        "| one core, clips/s | 1 view | 2 views | 4 views | kB a video |",
        "| --- | --- | --- | --- | --- |",
        f"| published float path | {published['clips_per_second']['published']:.0f} | | | |",
    ]
    rows: dict[str, dict] = {}
    for entry in figures["one core"]:
        rows.setdefault(entry["set"], {"bytes": entry["bytes_per_video"]})[entry["views"]] = entry["clips_per_second"]
    for name, by in rows.items():
        lines.append(f"| {name} | {by[1]:.0f} | {by[2]:.0f} | {by[4]:.0f} | {by['bytes'] / 1000:.0f} |")
    lines += [
        "",
        f"Original files beside the published path: {published['ratio']:.2f} times ({low:.2f} to {high:.2f}).",
        "",
        "| the loader, clips/s | 1 worker | 2 workers | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, entry in figures["scaling"].items():
        one, two = entry["clips_per_second"].values()
        lines.append(f"| {name} | {one:.0f} | {two:.0f} | {entry['ratio']:.2f} |")
    goals = ", ".join(f"{name} with {views} views {goal}" for (name, views), goal in GOALS.items())
    return "\n".join([*lines, "", f"Asked for, clips/s and core: {goals}; two workers {SCALING} times one.", ""])
