"""Clips per second and core, from file to clip: this project's uint8 path against the published float path, in turn.

    pytest bench/bench_loader.py --benchmark-only

One process, one thread. The file is Kinetics-like: 10 s, 340 x 256, H.264 with a 250-frame GOP; VIDEOMAE_TEST_DATA
names a folder with clips/test_kinetics.mp4, and without it a synthetic one is encoded. Both paths read 16 frames at
stride 4 from the same starts.
"""

import os
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.launch import IMAGENET_MEAN, IMAGENET_STD

pytest.importorskip("av", reason="the data path needs PyAV")
pytest.importorskip("decord", reason="the published path needs decord")

from videomae.data.augment import Augment, multi_scale_crop  # noqa: E402
from videomae.data.dataset import _CROP, _FRAMES, ClipReader, Sample  # noqa: E402
from videomae.data.decode import Video  # noqa: E402
from videomae.keys import Draws  # noqa: E402

ROUNDS = 25


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    real = Path(os.environ.get("VIDEOMAE_TEST_DATA", root)) / "clips" / "test_kinetics.mp4"
    return str(real) if real.exists() else _synthetic(tmp_path_factory.mktemp("video") / "synthetic.mp4")


def _synthetic(path: Path) -> str:
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
    return str(path)


def published_float_path(path: str, epoch: int) -> torch.Tensor:
    """Decode, PIL crop and resize frame by frame, stack, divide, normalise: float32 [3, 16, 224, 224]."""
    import decord

    decoder = decord.VideoReader(path, num_threads=1)
    start = Draws(0, epoch, 0, _FRAMES).below(len(decoder) - 64 + 1)
    frames = decoder.get_batch([start + 4 * k for k in range(16)]).asnumpy()
    crop = multi_scale_crop(*frames.shape[1:3], (224, 224), Augment().scales, Draws(0, epoch, 0, 0, _CROP))
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    images = [Image.fromarray(frame).crop(box).resize((224, 224), Image.Resampling.BILINEAR) for frame in frames]
    stacked = np.concatenate([np.asarray(image) for image in images], axis=2)  # [224, 224, 48]
    tensor = torch.from_numpy(stacked).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values).repeat(16)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return tensor.sub_(mean).div_(std).view(16, 3, 224, 224).transpose(0, 1)


@pytest.mark.benchmark(group="file to clip, one core")
def test_clips_come_faster_than_by_the_published_path(benchmark, capsys, video):
    torch.set_num_threads(1)
    reader = ClipReader(frames=16, size=(224, 224), stride=4, augment=Augment(), seed=0)
    times: dict[str, list[float]] = {"ours": [], "published": [], "decoding alone": []}

    def in_turn() -> None:
        epoch = len(times["ours"])
        start = Draws(0, epoch, 0, _FRAMES).below(len(Video(video)) - 64 + 1)
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
    with capsys.disabled():
        listing = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
        print(f"\nclips/s on one core: {listing}; median ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    assert ratio >= 1.7
