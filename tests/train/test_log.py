"""What a run writes beside its checkpoints, on a disk that is full: said every time, and the run goes on."""

import contextlib
import os
import shutil
import subprocess
import sys

import pytest

from tests.runs import FAST, assert_same, weights
from tests.train.test_checkpoint import no_file_past
from tests.videos import moving_frames, write_video
from train.log import Lines, goes_on, say, whole_lines
from train.skipped import Skipped
from videomae.data.dataset import Sample
from videomae.data.loader import Skip

STEPS = 150
# to the shell: the run folder is a disk of 64 KB, but checkpoints have room elsewhere; what is left is copied out
ON_A_FULL_DISK = """\
mount -t tmpfs -o size=64k tmpfs "$OUT" && mkdir "$OUT/checkpoints" && mount --bind "$ROOM" "$OUT/checkpoints" || exit 1
"$@"
code=$?
df --output=avail "$OUT" | tail -n 1 > "$LEFT/room"
ls -A "$OUT" "$OUT/samples" > "$LEFT/names" 2> /dev/null
exit $code
"""


def test_a_full_disk_is_said_and_what_it_did_not_take_comes_later(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = Lines(path)
    lines.add({"step": 1})
    with no_file_past(20):
        for step in (2, 3):
            with goes_on("a.jsonl"):
                lines.add({"step": step})
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" could not be written: ")[0] for line in said] == ["warning: a.jsonl"] * 2
    assert all(line.endswith("; the run goes on") for line in said)
    # a part of the second fitted
    assert path.read_text() == '{"step": 1}\n{"step":'
    assert whole_lines(path) == ['{"step": 1}\n']
    lines.add({"step": 4})
    assert path.read_text() == "".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4))


def test_a_skipped_clip_is_known_where_its_record_cannot_be_written(tmp_path, capsys):
    path, paths = tmp_path / "skipped.jsonl", [f"/videos/{i}.mp4" for i in range(2000)]
    skipped = Skipped(path, paths, 0)
    skips = [Skip(Sample(0, i, 0), paths[i], "damaged") for i in range(3)]
    with no_file_past(0):
        assert skipped.see([skips[0].sample], skips[:1], 1) == skips[:1]
        assert set(skipped.see([skip.sample for skip in skips[1:]], skips[1:], 2)) == set(skips[1:])
    assert list(skipped.known) == [skip.sample for skip in skips]
    assert whole_lines(path) == []
    assert capsys.readouterr().err.count("warning: skipped.jsonl could not be written") == 2
    skipped.flush()
    assert list(Skipped(path, paths, 2).known) == [skip.sample for skip in skips]


def test_a_message_that_nobody_can_be_told_ends_nothing(monkeypatch):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115  # closing it would raise
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(OSError, match="No space"):
        print("a line", file=full)
    with goes_on("a picture"):
        raise OSError("full, too")
    say("a line")
    with contextlib.suppress(OSError):
        full.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six, of which one cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_video(folder / f"{i}.mp4", moving_frames(14, 24, 32, seed=i))
    (folder / "3.mp4").write_bytes(b"broken")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("processes", [0, 2])
def test_a_run_on_a_full_disk_ends_with_the_weights_of_any_other(processes, videos, tmp_path):
    folders = {name: tmp_path / name.lower() for name in ("OUT", "ROOM", "LEFT")}
    for folder in folders.values():
        folder.mkdir()
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_FULL_DISK, "sh"]
    environment = {**os.environ, **{name: str(path) for name, path in folders.items()}, "OMP_NUM_THREADS": "1"}
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], env=environment).returncode != 0:
        pytest.skip("nothing can be mounted here")
    flags = [*FAST.split(), "--steps", str(STEPS), "--log.every", "1", "--log.picture-every", "50"]
    flags += ["--log.tensorboard", "true", "--checkpoint.every", "50"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes else []
    command = [sys.executable, "-m", *torchrun, "train.pretrain", "demo", *flags, "--data", str(videos)]
    done = subprocess.run(
        [*inside, *command, "--out", str(folders["OUT"])], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (folders["LEFT"] / "room").read_text().strip() == "0"
    for what in ("metrics.jsonl", "skipped", "a picture in samples/", "tensorboard/", "curves.png"):
        assert f"warning: {what}" in done.stderr, done.stderr
    whole = tmp_path / "whole"
    subprocess.run([*command, "--out", str(whole)], env=environment, check=True, capture_output=True)
    (tmp_path / "ended").mkdir()
    (tmp_path / "ended" / "checkpoints").symlink_to(folders["ROOM"])
    for step in (50, 100, STEPS):
        assert_same(weights(whole, step), weights(tmp_path / "ended", step))
    assert ".tmp" not in (folders["LEFT"] / "names").read_text()
