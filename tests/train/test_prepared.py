"""Training on prepared sets: the same clips as from the originals; damaged shards cost their own clips and no other."""

import json
import os
import shutil
import signal

import fsspec
import numpy as np
import pytest
import torch

from tests.runs import assert_same, metrics, run, start, wait_for, weights
from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.dataset import Sample, find_videos
from videomae.data.loader import Loader, LoaderConfig
from videomae.data.prepare import main as prepare
from videomae.data.readers import ClipReader

COUNT = 6


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals") / "videos"
    folder.mkdir()
    for i in range(COUNT):
        write_video(folder / f"{i}.mp4", moving_frames(30 + i, 48, 64, seed=i), crf="18")
    return folder


@pytest.fixture(scope="module")
def sets(originals, tmp_path_factory):
    """Every frame, in two phases, in three shards of two videos."""
    out = {}
    for codec in ("h264-fast", "jpeg"):
        out[codec] = tmp_path_factory.mktemp(codec) / "set"
        flags = ("--codec", codec, "--stride", "2", "--shard-videos", "2", "--short-side", "48", "--workers", "1")
        assert prepare([str(originals), str(out[codec]), *flags]) == 0
    return out


@pytest.fixture
def copy(sets, tmp_path):
    """A set of its own to damage."""
    return shutil.copytree(sets["h264-fast"], tmp_path / "set")


def read(source, workers=1, timeout=60.0, epochs=2):
    """Batches of one video each, two views a video."""
    videos = find_videos(source)
    reader = ClipReader(frames=4, size=(16, 16), stride=2, augment=Augment(), seed=0, views=2)
    batches = [[Sample(epoch, i, view) for view in (0, 1)] for epoch in range(epochs) for i in range(COUNT)]
    config = LoaderConfig(timeout=timeout)
    with Loader(reader, videos.paths, batches, batch_size=2, workers=workers, config=config) as loader:
        return [batch._replace(frames=batch.frames.clone()) for batch in loader]


def lost_and_kept(batches, intact):
    """Videos whose clips were skipped, with reasons; all other clips are those of the intact set."""
    lost = {}
    for batch, whole in zip(batches, intact, strict=True):
        for skip in batch.skips:
            lost[skip.sample.index] = f"{skip.path}: {skip.reason}"
        if not batch.skips:
            assert torch.equal(batch.frames, whole.frames)
        else:
            assert batch.weight.tolist() == [0, 0]
            assert batch.frames.max() == 0
        assert torch.equal(batch.keys, whole.keys)
    return lost


@pytest.mark.parametrize("codec", ["h264-fast", pytest.param("jpeg", marks=pytest.mark.long)])
def test_gives_the_frames_of_the_originals(tmp_path, codec):
    folder = tmp_path / "videos"
    folder.mkdir()
    # a frame's number is its brightness
    frames = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None] * 6, (40, 32, 32, 3)).copy()
    write_video(folder / "counting.mp4", frames, qp="0", pix_fmt="yuv444p")
    flags = ("--codec", codec, "--stride", "4", "--workers", "1", "--short-side", "32")
    assert prepare([str(folder), str(tmp_path / "all"), *flags]) == 0
    assert prepare([str(folder), str(tmp_path / "first"), *flags, "--phases", "first"]) == 0
    paths = {name: find_videos(tmp_path / name).paths[0] for name in ("videos", "all", "first")}
    seen = set()
    for stride in (4, 3):
        reader = ClipReader(frames=4, size=(16, 16), stride=stride, augment=Augment(), seed=0, views=2, windows=2)
        for epoch in range(25):
            samples = [Sample(epoch, 0, view) for view in (0, 1)]
            clips = {name: reader.read(paths[name], samples) for name in ("videos", "all")}
            numbers = {name: [number_of(frame) for clip in of for frame in clip] for name, of in clips.items()}
            assert numbers["all"] == numbers["videos"]
            if stride == 4:
                stored = [number_of(frame) for frame in reader.read(paths["first"], samples)[0]]
                assert np.diff(stored).tolist() == [4, 4, 4]
                assert stored[0] % 4 == 0
                seen.add(stored[0])
    assert seen == {0, 4, 8, 12, 16, 20, 24}


def number_of(frame):
    return round(float(frame.mean()) / 6)


@pytest.mark.long
def test_learns_as_from_the_originals(originals, sets, tmp_path):
    flags = ("--steps", 60, "--log.every", 10, "--sampling.stride", 2, "--data.views-per-decode", 2)
    losses = {}
    for name, source in (("original", originals), *sets.items()):
        assert run(source, tmp_path / name, *flags) == 0
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    assert losses["original"][-1] < 0.95 * losses["original"][0]
    for codec in sets:
        # step by step the same clips, crops and masks; only the coding noise differs
        assert losses[codec] == pytest.approx(losses["original"], rel=0.04)


@pytest.mark.long
def test_a_truncated_shard_costs_the_videos_behind_the_cut(copy, sets):
    shard = copy / "shard-00001.tar"
    os.truncate(shard, shard.stat().st_size * 2 // 3)
    assert any("shard-00001.tar" in note for note in find_videos(copy).notes)
    lost = lost_and_kept(read(copy), read(sets["h264-fast"], workers=0))
    assert set(lost) == {3}
    assert "shard-00001.tar::3" in lost[3]


@pytest.mark.long
def test_a_missing_shard_costs_its_videos(copy, sets):
    (copy / "shard-00002.tar").unlink()
    assert any("shard-00002.tar" in note for note in find_videos(copy).notes)
    lost = lost_and_kept(read(copy), read(sets["h264-fast"], workers=0))
    assert set(lost) == {4, 5}
    assert all("shard-00002.tar::" in reason and "missing" in reason for reason in lost.values()), lost


@pytest.mark.long
def test_a_shard_that_blocks_costs_its_videos(copy, sets):
    """A pipe in place of a shard: opening it hangs in the kernel, as a dead network disk does."""
    (copy / "shard-00000.tar").unlink()
    os.mkfifo(copy / "shard-00000.tar")
    lost = lost_and_kept(read(copy, timeout=5, epochs=1), read(sets["h264-fast"], workers=0, epochs=1))
    assert set(lost) == {0, 1}
    assert all("longer than 5 s" in reason for reason in lost.values())


@pytest.mark.long
def test_a_wrong_index_gives_no_other_videos_clip(copy, sets):
    lines = [json.loads(line) for line in (copy / "index.jsonl").read_text().splitlines()]
    lines[2]["offset"], lines[3]["offset"] = lines[3]["offset"], lines[2]["offset"]
    lines[5]["offset"] += 512
    (copy / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lost = lost_and_kept(read(copy), read(sets["h264-fast"], workers=0))
    assert set(lost) == {2, 3, 5}
    assert all("does not match" in reason for reason in lost.values()), lost


@pytest.mark.long
def test_a_run_goes_on_over_damage_and_names_it(copy, tmp_path, capsys):
    (copy / "shard-00002.tar").unlink()
    data = bytearray((copy / "shard-00000.tar").read_bytes())
    data[2000:6000] = os.urandom(4000)
    (copy / "shard-00000.tar").write_bytes(data)
    out = tmp_path / "run"
    assert run(copy, out, "--steps", 6, "--workers", 1, "--sampling.stride", 2) == 0
    said = capsys.readouterr().err
    assert "shard-00002.tar" in said
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {entry["index"] for entry in skipped} - {0, 1} == {4, 5}
    assert all("shard-0000" in entry["path"] and entry["reason"] for entry in skipped)
    assert metrics(out)[-1]["skipped_clips"] == len(skipped)
    assert metrics(out)[-1]["loss"] is not None


@pytest.mark.long
def test_a_killed_run_ends_bit_identical_with_other_workers(sets, tmp_path):
    flags = (
        "--steps",
        60,
        "--checkpoint.every",
        3,
        "--checkpoint.keep",
        99,
        "--data.views-per-decode",
        4,
        "--data.windows",
        2,
    )
    flags = (*flags, "--micro-batch", 6, "--sampling.stride", 2, "--workers")
    assert run(sets["jpeg"], tmp_path / "whole", *flags, 0) == 0
    killed = start(sets["jpeg"], tmp_path / "killed", *flags, 1)
    wait_for(lambda: (tmp_path / "killed" / "checkpoints" / "step_6").exists())
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step_60").exists()
    assert run(sets["jpeg"], tmp_path / "killed", *flags, 2) == 0
    assert_same(weights(tmp_path / "whole", 60), weights(tmp_path / "killed", 60))
    # and lines for every step, once
    assert [line["step"] for line in metrics(tmp_path / "killed")] == list(range(2, 61, 2))


@pytest.mark.long
def test_a_set_of_some_frames_suits_multiples_of_its_stride_only(originals, tmp_path, capsys):
    flags = ("--stride", "2", "--phases", "first", "--short-side", "48", "--workers", "1")
    assert prepare([str(originals), str(tmp_path / "set"), *flags]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "set", tmp_path / "run", "--steps", 2, "--sampling.stride", 3)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "holds frames 0, 2, 4, ... only: --sampling.stride must be a multiple of 2, not 3" in said
    assert len(said.splitlines()) == 1
    assert run(tmp_path / "set", tmp_path / "run", "--steps", 2, "--sampling.stride", 4) == 0


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_trains_from_a_url_as_from_the_folder(sets, tmp_path, scheme):
    url = f"{scheme}://{sets['jpeg'] if scheme == 'file' else '/bucket/set'}"
    if scheme == "memory":
        fsspec.filesystem("memory").put(str(sets["jpeg"]), "/bucket/set", recursive=True)
    # memory:// is this process's own; file:// is read by workers
    flags = ("--steps", 6, "--sampling.stride", 2, "--workers", 0 if scheme == "memory" else 1)
    assert run(url, tmp_path / "url", *flags, "--data.cache", tmp_path / "cache") == 0
    assert run(sets["jpeg"], tmp_path / "folder", *flags) == 0
    assert_same(weights(tmp_path / "url", 6), weights(tmp_path / "folder", 6))
    kept = list((tmp_path / "cache").glob("**/*.block"))
    assert bool(kept) == (scheme == "memory")


@pytest.mark.long
def test_a_prepared_set_moves(sets, tmp_path):
    """Everything in a set is relative to its folder."""
    moved = shutil.copytree(sets["jpeg"], tmp_path / "elsewhere" / "set")
    here, there = read(sets["jpeg"], workers=0, epochs=1), read(moved, workers=0, epochs=1)
    assert lost_and_kept(there, here) == {}
