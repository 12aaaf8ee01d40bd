"""The command that writes features: what its files hold, that it goes on after a kill, and what it refuses."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import videomae
from tests.runs import wait_for
from tests.videos import moving_frames, write_video
from train import feature_files, features
from train.features import main
from videomae.data import prepare
from videomae.features import video_features
from videomae.weights import save_weights

LENGTHS = {"a/one.mp4": 14, "a/two.mp4": 41, "b/two.mp4": 8, "three.mp4": 3}


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for seed, (name, frames) in enumerate(LENGTHS.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, moving_frames(frames, 32, 48, seed=seed))
    return folder


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1)
    save_weights(model, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def run(videos, weights, out, *flags):
    return main([str(videos), "--weights", str(weights), "--out", str(out), "--workers", "0", *map(str, flags)])


def index(out):
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock")


def contents(out):
    return {name: (out / name).read_bytes() for name in files(out) if name.endswith((".safetensors", ".npy"))}


@pytest.mark.parametrize("level", ["clip", "token"])
def test_each_video_gets_a_file_with_its_windows(videos, weights, tmp_path, capsys, level):
    out = tmp_path / "out"
    assert run(videos, weights, out, "--stride", 2, "--hop", 5, "--level", level) == 0
    assert "4 videos, 13 windows" in capsys.readouterr().out
    assert files(out) == sorted([*(f"{name}.safetensors" for name in LENGTHS), "features.json", "index.jsonl"])
    model, _ = videomae.model_from(weights)
    lines = {line["video"]: line for line in index(out)}
    assert set(lines) == set(LENGTHS)
    for name, frames in LENGTHS.items():
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"video": name, "frames": str(frames), "rate": "25"}
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        expected = video_features(model, videos / name, stride=2, hop=5, level=level)
        torch.testing.assert_close(found["features"], expected, rtol=1e-5, atol=1e-5)
        starts = [*range(0, frames - 8, 5), max(frames - 8, 0)]
        assert found["starts"].tolist() == lines[name]["starts"] == starts
        assert found["seconds"].tolist() == pytest.approx([start / 25 for start in starts])
        assert lines[name]["seconds"] == pytest.approx([start / 25 for start in starts])
        assert lines[name]["windows"] == len(expected)
        assert lines[name]["file"] == f"{name}.safetensors"


@pytest.mark.parametrize("level", ["clip", "token"])
def test_npy_files_hold_the_same_in_the_dtype_asked_for(videos, weights, tmp_path, level):
    run(videos, weights, tmp_path / "a", "--level", level)
    run(videos, weights, tmp_path / "b", "--level", level, "--format", "npy", "--dtype", "float16")
    for name in LENGTHS:
        whole = load_file(tmp_path / "a" / f"{name}.safetensors")["features"].numpy()
        short = np.load(tmp_path / "b" / f"{name}.npy")
        assert short.dtype == np.float16
        assert np.array_equal(short, whole.astype(np.float16))


def test_names_that_differ_in_their_end_only_are_two_files(videos, weights, tmp_path):
    (videos / "three.mp4").rename(videos / "a" / "one.avi")
    (videos / "b" / "two.mp4").rename(videos / "a" / "ONE.mp4")
    run(videos, weights, tmp_path / "out")
    names = [line["file"] for line in index(tmp_path / "out")]
    assert len({name.lower() for name in names}) == 4
    assert "a/one.avi.safetensors" in names
    assert sum(name.startswith("a/one.mp4~") for name in names) == 1
    assert sum(name.startswith("a/ONE.mp4~") for name in names) == 1


def test_a_list_may_name_a_video_twice_and_others_from_elsewhere(videos, weights, tmp_path):
    (tmp_path / "lists").mkdir()
    lines = (f"{videos}/a/one.mp4 0", "../videos/three.mp4 1", f"{videos}/a/one.mp4 0")
    (tmp_path / "lists" / "all.csv").write_text("\n".join(lines))
    run(tmp_path / "lists" / "all.csv", weights, tmp_path / "out")
    names = [line["video"] for line in index(tmp_path / "out")]
    assert names == [f"{str(videos)[1:]}/a/one.mp4", "videos/three.mp4"]
    assert all((tmp_path / "out" / f"{name}.safetensors").is_file() for name in names)


@pytest.mark.long
def test_a_prepared_set_gives_files_by_the_names_of_its_sources(videos, weights, tmp_path, capsys):
    prepare.main([str(videos), str(tmp_path / "set"), "--workers", "1", "--phases", "first", "--short-side", "32"])
    run(tmp_path / "set", weights, tmp_path / "out")
    assert {line["video"] for line in index(tmp_path / "out")} == set(LENGTHS)
    assert load_file(tmp_path / "out/a/two.mp4.safetensors")["starts"].tolist() == [0, 16, 24]
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "set", weights, tmp_path / "other", "--stride", 3)
    assert end.value.code == 2
    assert "which do not suit a stride of 3" in capsys.readouterr().err


@pytest.mark.parametrize("at_once", [1, 16])  # windows: the damage is in the middle of many, or of one batch
def test_videos_that_cannot_be_read_are_listed_and_the_others_done(
    videos, weights, tmp_path, capsys, monkeypatch, at_once
):
    monkeypatch.setattr(features, "_AT_ONCE", at_once)
    damaged = bytearray(write_video(videos / "a/two.mp4", moving_frames(120, 32, 48)).read_bytes())
    (videos / "b/two.mp4").write_bytes(b"no video at all")
    third = len(damaged) // 3
    damaged[third : third + 200] = bytes(200)  # windows before and behind it can be read
    (videos / "a/two.mp4").write_bytes(damaged)
    out = tmp_path / "out"
    assert run(videos, weights, out, "--hop", 4) == 1
    assert "2 unreadable, listed in" in capsys.readouterr().err
    listed = [json.loads(line) for line in (out / "unreadable.jsonl").read_text().splitlines()]
    assert [line["video"] for line in listed] == ["b/two.mp4", "a/two.mp4"]
    assert "damaged" in listed[1]["reason"]
    assert set(contents(out)) == {"a/one.mp4.safetensors", "three.mp4.safetensors"}
    assert not list(out.rglob(".*.tmp"))
    # mended, they are done, and nothing else is done again
    write_video(videos / "a/two.mp4", moving_frames(120, 32, 48))
    write_video(videos / "b/two.mp4", moving_frames(8, 32, 48))
    assert run(videos, weights, out, "--hop", 4) == 0
    assert "2 are done" in capsys.readouterr().out
    assert not (out / "unreadable.jsonl").exists()
    assert len(index(out)) == 4


def test_what_a_kill_left_is_done_again_and_ends_the_same(videos, weights, tmp_path, monkeypatch):
    run(videos, weights, tmp_path / "whole")

    class Killed(Exception):
        pass

    # half a file, nothing in the index; in the second try, a file that the index does not name, and half a line
    for killed_at, attribute in ((2, "replace"), (3, "index")):
        out, calls = tmp_path / f"killed-{attribute}", []
        with monkeypatch.context() as patch:
            name, owner = (
                ("finish", feature_files.FeatureFile) if attribute == "replace" else ("add", feature_files.Ledger)
            )
            real = getattr(owner, name)

            def sometimes(self, *arguments, real=real, calls=calls, killed_at=killed_at, attribute=attribute):
                calls.append(1)
                if len(calls) < killed_at:
                    return real(self, *arguments)
                if attribute == "index":
                    (self._out / "index.jsonl").open("a").write('{"video": "a/tw')
                raise Killed

            patch.setattr(owner, name, sometimes)
            patch.setattr(feature_files.FeatureFile, "abandon", lambda self: self._file.close())
            with pytest.raises(Killed):
                run(videos, weights, out)
        assert len(contents(out)) == killed_at - (attribute == "replace")
        assert run(videos, weights, out) == 0
        assert contents(out) == contents(tmp_path / "whole")
        assert sorted(line["video"] for line in index(out)) == sorted(LENGTHS)
        assert not list(out.rglob(".*.tmp"))


def test_finished_files_stay_as_they_are(videos, weights, tmp_path):
    out = tmp_path / "out"
    run(videos, weights, out)
    path = out / "three.mp4.safetensors"
    before = path.stat().st_mtime_ns
    (out / "a/one.mp4.safetensors").unlink()
    assert run(videos, weights, out) == 0
    assert path.stat().st_mtime_ns == before
    assert (out / "a/one.mp4.safetensors").exists()


def test_parts_share_a_folder(videos, weights, tmp_path):
    run(videos, weights, tmp_path / "whole")
    for part in range(3):
        assert run(videos, weights, tmp_path / "parts", "--shard", f"{part}/3") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # another split of the work knows what is done
    before = (tmp_path / "parts/three.mp4.safetensors").stat().st_mtime_ns
    assert run(videos, weights, tmp_path / "parts") == 0
    assert (tmp_path / "parts/three.mp4.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_other_settings_or_things_is_refused(videos, weights, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    run(videos, weights, out)
    assert "other settings (stride: 4 -> 2; hop: 16 -> 8); give another --out" in refused(
        videos, weights, out, "--stride", 2
    )
    assert "other settings (videos: " in refused(videos / "a", weights, out)
    assert "holds other things" in refused(videos / "a", weights, videos)
    assert "shard must be i/n, i below n; got 2/2" in refused(videos, weights, out, "--shard", "2/2")
    assert "no such file or folder" in refused(videos, tmp_path / "none.safetensors", tmp_path / "b")
    with pytest.raises(SystemExit) as end:
        main([str(videos), "--out", str(out)])
    assert end.value.code == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_do_not_do_the_same_videos(videos, weights, tmp_path):
    run(videos, weights, tmp_path / "out")
    code = "from train.feature_files import locked; from pathlib import Path\n"
    code += "with locked(Path({!r}), range(1, 2)): print('held', flush=True); input()".format(str(tmp_path / "out"))
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit) as end:
        run(videos, weights, tmp_path / "out")
    assert end.value.code == 2
    assert run(videos, weights, tmp_path / "out", "--shard", "3/4") == 0
    other.communicate("\n")


def test_a_feature_too_large_for_float16_stops_the_work(videos, weights, tmp_path, capsys):
    model, _ = videomae.model_from(weights)
    model.encoder.norm.weight.data.mul_(1e6)
    save_weights(model, tmp_path / "large.safetensors")
    assert run(videos, tmp_path / "large.safetensors", tmp_path / "out", "--dtype", "float16") == 1
    assert "a/one.mp4 is not a finite float16" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*one*"))


@pytest.mark.long
def test_workers_change_nothing(videos, weights, tmp_path):
    run(videos, weights, tmp_path / "a", "--hop", 1)
    assert run(videos, weights, tmp_path / "b", "--hop", 1, "--workers", 2) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.long
def test_a_process_that_was_killed_goes_on(videos, weights, tmp_path):
    for number in range(40):
        (videos / f"more-{number}.mp4").symlink_to(videos / "a/two.mp4")
    flags = (str(videos), "--weights", str(weights), "--hop", "1", "--workers", "1")
    run(*flags[:1], weights, tmp_path / "whole", "--hop", 1)
    command = [sys.executable, "-m", "train.features", *flags, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command)
    wait_for(lambda: len(list((tmp_path / "killed").glob("more-*.safetensors"))) >= 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(contents(tmp_path / "killed")) < 44
    subprocess.run(command, check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_name_of_any_length_gets_a_file(videos, weights, tmp_path, capsys):
    """251 bytes, of characters of three: the ending would be too much."""
    long = "語" * 82 + "s.mp4"
    (videos / "three.mp4").rename(videos / long)
    assert run(videos, weights, tmp_path / "out") == 0
    line = next(line for line in index(tmp_path / "out") if line["video"] == long)
    assert len(os.fsencode(line["file"])) <= 255
    assert (tmp_path / "out" / line["file"]).is_file()
    capsys.readouterr()
    assert run(videos, weights, tmp_path / "out") == 0
