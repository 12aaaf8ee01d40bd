"""Commands that share videos among the processes of torchrun, over gloo: the result of one, whatever their number."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.runs import wait_for
from tests.train.classifiers import DENSE, tiny_classifier, write_labelled
from tests.train.evaluations import assert_same_predictions, evaluate, lines, numbers
from tests.train.test_detect import verb_of
from tests.train.test_distributed import children, rank_of
from train import shares as module
from train.detect import main as detect
from train.distributed import World
from train.feature_files import join_parts, locked
from train.features import main as features
from train.predict import main as predict
from train.probe import main as probe
from train.probe_features import _Extracted, _in_order
from train.shares import Shares, command, first_speaks
from videomae.data.demo_scenes import make_scenes
from videomae.weights import save_weights

LONG = pytest.mark.long
COUNT = 5
KEY_FRAMES = 18  # two batches, one of two


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """test.csv of five videos, and train.csv of seven."""
    folder = tmp_path_factory.mktemp("data")
    train = write_labelled(folder / "train", 7).read_text()
    (folder / "train.csv").write_text(re.sub("^", "train/", train, flags=re.M).removesuffix("train/"))
    write_labelled(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    tiny_classifier(path, sampling=DENSE)
    return path


@pytest.fixture
def many(labelled, tmp_path):
    """A list of 401, which take a few seconds."""
    path = tmp_path / "many.csv"
    path.write_text("".join(f"{labelled}/{i % COUNT}.mp4 {i % COUNT % 3}\n" for i in range(401)))
    return path


def flags_of(data, weights, out):
    return "--data", data, "--weights", weights, "--out", out, "--views", "1x1"


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def start(processes, verb, *flags, restarts=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    launcher += ["--max-restarts", restarts, "-m", f"train.{verb}"]
    words = [*map(str, (*launcher, *flags)), "--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(main, processes, *flags, code=0):
    """The command in so many processes, without torchrun and what it takes to start it; what the first says."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    place = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [*map(str, flags), "--workers", "0", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(processes)]
        ranks = [
            context.Process(target=_be, args=(main, words, {**place, "RANK": rank, "LOCAL_RANK": rank}, said[rank]))
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        texts = [path.read_text() for path in said]
    assert [process.exitcode for process in ranks] == [code] + [0] * (processes - 1), texts
    assert texts[1:] == [""] * (processes - 1)
    return texts[0]


def _be(main, words, variables, said):
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(1)
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(words)
    raise SystemExit(code)


def fail(error):
    def failing(*_):
        print("second")
        print("second", file=sys.stderr)
        raise error

    return failing


def of_two(rank):
    return Shares(World(rank, 2, rank, 2), store="any")


@pytest.mark.parametrize(("count", "together", "size"), [(40, 16, 3), (18, 16, 3), (7, 1, 2), (2, 1, 5), (0, 4, 2)])
def test_shares_are_whole_groups_of_all(count, together, size):
    parts = [Shares(World(rank, size)).take(count, together) for rank in range(size)]
    assert sorted(sum(parts, [])) == list(range(count))
    groups = [tuple(range(i, min(i + together, count))) for i in range(0, count, together)]
    for part in parts:
        assert [tuple(part[i : i + together]) for i in range(0, len(part), together)] == [
            group for group in groups if group[0] in part
        ]
    # nobody has two groups more than another
    sizes = [-(-len(part) // together) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_alone_everything_is_its_own():
    alone = Shares()
    assert (alone.take(3, 2), alone.shard("1/4"), alone.gather("a")) == ([0, 1, 2], "1/4", ["a"])
    assert (alone.wait("end"), alone.wait("end", [signal.SIGTERM])) == (True, False)
    assert (alone.said, alone.unit("videos")) == ("", "videos")


def test_torchrun_gives_a_shard_by_itself():
    assert of_two(1).shard("0/1") == "1/2"
    with pytest.raises(ValueError, match="torchrun shares the work by itself: leave out --shard 1/4"):
        of_two(1).shard("1/4")


def test_waits_until_all_have_come_or_it_is_told_to_stop(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_EVERY", 0.001)
    store = torch.distributed.HashStore()
    stop = []

    class Late(list):
        """A signal that comes while it waits."""

        def __bool__(self):
            self.looked = getattr(self, "looked", 0) + 1
            return self.looked > 3

    first, second = (Shares(World(rank, 2), store) for rank in range(2))
    assert not first.wait("a", Late())
    assert second.wait("a", stop)
    assert second.wait("a", stop)
    assert not second.wait("b", Late())


def test_only_the_first_speaks_and_others_tell_of_errors_later(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    with first_speaks(World(0, 2)):
        print("first")
    with pytest.raises(OSError, match="full"), first_speaks(World(1, 2)):
        fail(OSError("full"))()
    assert capsys.readouterr() == ("first\n", "")
    assert waited == [5]


def test_an_error_of_another_process_names_it(monkeypatch, capsys):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module, "place", lambda: World(1, 2))
    monkeypatch.setattr(module, "_joined", lambda *_: contextlib.nullcontext(Shares(World(1, 2))))

    class Broken(Exception):
        pass

    options = {"prog": "prog", "device": None, "stops": Broken, "after": "; again"}
    assert command(lambda *_: 1, fail(Broken("it broke")), **options) == 1
    assert re.fullmatch(r"prog: process 1 of 2, on \S+: stopped: it broke\n", capsys.readouterr().err)
    assert command(lambda *_: 1, fail(OSError("full")), **options) == 1
    assert capsys.readouterr().err.endswith(": stopped: full; again\n")
    assert command(lambda *_: 1, fail(RuntimeError("gloo: closed")), **options) == 1
    assert "another process is gone, or hangs: gloo: closed; again" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        command(fail(ValueError("wrong")), lambda _: 0, **options)
    assert end.value.code == 2
    assert re.fullmatch(r"prog: process 1 of 2, on \S+: error: wrong\n", capsys.readouterr().err)
    assert command(lambda *_: 1, fail(KeyboardInterrupt()), **options) == 130
    assert capsys.readouterr().err == ""


def test_lists_of_parts_become_one(tmp_path):
    def write(name, *videos):
        (tmp_path / name).write_text("".join(json.dumps({"video": video, "from": name}) + "\n" for video in videos))

    write("index.jsonl", "c", "b", "gone")
    write("index-0-of-3.jsonl", "a")
    write("index-1-of-2.jsonl", "b")
    write("unreadable-0-of-2.jsonl", "d")
    write("unreadable-2-of-3.jsonl", "a", "e")
    listed = join_parts(tmp_path, 2, "abcde")
    found = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [line["video"] for line in found] == ["a", "b", "c", "gone"]
    assert found[1]["from"] == "index-1-of-2.jsonl"
    # those of three processes were tried again by the two
    assert [json.loads(line)["video"] for line in listed.read_text().splitlines()] == ["d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.jsonl", "unreadable.jsonl"]
    join_parts(tmp_path, 2, "abcde")
    assert [path.name for path in tmp_path.iterdir()] == ["index.jsonl"]


def test_a_share_of_no_videos_holds_none(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr("fcntl.lockf", lambda file, how, length, start: held.append((start, length)))
    with locked(tmp_path, range(0)), locked(tmp_path, range(1)), locked(tmp_path, range(1, 1)):
        assert held == [(0, 1)]


def test_features_of_all_shares_stand_as_one_process_reads_them():
    parts = [_Extracted([4, 9, 2], torch.tensor([[4.0], [9], [2]]), []), _Extracted([7], torch.tensor([[7.0]]), [])]
    indices, found = _in_order((4, 5, 7, 9, 2), [*parts, _Extracted([], torch.empty(0, 1), [])])
    assert indices == found[:, 0].tolist() == [4, 7, 9, 2]


def test_a_prediction_is_of_one_process(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        predict(["video.mp4", "--weights", "w"])
    assert end.value.code == 2
    assert "in one process; of many: torchrun -m train.evaluate" in capsys.readouterr().err


@LONG
def test_one_that_is_killed_comes_back_and_every_video_counts_once(many, weights, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert evaluate(many, weights, one, "--views", "1x1") == 0
    # shared otherwise, before
    assert evaluate(many, weights, two, "--views", "1x1", "--shard", "1/3") == 0
    process = start(2, "evaluate", *flags_of(many, weights, two), restarts=1)
    wait_for(lambda: size_of(two / "predictions-1-of-2.jsonl"))
    killed = [pid for pid in children(process.pid) if rank_of(pid) == 1]
    os.kill(killed[0], signal.SIGKILL)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "401 videos, shared by 2 processes" in said
    begun = [int(count) for count in re.findall(r"going on  (\d+) of 201 videos of this share are done", said)]
    assert begun[0] == len(set(range(0, 401, 2)) & set(range(1, 401, 3))) < begun[1]
    assert said.count("top-1") == 1
    assert [row["index"] for row in lines(two)] == list(range(401))
    assert numbers(two) == numbers(one)
    assert_same_predictions(two, one)
    assert not list(two.glob("predictions-*"))


@LONG
def test_a_signal_ends_all_and_one_process_goes_on(many, weights, tmp_path, capsys):
    process = start(2, "evaluate", *flags_of(many, weights, tmp_path))
    parts = [tmp_path / f"predictions-{rank}-of-2.jsonl" for rank in range(2)]
    wait_for(lambda: all(map(size_of, parts)))
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("the same command goes on from here") == 1, err
    assert not (tmp_path / "result.json").exists()
    done = sum(len(part.read_text().splitlines()) for part in parts)
    assert 0 < done < 401
    assert evaluate(many, weights, tmp_path, "--views", "1x1") == 0
    assert f"going on  {done} of 401 videos are done" in capsys.readouterr().out
    assert [row["index"] for row in lines(tmp_path)] == list(range(401))


@LONG
def test_features_are_shared_by_more_processes_than_there_are_videos(labelled, weights, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"broken")
    listed = tmp_path / "list.csv"
    listed.write_text(f"{broken} 0\n{labelled}/1.mp4 0\n")
    flags = (str(listed), "--weights", str(weights), "--workers", "0", "--device", "cpu", "--out")
    assert features([*flags, str(tmp_path / "one")]) == 1
    said = run(features, 3, *flags, tmp_path / "three", code=1)
    assert "0 videos of this share, shared by 3 processes" in said
    assert "\n1 video, 2 windows" in said
    assert "1 unreadable, listed in" in said
    found = [
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "three")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 5


@LONG
def test_detections_are_bit_by_bit_those_of_one_process(tmp_path):
    scenes = make_scenes(tmp_path / "set", train=10, test=KEY_FRAMES, frames=8, size=40).parent
    verb = verb_of(scenes)
    verb.find_videos()
    torch.manual_seed(3)
    made = verb.build()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_weights(made, tmp_path / "detector.safetensors")
    broken = scenes / "test" / "test_00017.mp4"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    broken.write_bytes(data)
    flags = ["demo", "--evaluate", "--weights", tmp_path / "detector.safetensors", "--data", scenes, "--pictures", 1]
    flags = [*map(str, flags), "--unreadable", "missed", "--out"]
    assert detect([*flags, str(tmp_path / "one"), "--workers", "0", "--device", "cpu"]) == 0
    said = run(detect, 2, *flags, tmp_path / "two")
    assert "shared by 2 processes" in said
    for name in ("detections.csv", "per_class.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("one", "two"))
    for name in ("mAP", "per_class", "protocol", "unreadable"):
        assert one[name] == two[name]
    assert len(one["unreadable"]) == 1


@LONG
def test_probes_share_the_encoders_work(labelled, weights, tmp_path):
    flags = ["--data", labelled, "--weights", weights, "--views", "40x1", "--linear.l2", "0.01", "--out"]
    flags = [*map(str, flags)]
    assert probe([*flags, str(tmp_path / "one"), "--workers", "0", "--device", "cpu"]) == 0
    said = run(probe, 2, *flags, tmp_path / "two")
    assert "shared by 2 processes" in said
    one, two = (json.loads((tmp_path / out / "result.json").read_text()) for out in ("one", "two"))
    for name in ("accuracy", "train", "test"):
        assert one[name] == two[name]
