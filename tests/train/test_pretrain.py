"""The command from end to end, on small videos made on the spot: what it leaves behind, and that nothing loses a
run."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from PIL import Image

import videomae
from kernels.tiles import table_hash
from tests.runs import assert_same, changed_state, metrics, run, start, wait_for, weights
from tests.videos import write_videos
from train.checkpoint import read_state
from train.pretrain import main


@pytest.fixture
def videos(tmp_path):
    return write_videos(tmp_path / "videos", 5)


def test_leaves_a_checkpoint_metrics_curves_a_picture_and_a_record(videos, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(videos, out, "--steps", 8, "--log.picture-every", 4, "--log.tensorboard", "true") == 0
    printed = capsys.readouterr().out
    for path in (out / "checkpoints/step_8", out / "curves.png", out / "samples/step_0000008.png"):
        assert path.exists()
        assert str(path) in printed
    model = videomae.pretrain_model("vit_tiny", frames=4, image_size=16, cube=(2, 8, 8), decoder_depth=1)
    videomae.load_weights(model, out / "checkpoints/step_8")

    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for line in lines:
        assert 0.3 < line["loss"] < 3
        assert line["clips_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["skipped_clips"] == line["nonfinite_steps"] == 0
    record = json.loads((out / "config.json").read_text())
    assert record["config"]["model.image_size"] == 16
    assert record["plan"]["steps"] == 8
    assert record["plan"]["micro_batch"] == 6
    assert record["versions"]["torch"] == torch.__version__
    assert record["kernel_tiles"] == table_hash()
    assert {"commit", "command", "host", "started", "gpu"} <= set(record)
    assert list((out / "tensorboard").iterdir())
    picture = Image.open(out / "samples/step_0000008.png")
    # three clips of four rows of two time slots, each 64 pixels wide
    assert picture.width == 190 + 2 * 68
    assert picture.height > 12 * 64
    assert len(picture.getcolors(1 << 20)) > 100


def test_the_same_seed_gives_the_same_run_and_another_does_not(videos, tmp_path):
    for name, seed, workers in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        run(videos, tmp_path / name, "--steps", 4, "--seed", seed, "--workers", workers)
    assert_same(weights(tmp_path / "a", 4), weights(tmp_path / "b", 4))
    assert metrics(tmp_path / "a")[-1]["loss"] != metrics(tmp_path / "c")[-1]["loss"]


def test_accumulated_micro_batches_give_the_whole_batch(videos, tmp_path):
    for name, micro in (("whole", 12), ("parts", 3)):
        run(videos, tmp_path / name, "--steps", 5, "--micro-batch", micro, "--data.views-per-decode", 2)
    for name, value in weights(tmp_path / "whole", 5).items():
        torch.testing.assert_close(weights(tmp_path / "parts", 5)[name], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("kill_at", [7, pytest.param(13, marks=pytest.mark.long)])
def test_a_run_killed_in_mid_epoch_ends_bit_identical_to_one_that_was_not(videos, tmp_path, kill_at):
    # 5 videos, 6 to a step: every step lies across an epoch's end
    flags = ("--steps", 18, "--checkpoint.every", 3, "--data.views-per-decode", 2, "--micro-batch", 4, "--workers", 1)
    whole = start(videos, tmp_path / "whole", *flags)
    killed = start(videos, tmp_path / "killed", *flags)
    wait_for(lambda: (tmp_path / "killed" / "checkpoints" / f"step_{kill_at // 3 * 3}").exists())
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "step_18").exists()
    resumed = start(videos, tmp_path / "killed", *flags[:-1], 2)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "resuming  at step" in out
    assert whole.wait() == 0
    assert_same(weights(tmp_path / "whole", 18), weights(tmp_path / "killed", 18))
    moments = [read_state(tmp_path / name / "checkpoints/step_18")["optimizer"] for name in ("whole", "killed")]
    assert len(moments[0]) > 50
    assert_same(*moments)
    curves = [[(line["step"], line["lr"]) for line in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert json.loads((tmp_path / "killed/config.json").read_text())["resumed"][0]["step"] >= kill_at // 3 * 3


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)]
)
def test_a_signal_saves_and_the_same_command_goes_on(videos, tmp_path, sent, code):
    out = tmp_path / "run"
    process = start(videos, out, "--steps", 100000, "--checkpoint.every", 100000, "--workers", 1)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 2)
    process.send_signal(sent)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "checkpoint saved" in printed
    assert "Traceback" not in err
    done = int(next((out / "checkpoints").iterdir()).name.removeprefix("step_"))
    assert done >= 6
    assert metrics(out)[-1]["step"] <= done
    assert run(videos, out, "--steps", done + 2) == 0
    assert (out / "checkpoints" / f"step_{done + 2}").exists()
    steps = [line["step"] for line in metrics(out)]
    assert steps == sorted(set(steps))


def test_a_finished_run_says_so_and_does_nothing(videos, tmp_path, capsys):
    run(videos, tmp_path / "run", "--steps", 3)
    before = (tmp_path / "run/checkpoints/step_3/state.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert run(videos, tmp_path / "run", "--steps", 3) == 0
    assert "Already finished: 3 steps" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoints/step_3/state.pt").stat().st_mtime_ns == before


def test_never_resuming_moves_the_old_run_aside(videos, tmp_path, capsys):
    run(videos, tmp_path / "run", "--steps", 2)
    run(videos, tmp_path / "run", "--steps", 3, "--seed", 5, "--resume", "never")
    assert (tmp_path / "run/checkpoints/step_3").exists()
    assert (tmp_path / "run.1/checkpoints/step_2").exists()


def test_starts_from_weights_with_a_schedule_of_its_own(videos, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(videos, first, "--steps", 2) == 0
    capsys.readouterr()
    # rates this low change nothing that float32 could tell from rounding
    rates = ("--optim.base-lr", 1e-12, "--optim.min-lr", 0)
    assert run(videos, second, "--steps", 2, "--weights", first, *rates, "--mask.ratio", 0.25) == 0
    printed = capsys.readouterr().out
    assert f"weights   {first}/checkpoints/step_2: videomae weights" in printed
    assert [line["step"] for line in metrics(second)] == [2]
    for name, tensor in weights(second, 2).items():
        torch.testing.assert_close(tensor, weights(first, 2)[name], rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(videos, tmp_path / "third", "--steps", 2, "--weights", tmp_path / "nowhere")
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("given", ["first/checkpoints/step_4", "first"], ids=["a checkpoint", "a run's newest"])
def test_resumes_from_a_checkpoint_elsewhere(videos, tmp_path, given):
    run(videos, tmp_path / "first", "--steps", 4)
    run(videos, tmp_path / "second", "--steps", 8, "--resume", tmp_path / given)
    assert [line["step"] for line in metrics(tmp_path / "second")] == [6, 8]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--seed", "3"], "seed: 0 -> 3"),
        (["--mask.ratio", "0.75"], "mask.ratio: 0.5 -> 0.75"),
        (["--batch-size", "3"], "batch_size: 6 -> 3"),
        (["--decoder-ratio", "0.25"], "decoder_ratio: 0.5 -> 0.25"),
    ],
    ids=["seed", "mask", "batch", "decoder's mask"],
)
def test_refuses_to_go_on_with_other_settings(videos, tmp_path, capsys, flags, says):
    run(videos, tmp_path / "run", "--steps", 2)
    with pytest.raises(SystemExit) as end:
        run(videos, tmp_path / "run", "--steps", 4, *flags)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_refuses_to_go_on_with_other_videos(videos, tmp_path, capsys):
    run(videos, tmp_path / "run", "--steps", 2)
    (videos / "4.mp4").unlink()
    with pytest.raises(SystemExit):
        run(videos, tmp_path / "run", "--steps", 4)
    assert "the list of videos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["demo", "--data", "/nowhere"], "no such file or folder: /nowhere"),
        (["k400-base-800"], "needs --data"),
        (["demo", "--data", ".", "--resume", "/nowhere"], "no videos in|no checkpoint at /nowhere"),
        (["demo", "--steps", "5", "--epochs", "2"], "not both"),
        (["demo", "--device", "cuda"], "no GPU"),
        (["demo", "--precision", "float16", "--device", "cpu"], "needs a GPU"),
        (["demo", "--engine", "graph", "--device", "cpu"], "--engine graph captures CUDA graphs and needs a GPU"),
        (["demo", "--engine", "compile", "--model.recompute", "norms"], "--engine compile chooses by itself"),
        (["demo", "--attention", "flash"], "attention must be auto, flash-attn"),
        (["demo", "--attention", "xformers", "--device", "cpu"], "needs a CUDA GPU"),
        (["demo", "--decoder-mask", "running-cell", "--mask.kind", "frame"], "needs a tube mask"),
    ],
    ids=[
        *("data", "no data", "resume", "two lengths", "no gpu", "float16"),
        *("graph", "compile", "attention", "attention's device", "decoder's mask"),
    ],
)
def test_refuses_in_one_line(flags, says, capsys, tmp_path, monkeypatch):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m train.pretrain: error: ")
    assert any(choice in error for choice in says.split("|"))
    assert os.listdir(tmp_path) == []


def test_skips_unreadable_files_with_weight_zero_and_names_them(videos, tmp_path):
    """Its place in every epoch stays, with weight 0."""
    (videos / "9.mp4").write_bytes(b"nothing")
    assert run(videos, tmp_path / "run", "--steps", 12, "--micro-batch", 2) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 12  # one of six files, six clips to a step
    assert {line["path"] for line in lines} == {str(videos / "9.mp4")}
    assert all("Invalid data" in line["reason"] for line in lines)
    assert metrics(tmp_path / "run")[-1]["skipped_clips"] == 12


def test_skips_do_not_change_the_scale_of_the_loss_or_its_gradient(videos, tmp_path):
    # the same five clips, once alone and once beside one that cannot be read; one step, so the same weights
    (videos / "missing_last.csv").write_text("".join(f"{i}.mp4\n" for i in range(5)) + "gone.mp4\n")
    flags = ("--steps", 1, "--log.every", 1, "--sampling.stride", 14, "--augment.scales", 1, "--mask.ratio", 0.5)
    run(videos / "missing_last.csv", tmp_path / "beside", *flags)
    beside = metrics(tmp_path / "beside")[0]
    assert beside["skipped_clips"] == 1
    for micro in (1, 2, 3):
        run(videos / "missing_last.csv", tmp_path / f"beside{micro}", *flags, "--micro-batch", micro)
        again = metrics(tmp_path / f"beside{micro}")[0]
        assert again["loss"] == pytest.approx(beside["loss"], rel=1e-5)
        assert again["grad_norm"] == pytest.approx(beside["grad_norm"], rel=1e-4)
    # an untrained model predicts about nothing: the mean over real clips is near 1, over all slots it would be 5/6 of
    # that
    alone = tmp_path / "alone.csv"
    alone.write_text("".join(f"{videos}/{i}.mp4\n" for i in range(5)))
    run(alone, tmp_path / "alone", *flags, "--batch-size", 5)
    assert metrics(tmp_path / "alone")[0]["loss"] == pytest.approx(beside["loss"], rel=0.1)


def test_stops_when_no_video_can_be_read(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.mp4").write_bytes(b"nothing")
    assert run(folder, tmp_path / "run", "--steps", 4) == 1
    error = capsys.readouterr().err
    assert "none of the videos can be read" in error
    assert all(f"{i}.mp4: Invalid data" in error for i in range(3))


def test_stops_after_too_many_steps_that_are_not_finite_and_keeps_its_checkpoints(videos, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ("--steps", 40, "--optim.base-lr", 1e30, "--optim.max-nonfinite", 4, "--checkpoint.every", 1)
    assert run(videos, out, *flags) == 1
    error = capsys.readouterr().err
    assert "not finite for 4 steps in a row" in error
    lines = [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert len(lines[0]["clips"]) == 6
    assert lines[0]["clips"][0].endswith(".mp4")
    steps = [line["step"] for line in lines]
    assert steps == list(range(steps[0], steps[0] + 4))
    # the weights of the last good step, untouched by those after it
    last_good = weights(out, steps[0] - 1)
    assert all(value.isfinite().all() for value in last_good.values())
    assert_same(weights(out, steps[0]), last_good)


def test_batches_run_across_epochs_when_there_are_fewer_videos_than_a_batch(videos, tmp_path, capsys):
    assert run(videos, tmp_path / "run", "--steps", 2, "--batch-size", 17) == 0
    assert "17 clips a step" in capsys.readouterr().out


def test_epochs_give_the_steps_and_the_warm_up(videos, tmp_path, capsys):
    assert run(videos, tmp_path / "run", "--epochs", 12, "--optim.warmup-epochs", 3) == 0
    plan = json.loads((tmp_path / "run/config.json").read_text())["plan"]
    assert (plan["steps"], plan["warmup_steps"]) == (10, 2)  # 12 epochs of 5 videos, 6 to a step
    assert plan["peak_lr"] == pytest.approx(0.04 * 6 / 256)


def test_trains_with_other_masks_and_plain_pixels(videos, tmp_path):
    assert run(videos, tmp_path / "frame", "--steps", 2, "--mask.kind", "frame") == 0
    assert run(videos, tmp_path / "random", "--steps", 2, "--mask.kind", "random", "--target.normalize", "false") == 0
    # pixels in [0, 1] have a smaller error than normalised ones
    assert metrics(tmp_path / "random")[-1]["loss"] < 0.6


def test_trains_with_dual_masking_and_goes_on_from_its_checkpoint(videos, tmp_path, capsys):
    flags = ("--model.frames", 8, "--decoder-mask", "running-cell", "--checkpoint.every", 2)
    assert run(videos, tmp_path / "whole", "--steps", 4, *flags) == 0
    # 4 slots of 2 x 2 cubes, half of them hidden, of which the decoder keeps half
    assert "tube mask hides 8 of 16 cubes; running-cell leaves 4 of them to predict" in capsys.readouterr().out
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/step_4")
    assert run(videos, tmp_path / "part", "--steps", 4, *flags) == 0
    assert_same(weights(tmp_path / "whole", 4), weights(tmp_path / "part", 4))
    assert 0.3 < metrics(tmp_path / "part")[-1]["loss"] < 3


@pytest.mark.long
def test_how_a_step_is_computed_changes_nothing_but_rounding_and_may_change_within_a_run(videos, tmp_path):
    ways = {
        "plain": (),
        "norms": ("--model.recompute", "norms"),
        "mlp": ("--model.recompute", "mlp"),
        "block": ("--model.recompute", "block"),
        "long": ("--model.short-last-layer", "false"),
        "triton": ("--attention", "triton"),
    }
    for name, flags in ways.items():
        assert run(videos, tmp_path / name, "--steps", 2, *flags) == 0
    losses = [metrics(tmp_path / name)[-1]["loss"] for name in ways]
    assert losses == pytest.approx([losses[0]] * len(ways), rel=1e-5)
    assert run(videos, tmp_path / "plain", "--steps", 4, *ways["block"]) == 0
    assert "attention" in json.loads((tmp_path / "triton/config.json").read_text())["plan"]


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_run_has_the_losses_of_an_eager_one(videos, tmp_path):
    for engine in ("eager", "compile"):
        assert run(videos, tmp_path / engine, "--steps", 6, "--engine", engine) == 0
    losses = [[line["loss"] for line in metrics(tmp_path / engine)] for engine in ("eager", "compile")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_goes_on_from_a_checkpoint_that_knew_fewer_settings(videos, tmp_path):
    run(videos, tmp_path / "run", "--steps", 2)
    with changed_state(tmp_path / "run/checkpoints/step_2") as state:
        del state["config"]["decoder_mask"], state["config"]["engine"]
    assert run(videos, tmp_path / "run", "--steps", 4) == 0


@pytest.mark.long
def test_a_setting_that_has_another_name_now_still_counts(videos, tmp_path, capsys):
    views = ("--data.views-per-decode", 2)
    run(videos, tmp_path / "run", "--steps", 2, *views)
    with changed_state(tmp_path / "run/checkpoints/step_2") as state:
        state["config"]["sampling.views"] = state["config"].pop("data.views_per_decode")
    with pytest.raises(SystemExit):
        run(videos, tmp_path / "run", "--steps", 4)
    assert "data.views_per_decode: 2 -> 1" in capsys.readouterr().err
    assert run(videos, tmp_path / "run", "--steps", 4, *views) == 0


@pytest.mark.long
def test_learns(videos, tmp_path):
    assert (
        run(videos, tmp_path / "run", "--steps", 150, "--batch-size", 16, "--optim.base-lr", 0.08, "--log.every", 30)
        == 0
    )
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


def test_goes_on_once_unreadable_videos_are_mended(videos, tmp_path, capsys):
    good = {path: path.read_bytes() for path in videos.iterdir()}
    for path in good:
        path.write_bytes(b"nothing")
    assert run(videos, tmp_path / "run", "--steps", 3) == 1
    for path, content in good.items():
        path.write_bytes(content)
    assert run(videos, tmp_path / "run", "--steps", 3) == 0
    assert metrics(tmp_path / "run")[-1]["skipped_clips"] == 0


def test_replays_skips_so_that_a_resumed_run_is_the_same(videos, tmp_path):
    (videos / "9.mp4").write_bytes(b"nothing")
    flags = ("--checkpoint.every", 2, "--micro-batch", 3)
    assert run(videos, tmp_path / "whole", "--steps", 6, *flags) == 0
    assert run(videos, tmp_path / "parts", "--steps", 6, *flags) == 0
    for later in ("step_4", "step_6"):
        shutil.rmtree(tmp_path / "parts/checkpoints" / later)
    # mended meanwhile: the steps that were done without it are not done again, those after step 2 are, with it
    (videos / "9.mp4").write_bytes((videos / "0.mp4").read_bytes())
    assert run(videos, tmp_path / "parts", "--steps", 6, *flags) == 0
    assert {json.loads(line)["step"] for line in (tmp_path / "parts/skipped.jsonl").read_text().splitlines()} == {1, 2}
    assert metrics(tmp_path / "parts")[-1]["skipped_clips"] == 2
    assert metrics(tmp_path / "whole")[-1]["skipped_clips"] == 6


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(videos, tmp_path):
    out = tmp_path / "run"
    run(videos, out, "--steps", 6, "--checkpoint.every", 2)
    whole = weights(out, 6)
    assert run(videos, out, "--steps", 6, "--resume", out / "checkpoints/step_2", "--checkpoint.every", 2) == 0
    there = {path.name for path in (out / "checkpoints").iterdir()}
    assert there == {"step_2", "step_4", "step_6", "set_aside_step_4", "set_aside_step_6"}
    assert_same(weights(out, 6), whole)


@pytest.mark.long
def test_a_signal_before_the_first_step_is_saved_and_said_truly(videos, tmp_path):
    os.mkfifo(videos / "a.mp4")  # the first look at it blocks
    (tmp_path / "list.txt").write_text(f"{videos}/a.mp4\n{videos}/0.mp4\n")
    out = tmp_path / "run"
    process = start(tmp_path / "list.txt", out, "--steps", 5, "--workers", 1, "--loader.timeout", 6)
    wait_for(lambda: (out / "config.json").exists())
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Stopped at step 0 of 5, checkpoint saved" in printed
    assert (out / "checkpoints/step_0").exists()
