"""The pre-flight: every kind of finding by name, the list of what is good, and the speed of decoding."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pytest

from tests.videos import moving_frames, write_video
from videomae.data.check import Limits, check_videos, main
from videomae.data.check_file import Examiner, Look, examine
from videomae.data.check_list import write_list
from videomae.data.check_report import printable
from videomae.data.dataset import VideoList, find_videos
from videomae.data.decode import Video
from videomae.data.pool import perform_all
from videomae.data.prepare import main as prepare

COMMAND = [sys.executable, "-m", "videomae.data.check"]


def fill(folder):
    """A folder of videos of every kind, and its list; what is expected of each line, in order."""
    long = write_video(folder / "good.mp4", moving_frames(66, seed=1))
    (folder / "my videos").mkdir()
    write_video(folder / "my videos" / "clip 2.mp4", moving_frames(66, seed=2), bf="0")
    write_video(folder / "short.avi", moving_frames(20, seed=3), codec="mpeg4")
    write_video(folder / "still.mp4", moving_frames(1, seed=4))
    shutil.copy(long, folder / "copy.mp4")
    os.link(long, folder / "hard link.mp4")
    (folder / "alias.mp4").symlink_to("good.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    whole = write_video(folder / "whole.mkv", moving_frames(90, seed=5), bf="0").read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    os.remove(folder / "whole.mkv")
    write_broken(folder / "broken end.mp4", 0.92, 1)
    write_video(folder / "forgotten.mp4", moving_frames(5, seed=6))
    # below the list under a name that it does not use, yet listed
    (folder / "alias of short.avi").symlink_to("short.avi")
    write_video(folder / "real name.mp4", moving_frames(80, seed=7))
    (folder / "other name.mp4").symlink_to("real name.mp4")
    expected = [
        ("good.mp4", 0, "ok", None),
        ("my videos/clip 2.mp4", 1, "ok", None),
        ("short.avi", 2, "repeats frames", "20 frames, a clip spans 64"),
        ("still.mp4", 3, "too short", "a single frame"),
        ("copy.mp4", 4, "duplicate", "the same bytes (label 4, there 0)"),
        ("hard link.mp4", 0, "duplicate", "the same bytes"),
        ("alias.mp4", 0, "duplicate", "the same file, by another name"),
        ("short.avi", 5, "duplicate", "listed before (label 5, there 2)"),
        ("empty.mp4", 0, "unreadable", "an empty file"),
        ("text.mp4", 0, "unreadable", "it is text: 'version https://git-lfs"),
        ("folder.mp4", 0, "unreadable", "directory"),
        ("dangling.mp4", 0, "missing", "a link to nowhere.mp4"),
        ("gone.mp4", 0, "missing", None),
        ("good.mp4/inside.mp4", 0, "missing", None),
        ("other name.mp4", 0, "ok", None),
        ("cut.mkv", 6, "cut short", "of 3.6 seconds are there"),
        ("broken end.mp4", 0, "unreadable", "last frame: damaged"),
    ]
    (folder / "list.txt").write_text("".join(f"{name} {label}\n" for name, label, _, _ in expected))
    return expected


def write_broken(path, begin, end):
    """A video whose bytes from begin to end, as parts of all, are zeros; its table comes before them."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 10
        for image in moving_frames(70):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    hole = slice(int(len(data) * begin), int(len(data) * end))
    data[hole] = bytes(len(data[hole]))
    path.write_bytes(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    expected = fill(folder)
    files = ["--json", "report.json", "--write-clean-list", "clean.txt"]
    process = subprocess.run(
        [*COMMAND, "list.txt", *files, "--workers", "2"], cwd=folder, env=environment(), capture_output=True, text=True
    )
    return folder, expected, process


def environment():
    return dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[3]))


@pytest.mark.long
def test_finds_every_kind_by_name_and_reason(run):
    folder, expected, process = run
    assert process.returncode == 1, process.stderr
    assert process.stderr == ""
    report = json.loads((folder / "report.json").read_text())
    assert report["ok"] is False
    assert report["path"] == "list.txt"
    for entry, (name, label, status, reason) in zip(report["files"], expected, strict=True):
        assert (entry["path"], entry["label"], entry["status"]) == (str(folder / name), label, status), entry
        assert (reason is None) == ("reason" not in entry), entry
        assert reason is None or reason in entry["reason"], entry
        if status == "duplicate":
            first = "short.avi" if name == "short.avi" else "good.mp4"
            assert entry["duplicate_of"] == str(folder / first)
    assert report["unlisted"] == [str(folder / "forgotten.mp4")]
    counts = {"files": 17, "ok": 3, "missing": 3, "unreadable": 4, "too short": 1, "duplicate": 4}
    assert report["counts"] == counts | {"cut short": 1, "repeats frames": 1, "unlisted": 1}


@pytest.mark.long
def test_says_of_each_file_what_it_is(run):
    folder, _, _ = run
    by_name = {Path(e["path"]).name: e for e in json.loads((folder / "report.json").read_text())["files"][::-1]}
    good = by_name["good.mp4"]
    assert (good["frames"], good["width"], good["height"], good["fps"]) == (66, 64, 48, 25)
    assert (good["codec"], good["bytes"]) == ("h264", (folder / "good.mp4").stat().st_size)
    assert good["seconds"] == pytest.approx(66 / 25)
    assert by_name["short.avi"]["codec"] == "mpeg4"
    assert by_name["still.mp4"]["frames"] == 1
    assert by_name["empty.mp4"]["bytes"] == 0
    assert "bytes" not in by_name["gone.mp4"]


@pytest.mark.long
def test_prints_a_page_that_reads_well_in_a_log(run):
    _, _, process = run
    page = process.stdout
    assert page.startswith("checking  list.txt: a list of 17 videos; 2 workers, at most 60 s for each file\n")
    for line in (
        "files     17",
        "size      64x48 (9)",
        "codec     h264 (8), mpeg4 (1)",
        "unreadable: 4",
        "duplicate: 4",
        "unlisted: 1 (not counted as wrong)",
        "  forgotten.mp4",
        "all of it: report.json",
        "clean list: clean.txt, 5 videos",
    ):
        assert f"{line}\n" in page, page
    assert "5 good, 12 wrong; 16 files read in" in page
    assert "  gone.mp4\n" in page
    assert "  alias.mp4      the same file, by another name: good.mp4\n" in page
    assert "\x1b" not in page
    assert "\r" not in page
    assert max(map(len, page.splitlines())) < 250


@pytest.mark.long
def test_the_clean_list_is_good_and_a_second_check_says_so(run, capsys):
    folder, _, _ = run
    clean = find_videos(folder / "clean.txt")
    assert clean.paths == tuple(
        str(folder / n) for n in ("good.mp4", "my videos/clip 2.mp4", "short.avi", "other name.mp4", "cut.mkv")
    )
    assert clean.labels == (0, 1, 2, 0, 6)
    assert main([str(folder / "clean.txt"), "--workers", "1", "--frames", "4"]) == 0
    assert "5 good, nothing wrong" in capsys.readouterr().out


@pytest.mark.long
def test_checks_a_folder_and_a_single_video(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", moving_frames(20))
    write_video(tmp_path / "b.mp4", moving_frames(20, seed=1))
    assert main([str(tmp_path), "--workers", "1", "--frames", "4"]) == 0
    assert "a folder of 2 videos" in capsys.readouterr().out
    assert main([str(tmp_path / "b.mp4"), "--write-clean-list", str(tmp_path / "one")]) == 0
    assert "repeats frames: 1 (not counted as wrong)" in capsys.readouterr().out
    assert find_videos(tmp_path / "one").paths == (str(tmp_path / "b.mp4"),)
    (tmp_path / "b.mp4").write_bytes(b"")
    assert main([str(tmp_path / "b.mp4"), "--write-clean-list", str(tmp_path / "none")]) == 1
    assert "no file is good" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("hole", "which"), [((0.15, 0.25), "first"), ((0.6, 0.75), "middle"), ((0.92, 1), "last")])
def test_decodes_the_ends_and_the_middle(tmp_path, hole, which):
    write_broken(tmp_path / "a.mp4", *hole)
    found = examine(str(tmp_path / "a.mp4"))
    assert found.status == "unreadable"
    assert found.reason.startswith(f"{which} frame: damaged")


def test_sound_that_goes_on_longer_is_no_cut(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        video, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=8000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        images = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in moving_frames(50)]
        noise = np.random.default_rng(0).uniform(-1, 1, (1, 40 * 1024)).astype(np.float32)
        waves = [av.AudioFrame.from_ndarray(part, format="fltp", layout="mono") for part in np.split(noise, 40, 1)]
        for number, wave in enumerate(waves):
            wave.sample_rate, wave.pts = 8000, number * 1024
        for stream, frames in ((video, images), (sound, waves)):
            for packet in [p for frame in [*frames, None] for p in stream.encode(frame)]:
                container.mux(packet)
    found = examine(str(tmp_path / "a.mp4"))
    assert (found.status, found.seconds, found.stated) == ("ok", 2, 2)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration > 5e6


@pytest.mark.long
@pytest.mark.parametrize("layout", ["shards", "files"])
def test_checks_a_prepared_set(tmp_path, capsys, layout):
    (tmp_path / "in").mkdir()
    for name in "abc":
        write_video(tmp_path / "in" / f"{name}.mp4", moving_frames(30, seed=ord(name)))
    made = tmp_path / "set"
    assert prepare([str(tmp_path / "in"), str(made), "--layout", layout, "--shard-videos", "2", "--workers", "1"]) == 0
    capsys.readouterr()
    command = [str(made), "--json", str(tmp_path / "out.json"), "--frames", "4", "--workers", "1"]
    assert main(command) == 0
    assert "a prepared set of 3 videos" in capsys.readouterr().out
    for entry in json.loads((tmp_path / "out.json").read_text())["files"]:
        assert (entry["status"], entry["frames"], entry["fps"], entry["codec"]) == ("ok", 30, 25, "prepared")
        assert (entry["width"], entry["height"]) == (64, 48)
    # the last of the three
    os.remove(made / ("shard-00001.tar" if layout == "shards" else "files/c.json"))
    assert main(command) == 1
    assert [e["status"] for e in json.loads((tmp_path / "out.json").read_text())["files"]] == ["ok", "ok", "unreadable"]
    assert ("note: " in capsys.readouterr().out) == (layout == "shards")
    assert main([str(made), "--write-clean-list", str(tmp_path / "list")]) == 2
    assert "a list cannot name videos of a prepared set" in capsys.readouterr().err


@pytest.mark.long
def test_a_file_that_hangs_costs_its_time_limit(tmp_path):
    write_video(tmp_path / "a.mp4", moving_frames(20))
    os.mkfifo(tmp_path / "b.mp4")  # opening it blocks in C
    write_video(tmp_path / "c.mp4", moving_frames(20, seed=1))
    begin = time.monotonic()
    command = [*COMMAND, str(tmp_path), "--timeout", "2", "--workers", "1", "--json", str(tmp_path / "out.json")]
    process = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert time.monotonic() - begin < 40
    assert process.returncode == 1
    assert "b.mp4  took longer than 2 s" in process.stdout
    statuses = {Path(e["path"]).name: e["status"] for e in json.loads((tmp_path / "out.json").read_text())["files"]}
    assert statuses == {"a.mp4": "repeats frames", "b.mp4": "unreadable", "c.mp4": "repeats frames"}


@pytest.mark.long
def test_ctrl_c_ends_it_with_one_line(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    command = [*COMMAND, str(tmp_path), "--json", str(tmp_path / "out.json")]

    def heed() -> None:
        # a job in the background is started with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), preexec_fn=heed, **pipes) as process:
        assert process.stdout.readline().startswith(b"checking")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == b"videomae.data.check: interrupted\n"
    assert not (tmp_path / "out.json").exists()


@pytest.fixture
def readable_by_all():
    """A folder that another user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_a_file_without_permission_is_named(readable_by_all):
    video = write_video(readable_by_all / "a.mp4", moving_frames(4))
    (readable_by_all / "closed").mkdir(mode=0)
    video.chmod(0)
    # nothing is forbidden to root
    nobody = 65534
    if os.geteuid() == 0:
        os.seteuid(nobody)
    try:
        found = examine(str(video)), examine(str(readable_by_all / "closed" / "b.mp4"))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    assert [one.status for one in found] == ["unreadable"] * 2
    assert [one.reason for one in found] == ["Permission denied"] * 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "no such file or folder"),
        (["empty"], "no videos in"),
        (["list", "--write-clean-list", "list"], "would overwrite list"),
        (["list", "--write-clean-list", "other name"], "would overwrite list"),
        (["list", "--json", "list"], "would overwrite list"),
        (["list", "--json", "out", "--write-clean-list", "./out"], "must be different files"),
        (["list", "--json", "a.mp4"], "must not be named like a video"),
        (["list", "--write-clean-list", "empty"], "must be a file"),
        (["list", "--timeout", "0"], "--timeout must be"),
        (["list", "--workers", "0"], "--workers must be"),
        (["list", "--stride", "0"], "--frames and --stride must be positive"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refuses_wrong_use_before_anything_is_read(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").write_text("a.mp4 1\n")
    (tmp_path / "other name").symlink_to("list")
    assert main(arguments) == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    assert errors.startswith("videomae.data.check: ")
    assert says in errors
    assert (tmp_path / "list").read_text() == "a.mp4 1\n"


NAMES = ["plain.mp4", "two  spaces.mp4", "a number.v 7", "minus.v -1", " before.mp4", "\ufeffmark.mp4", "dir 3/x.mp4"]
NAMES += ["ünï.mp4", "x.mp4 0 -1.mp4", "a.b 0 5"]


@pytest.mark.parametrize("labels", [None, tuple(range(-1, len(NAMES) - 1))], ids=["no labels", "labels"])
@pytest.mark.parametrize("below", [True, False], ids=["below the list", "elsewhere"])
def test_a_list_reads_back_whatever_the_names(tmp_path, labels, below):
    folder = tmp_path if below else tmp_path.parent / "elsewhere"
    names = [n for n in NAMES if labels is None or n != "minus.v -1"]
    labels = None if labels is None else labels[: len(names)]
    paths = tuple(str(folder / name) for name in names)
    write_list(tmp_path / "list.txt", paths, labels)
    found = find_videos(tmp_path / "list.txt")
    assert found.paths == paths
    assert found.labels == labels
    text = (tmp_path / "list.txt").read_text()
    assert (str(folder) in text) != below


@pytest.mark.parametrize("name", ["two\nlines.mp4", "end .mp4 ", "not utf-8 \udcff.mp4", "line\u2028mark.mp4"])
def test_refuses_names_that_no_list_can_hold(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be written in a list"):
        write_list(tmp_path / "list.txt", [str(tmp_path / "a.mp4"), str(tmp_path / name)], None)
    assert list(tmp_path.iterdir()) == []


def test_names_are_printed_without_control_characters():
    assert printable("a\x1b[31m\n\udcff ü") == "a\\x1b[31m\\n\\udcff ü"


def test_the_worst_file_is_named_too(tmp_path, monkeypatch):
    """What the decoder has no word for, such as a picture larger than memory."""

    def fail(self, indices):
        raise MemoryError("cannot allocate 3 TB")

    path = write_video(tmp_path / "a.mp4", moving_frames(4))
    monkeypatch.setattr(Video, "read", fail)
    found = examine(str(path))
    assert (found.status, found.reason) == ("unreadable", "MemoryError: cannot allocate 3 TB")


CLIPS = {
    "arm_wrestling.mp4": ("ok", 280, 340, 256, 28, "h264"),
    "ava_like.mp4": ("repeats frames", 57, 340, 256, 6, "h264"),
    "baseball_1080p.mp4": ("ok", 72, 1920, 1080, 28.05, "h264"),
    "pancake_h264.mkv": ("ok", 310, 426, 240, 30, "h264"),
    "structuralize.mp4": ("ok", 300, 426, 240, 29.97, "h264"),
    "test_kinetics.mp4": ("ok", 300, 340, 256, 30, "h264"),
    "test_mpeg4.avi": ("ok", 164, 320, 240, 25, "mpeg4"),
}
HARD = {
    "av1_video.mkv": ("ok", 125, 640, 360, 25, "av1"),
    # frames that an edit list hides are neither counted nor missed
    "discard_first_keyframe.mp4": ("repeats frames", 25, 64, 64, 25, "h264"),
    "h265_video.mp4": ("repeats frames", 10, 128, 128, 10, "hevc"),
    # upright sizes: the stored ones are 480x270 and 568x320
    "nasa_13013_rotated.mp4": ("repeats frames", 17, 270, 480, 29.97, "h264"),
    "video_90.mov": ("repeats frames", 3, 320, 568, 30, "h264"),
    "test_non_zero_start.mp4": ("repeats frames", 12, 200, 112, 30, "h264"),
    "testsrc2_odd_height_and_width_mpeg2.mp4": ("repeats frames", 10, 121, 81, 25, "mpeg2video"),
    "unordered.mov": ("repeats frames", 4, 50, 50, 32, "h264"),
}


@pytest.mark.long
def test_knows_the_ordinary_and_the_odd_files(clips, hard, tmp_path, capsys):
    folders = {"clips": (clips, CLIPS, 0), "hard": (hard, HARD, 1)}
    for name, (folder, expected, code) in folders.items():
        out = tmp_path / f"{name}.json"
        assert main([str(folder), "--json", str(out)]) == code
        entries = {Path(entry["path"]).name: entry for entry in json.loads(out.read_text())["files"]}
        if name == "hard":
            # its beginning and middle can be read: test_decode.py
            corrupted = entries.pop("corrupted.mp4")
            assert corrupted["status"] == "unreadable"
            assert corrupted["reason"].startswith("middle and last frame: damaged")
        got = {
            name: (e["status"], e["frames"], e["width"], e["height"], round(e["fps"], 2), e["codec"])
            for name, e in entries.items()
        }
        assert got == expected
    assert "corrupted.mp4" in capsys.readouterr().out


@pytest.mark.long
def test_is_as_fast_as_decoding(clips, tmp_path):
    """One worker beside a plain loop, in turn; from its first answer on, so that its start does not count."""
    ratios = []
    for turn in range(3):
        paths = []
        # names that no cache of an index knows
        for copy in range(4):
            for clip in sorted(clips.iterdir()):
                paths.append(str(tmp_path / f"{turn}-{copy}-{clip.name}"))
                os.symlink(clip, paths[-1])
        arrivals = []
        for outcome in perform_all(Examiner(), [Look(path) for path in paths], workers=1, timeout=60):
            assert outcome.value.status == "ok"
            arrivals.append(time.perf_counter())
        begin = time.perf_counter()
        for path in paths[1:]:
            video = Video(path)
            video.read([0, len(video) // 2, len(video) - 1])
        ratios.append((time.perf_counter() - begin) / (arrivals[-1] - arrivals[0]))
    assert statistics.median(ratios) > 0.7, ratios


def test_an_unreadable_list_beside_and_a_step_are_said(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(8))
    videos = VideoList((str(path),), None, 3, ("shard-00001.tar is missing",))
    report = check_videos(str(tmp_path), videos, Limits(frames=2, stride=2))
    assert report.notes[0] == "shard-00001.tar is missing"
    assert "every 3th frame" in report.notes[1]
    assert np.isfinite(report.seconds)
