"""Damage of every kind, in four kinds of file: the frames asked for are the intact file's, or the file is named with a
reason; nothing crashes or hangs."""

import json
import os
import random
import re
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from videomae.data.augment import Augment
from videomae.data.check import main
from videomae.data.check_file import examine
from videomae.data.dataset import Sample
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.loader import Loader, LoaderConfig
from videomae.data.readers import ClipReader

FRAMES, SIZE, CLIP = 60, 64, 4
# by name: how the intact file is made
SOURCES = {
    "in order.mp4": {"bf": "0"},
    "reordered.mp4": {"bf": "2"},
    "in order.mkv": {"bf": "0"},
    "reordered.mkv": {"bf": "2"},
    "mpeg4.avi": {"codec": "mpeg4"},
    # as on the web: the table comes before the frames, so that what is left of them can be found
    "table first.mp4": {"bf": "0"},
}
# by name: what is left of the bytes
BYTES = {
    "30 %": lambda data: data[: len(data) * 3 // 10],
    "90 %": lambda data: data[: len(data) * 9 // 10],
    "tail cut": lambda data: data[:-200],
    "empty": lambda data: b"",
    "random": lambda data: random.Random(0).randbytes(len(data)),
    "text": lambda data: (b"<html>not found</html>\n" * (len(data) // 23 + 1))[: len(data)],
}
# by name: what stands in the file's place
PLACES = {
    "directory": lambda path: path.mkdir(),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}
# what opens all the same: most MP4s have their table at the end, and without it nothing is left
OPENS = {
    *[(cut, name) for cut in ("30 %", "90 %", "tail cut") for name in SOURCES if "mkv" in name or "first" in name],
    *[(name, "mpeg4.avi") for name in ("90 %", "tail cut")],
}
REASONS = {
    "empty": "Invalid data",
    "random": "Invalid data",
    "text": "Invalid data",
    "directory": "directory",
    "dangling": "no such file",
    "pipe": "took longer than 5 s",
}
READER = ClipReader(frames=CLIP, size=(SIZE, SIZE), stride=1, augment=Augment(scales=(1,)), seed=0)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    for seed, (name, options) in enumerate(SOURCES.items()):
        write_video(folder / name, moving_frames(FRAMES, SIZE, SIZE, seed=seed), **options)
    put_table_first(folder / "table first.mp4")
    return folder


def put_table_first(path):
    plain = path.rename(path.with_suffix(".plain"))
    with av.open(str(plain)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    plain.unlink()


@pytest.fixture(scope="module")
def truth(intact):
    frames = {name: Video(intact / name).read(range(FRAMES)) for name in SOURCES}
    for name, seen in frames.items():
        # otherwise a wrong frame would not be noticed
        assert len({frame.tobytes() for frame in seen}) == FRAMES, name
    return frames


def damaged(intact, folder, damage, name):
    """The source under its own name in a folder of that damage."""
    path = folder / damage / name
    path.parent.mkdir(exist_ok=True)
    if damage in PLACES:
        PLACES[damage](path)
    else:
        path.write_bytes(BYTES[damage]((intact / name).read_bytes()))
    return path


def read(path, epoch):
    """A clip, or the reason why there is none."""
    try:
        return READER.read(path, [Sample(epoch, 0, 0)])[0]
    except UnreadableVideo as error:
        return str(error)


def is_run_of(clip, frames):
    """Whether the clip is frames that follow one another."""
    return any(np.array_equal(clip, frames[k : k + len(clip)]) for k in range(len(frames) - len(clip) + 1))


def test_the_table_is_true_of_intact_files(intact, truth):
    for name in SOURCES:
        clip = READER.read(str(intact / name), [Sample(0, 0, 0)])[0]
        assert is_run_of(clip, truth[name])
        assert not is_run_of(clip[[0, 2, 1, 3]], truth[name])


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("damage", BYTES)
def test_a_clip_is_the_intact_files_or_the_file_is_named(intact, truth, tmp_path, damage, name):
    path = str(damaged(intact, tmp_path, damage, name))
    good = 0
    for epoch in range(40):
        clip = read(path, epoch)
        if isinstance(clip, str):
            assert clip.startswith(f"{path}: {REASONS.get(damage, '')}")
            assert len(clip) > len(path) + 5
        else:
            assert is_run_of(clip, truth[name])
            good += 1
    assert (good > 0) == ((damage, name) in OPENS)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("damage", BYTES)
def test_a_check_says_of_it_what_reading_it_will(intact, tmp_path, damage, name):
    path = str(damaged(intact, tmp_path, damage, name))
    found = examine(path)
    assert found.status in ("ok", "unreadable")
    if (damage, name) not in OPENS:
        assert found.status == "unreadable"
        assert found.reason
        return
    video = Video(path)
    if found.status == "ok":
        assert video.read([0, len(video) - 1]).shape == (2, SIZE, SIZE, 3)
        assert found.frames == len(video) <= FRAMES
    else:
        assert "last frame: damaged" in found.reason
        with pytest.raises(UnreadableVideo):
            video.read([len(video) - 1])


@pytest.mark.long
def test_the_command_names_every_damage(intact, tmp_path, capsys):
    damages = [*BYTES, "directory", "dangling"]
    lines = [damaged(intact, tmp_path, "pipe", "in order.mp4")]
    lines += [damaged(intact, tmp_path, damage, name) for damage in damages for name in SOURCES]
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in lines))
    assert main([str(tmp_path / "list"), "--timeout", "5", "--json", str(tmp_path / "out.json")]) == 1
    entries = json.loads((tmp_path / "out.json").read_text())["files"]
    for path, entry in zip(lines, entries, strict=True):
        damage, name = path.parent.name, path.name
        assert entry["path"] == str(path)
        if (damage, name) in OPENS:
            # less is there than was, or the end does not decode: said one way or the other
            assert entry["status"] in ("repeats frames", "cut short", "unreadable"), entry
        else:
            # all empty files are alike, but that they are empty is what counts
            assert entry["status"] == ("missing" if damage == "dangling" else "unreadable"), entry
            assert entry["reason"]
    assert re.search(r"pipe/in order\.mp4 +took longer than 5 s", capsys.readouterr().out)


@pytest.mark.long
def test_a_loader_skips_by_name_what_is_damaged_and_reads_the_rest(intact, truth, tmp_path):
    paths = [
        str(damaged(intact, tmp_path, damage, name)) for damage in [*BYTES, "directory", "dangling"] for name in SOURCES
    ]
    paths.append(str(damaged(intact, tmp_path, "pipe", "in order.mp4")))
    paths += [str(intact / name) for name in SOURCES]
    samples = [Sample(0, index, 0) for index in range(len(paths))]
    with Loader(READER, paths, [samples], batch_size=len(samples), workers=2, config=LoaderConfig(timeout=5)) as loader:
        batch = next(iter(loader))
        skipped = {skip.sample.index: skip for skip in batch.skips}
        for index, (path, frames, weight) in enumerate(zip(paths, batch.frames, batch.weight, strict=True)):
            damage, name = Path(path).parent.name, Path(path).name
            assert weight == (index not in skipped)
            if index in skipped:
                assert skipped[index].path == path
                assert REASONS.get(damage, "") in skipped[index].reason
                assert frames.max() == 0
            else:
                assert is_run_of(frames.numpy(), truth[name]), path
                assert (damage, name) in OPENS or str(intact) in path
    assert {path for path in paths if str(intact) in path}.isdisjoint(skip.path for skip in skipped.values())


def test_a_file_without_permission_is_named(intact):
    # another user must be able to enter the folder, unlike pytest's
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "closed.mp4")
        path.write_bytes((intact / "in order.mp4").read_bytes())
        path.chmod(0)
        # nothing is forbidden to root
        nobody = 65534
        if os.getuid() == 0:
            os.seteuid(nobody)
        try:
            with pytest.raises(UnreadableVideo, match=r"closed\.mp4: Permission denied"):
                READER.read(str(path), [Sample(0, 0, 0)])
            assert examine(str(path)).reason == "Permission denied"
        finally:
            if os.getuid() == 0:
                os.seteuid(0)


def spoiled(data, size, seed):
    """Random bytes somewhere in the inner half."""
    draws = random.Random(seed)
    start = len(data) // 4 + draws.randrange(len(data) // 2)
    return data[:start] + draws.randbytes(size) + data[start + size :]


@pytest.mark.parametrize("name", SOURCES)
def test_random_bytes_inside_lead_to_frames_or_to_a_reason(intact, tmp_path, name):
    """Whatever they are: nothing else is raised, no frame of another size."""
    data = (intact / name).read_bytes()
    for seed in range(12):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(spoiled(data, (1, 16, 400)[seed % 3], seed))
        assert examine(str(path)).status in ("ok", "unreadable")
        for epoch in range(4):
            clip = read(str(path), epoch)
            assert isinstance(clip, str) or clip.shape == (CLIP, SIZE, SIZE, 3)


def is_noticed(path):
    """Whether the decoder, asked for every frame, says that something is wrong."""
    try:
        with av.open(str(path)) as container:
            return any(frame.is_corrupt for frame in container.decode(video=0))
    except av.FFmpegError:
        return True


@pytest.mark.parametrize("name", SOURCES)
def test_a_clip_through_random_bytes_is_the_intact_files_or_refused(intact, truth, tmp_path, name):
    data = (intact / name).read_bytes()
    wrong = set()
    for seed in range(12):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(spoiled(data, 16, seed))
        # of some changes no decoder can know
        if not is_noticed(path):
            continue
        video = Video(path)
        for start in range(len(video) - CLIP):
            try:
                clip = video.read(range(start, start + CLIP))
            except UnreadableVideo:
                continue
            if not is_run_of(clip, truth[name]):
                wrong.add(seed)
    # bytes that make a frame look as if no other referred to it are skipped with it: one file of these may be like that
    assert len(wrong) <= 1, wrong
