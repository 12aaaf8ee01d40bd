"""The command that draws what a model sees, of every kind of weights."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.pixel_loss import pixel_loss
from tests.train.classifiers import DENSE, tiny_classifier
from tests.videos import moving_frames, write_video
from train.one_clip import read_clip
from train.reconstruction import draw_film, guess
from train.visualize import VisualizeConfig, main, prepare
from videomae import masking
from videomae.data.dataset import Sample, mask_keys
from videomae.data.decode import Video
from videomae.data.sampling import Sampling
from videomae.model import Input, VideoMAE, size_of
from videomae.weights import save_hugging_face, save_official, save_weights

INPUT = Input(4, 16, (2, 8, 8), sampling=Sampling("dense", 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pre-training model's weights in every form, and two videos."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = VideoMAE(size_of("vit_tiny"), INPUT, decoder_depth=1).eval()
    save_weights(model, folder / "ours.safetensors")
    save_official(model, folder / "official.pth")
    save_hugging_face(model, folder / "hf")
    run = folder / "run"
    save_weights(model, run / "checkpoints" / "step_5" / "model.safetensors")
    (run / "checkpoints" / "step_5" / "state.pt").touch()
    known = {"target.normalize": False, "mask.kind": "tube", "mask.ratio": 0.75}
    (run / "config.json").write_text(json.dumps({"config": known}))
    for name, seed in (("a.mp4", 0), ("b/a.mp4", 3)):
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / "videos" / name, moving_frames(20, 24, 32, seed=seed), crf="10")
    return folder, model


def run(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def losses(text):
    """Of every mask: its kind, ratio, hidden cubes and loss."""
    rows = [line.split() for line in text.splitlines() if line.startswith("  ") and " of " in line]
    return [(row[0], float(row[1]), int(row[2].replace(",", "")), float(row[5])) for row in rows]


@pytest.mark.long
def test_draws_every_kind_of_mask_and_says_the_losses(made, tmp_path, capsys):
    folder, _ = made
    given = (folder / "videos" / "a.mp4", "--weights", folder / "ours.safetensors", "--out", tmp_path)
    assert run(*given, "--ratio", 0.5, 0.75, "--mask", "tube", "random", "--start", 2, "--seed", 6) == 0  # far apart
    text = capsys.readouterr().out
    assert "frames 2 to 11 of 20, 0.08 to 0.44 s" in text
    said = losses(text)
    assert [row[:3] for row in said] == [(kind, r, n) for kind in ("tube", "random") for r, n in ((0.5, 4), (0.75, 6))]
    assert len({row[3] for row in said}) == 4
    names = {f"reconstruction-{kind}.{suffix}" for kind in ("tube", "random") for suffix in ("png", "gif", "mp4")}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names


@pytest.mark.long
def test_the_loss_is_that_of_the_seeds_mask(made, tmp_path, capsys):
    folder, model = made
    video = folder / "videos" / "a.mp4"
    given = ("--weights", folder / "ours.safetensors", "--out", tmp_path, "--mask", "random", "--ratio", 0.5)
    assert run(video, *given, "--seed", 4) == 0
    ((_, _, hidden, loss),) = losses(capsys.readouterr().out)
    frames = read_clip(str(video), INPUT, Sampling("dense", 3)).frames
    mask = masking.random(INPUT.grid, 0.5, keys=mask_keys(4, [Sample(0, 0, 0)]))
    with torch.no_grad():
        expected = pixel_loss(model(frames, mask), frames, mask.masked, True, cube=INPUT.cube)
    assert hidden == mask.masked.shape[1] == 4
    assert loss == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.long
def test_every_form_of_the_weights_gives_the_same_picture(made, tmp_path, capsys):
    folder, _ = made
    video, pictures = folder / "videos" / "a.mp4", []
    forms = {
        "ours.safetensors": ("normalised pixels: assumed", ()),
        "official.pth": ("normalised pixels: assumed", ("--frames", 4, "--size", 16)),
        "hf": ("normalised pixels: the weights say so", ()),
        "run": ("normalised pixels: as --target says; trained with tube masks", ("--target", "normalized")),
    }
    for name, (says, flags) in forms.items():
        out = tmp_path / name
        given = ("--weights", folder / name, "--out", out, "--ratio", 0.5, 0.75, "--stride", 3, *flags)
        assert run(video, *given) == 0
        text = capsys.readouterr().out
        assert says in text
        with Image.open(out / "a" / "reconstruction-tube.png") as image:
            # the title has the weights' name
            pictures.append((losses(text), np.asarray(image)[30:].tobytes()))
    assert all(picture == pictures[0] for picture in pictures)


@pytest.mark.long
def test_the_films_are_those_that_are_drawn(made, tmp_path):
    folder, _ = made
    video = str(folder / "videos" / "a.mp4")
    flags = ["--weights", str(folder / "ours.safetensors"), "--out", str(tmp_path), "--device", "cpu"]
    assert main([video, *flags, "--ratio", "0.5", "0.75", "--fps", "5"]) == 0
    job = prepare(VisualizeConfig((video,), str(folder / "ours.safetensors"), device="cpu"))
    clip = read_clip(video, job.model.input, job.sampling)
    guesses = [guess(job.model, clip.frames, job.key, kind="tube", ratio=r, normalized=True) for r in (0.5, 0.75)]
    drawn = draw_film(guesses, clip.moments, normalized=True, title="a.mp4, ours")
    height, width = drawn.shape[1:3]
    film = Video(tmp_path / "a" / "reconstruction-tube.mp4")
    assert (len(film), film.rate) == (4, 5)
    assert np.abs(film.read(range(4))[:, :height, :width].astype(int) - drawn).mean() < 5
    with Image.open(tmp_path / "a" / "reconstruction-tube.gif") as image:
        assert image.n_frames == 4
        assert image.info["duration"] == 200
        for number in range(4):
            image.seek(number)
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - drawn[number]).mean() < 5


@pytest.mark.long
def test_a_run_on_plain_pixels_is_shown_as_such(made, tmp_path, capsys):
    folder, _ = made
    assert run(folder / "videos" / "a.mp4", "--weights", folder / "run", "--out", tmp_path, "--ratio", 0.75) == 0
    assert "target    pixels: " in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "reconstruction-tube.png") as plain:
        height = plain.height
    weights = folder / "ours.safetensors"
    assert run(folder / "videos" / "a.mp4", "--weights", weights, "--out", tmp_path, "--ratio", 0.75) == 0
    with Image.open(tmp_path / "a" / "reconstruction-tube.png") as both:
        assert both.height > height + 90


@pytest.mark.long
def test_the_same_seed_gives_the_same_bytes_and_another_another_mask(made, tmp_path):
    folder, _ = made
    files = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        given = ("--weights", folder / "ours.safetensors", "--out", tmp_path / name, "--seed", seed, "--ratio", 0.75)
        assert run(folder / "videos" / "a.mp4", *given, "--mask", "random") == 0
        files.append([path.read_bytes() for path in sorted((tmp_path / name / "a").iterdir())])
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.long
@pytest.mark.parametrize("positions", ["fresh", "interpolate"])
def test_other_frames_and_sizes_can_be_seen(made, tmp_path, capsys, positions):
    folder, _ = made
    given = ("--weights", folder / "ours.safetensors", "--out", tmp_path, "--ratio", 0.5, "--positions", positions)
    flags = ("--frames", 8, "--size", "16x24", "--stride", 1, "--attention", "all", "decoder.1", "--query", "3,1,2")
    assert run(folder / "videos" / "a.mp4", *given, *flags) == 0
    text = capsys.readouterr().out
    assert "8 x 16 x 24, 4 x 2 x 3 cubes" in text
    assert ("interpolated" in text) == (positions == "interpolate")
    assert losses(text)[0][2] == 12
    assert len(Video(tmp_path / "a" / "reconstruction-tube.mp4")) == 8
    assert (tmp_path / "a" / "attention.png").exists()


@pytest.mark.long
def test_weights_without_a_decoder_show_attention_only(made, tmp_path, capsys):
    folder, _ = made
    tiny_classifier(tmp_path / "c.safetensors", sampling=DENSE)
    given = (folder / "videos" / "a.mp4", "--weights", tmp_path / "c.safetensors", "--out", tmp_path)
    with pytest.raises(SystemExit) as end:
        run(*given)
    assert end.value.code == 2
    assert "has no decoder, so that nothing can be reconstructed; --attention LAYER" in capsys.readouterr().err
    assert run(*given, "--attention", "last", "--heads", "each") == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["attention.png"]
    assert "only attention is drawn" in capsys.readouterr().out


@pytest.mark.long
def test_an_unreadable_video_costs_itself_and_equal_names_are_numbered(made, tmp_path, capsys):
    folder, _ = made
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    given = ("--weights", folder / "ours.safetensors", "--out", tmp_path / "out", "--ratio", 0.5)
    assert run(tmp_path / "broken.mp4", folder / "videos", *given) == 1
    said = capsys.readouterr()
    (complaint,) = said.err.splitlines()
    assert complaint.startswith(f"python -m train.visualize: {tmp_path / 'broken.mp4'}: ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "a-2"]
    # the mask is the same for all, the videos are not
    first, second = losses(said.out)
    assert first[:3] == second[:3]
    assert first[3] != second[3]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--ratio", "1.2"), "mask ratio must be between 0 and 1"),
        (("--ratio", "0.1"), "hides 0 of 4 places"),
        (("--mask", "frame", "--ratio", "0.3"), "hides 0 of 2 time slots"),
        (("--size", "20"), "height must be a multiple of the cube's 8; got 20"),
        (("--size", "0"), "height must be a multiple of the cube's 8; got 0"),
        (("--size", "16,16"), "size must be SIDE or HEIGHTxWIDTH"),
        (("--frames", "100000"), "has 200,000 cubes; pictures are drawn of up to 65,536"),
        (("--frames", "5"), "frames must be a multiple of the cube's 2; got 5"),
        (("--stride", "0"), "stride must be at least 1"),
        (("--start", "soon"), "start must be a frame's number, or seconds"),
        (("--start", "19"), "can start at frame 8"),
        (("--attention", "3"), "the encoder has the layers 1 to 2"),
        (("--attention", "1", "--query", "0,0,9"), "query must be mean, or a cube"),
        (("--attention", "1", "--query", "0,0,0", "--tokens", "visible", "--seed", "3"), "hidden by the mask"),
        (("--fps", "0"), "fps must be 0.1 to 50"),
        (("--mask", "cube"), "cube"),
    ],
)
def test_wrong_use_is_refused_in_one_line(made, tmp_path, capsys, flags, says):
    folder, _ = made
    given = (folder / "videos" / "a.mp4", "--weights", folder / "ours.safetensors", "--out", tmp_path / "out")
    try:
        code = run(*given, *(() if "--ratio" in flags else ("--ratio", 0.75)), *flags)
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_what_is_no_video_model_is_refused(made, tmp_path, capsys):
    folder, model = made
    encoder = {name: tensor for name, tensor in model.encoder.state_dict().items() if "patch" not in name}
    image = encoder | {
        "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8),
        "patch_embed.proj.bias": torch.zeros(64),
        "cls_token": torch.zeros(1, 1, 64),
    }
    torch.save({"model": image}, tmp_path / "vit.pth")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    video, ours = folder / "videos" / "a.mp4", folder / "ours.safetensors"
    for arguments, says in (
        ((video, "--weights", tmp_path / "vit.pth"), "is an image model, which has seen no clips"),
        ((video, "--weights", tmp_path / "none.pth"), "no such file or folder"),
        ((video, "--weights", tmp_path / "file"), "damaged"),
        ((tmp_path / "empty", "--weights", ours), "no videos in"),
        (("--weights", ours), "no video was given"),
        ((video, "--weights", ours, "--out", tmp_path / "file"), "--out must be a folder"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*arguments)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


@pytest.mark.long
def test_real_clips_at_full_size(clips, tmp_path, capsys):
    torch.manual_seed(0)
    model = VideoMAE(size_of("vit_mini"), Input(), decoder_depth=1)
    save_hugging_face(model, tmp_path / "hf")
    video = clips / "baseball_1080p.mp4"
    given = ("--weights", tmp_path / "hf", "--out", tmp_path / "out", "--ratio", 0.9, "--attention", "last")
    assert run(video, *given, "--stride", 2) == 0
    said = losses(capsys.readouterr().out)
    assert [row[:3] for row in said] == [("tube", 0.9, 1408)]
    assert len(Video(tmp_path / "out" / video.stem / "reconstruction-tube.mp4")) == 16
    assert (tmp_path / "out" / video.stem / "attention.png").exists()


@pytest.mark.long
def test_a_model_of_one_frame_has_a_film_of_one(tmp_path, capsys):
    model = VideoMAE(size_of("vit_tiny"), Input(1, 16, (1, 8, 8)), decoder_depth=1)
    save_weights(model, tmp_path / "image.safetensors")
    write_video(tmp_path / "a.mp4", moving_frames(5, 24, 32), crf="10")
    assert run(tmp_path / "a.mp4", "--weights", tmp_path / "image.safetensors", "--out", tmp_path, "--ratio", 0.5) == 0
    assert len(Video(tmp_path / "a" / "reconstruction-tube.mp4")) == 1
    assert "too short" not in capsys.readouterr().out


@pytest.mark.long
def test_a_clip_longer_than_its_video_is_said_to_repeat(made, tmp_path, capsys):
    folder, _ = made
    write_video(tmp_path / "short.mp4", moving_frames(3, 24, 32), crf="10")
    given = ("--weights", folder / "ours.safetensors", "--out", tmp_path, "--ratio", 0.5, "--stride", 1)
    assert run(tmp_path / "short.mp4", *given) == 0
    assert "too short for the clip: it gives 2 of the 4 frames" in capsys.readouterr().out


def test_its_layers_stand_among_its_own_flags(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "usage: python -m train.visualize VIDEOS ... --weights WEIGHTS" in text
    assert text.index("--mask") < text.index("--attention ATTENTION") < text.index("--query QUERY")


@pytest.mark.long
def test_a_half_written_film_does_not_stay_when_it_is_told_to_stop(made, tmp_path, monkeypatch):
    folder, _ = made

    def told(*_, **__):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Image.Image, "save", told)
    with pytest.raises(SystemExit) as end:
        run(folder / "videos" / "a.mp4", "--weights", folder / "ours.safetensors", "--out", tmp_path, "--ratio", 0.5)
    assert end.value.code == 143
    assert list((tmp_path / "a").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
