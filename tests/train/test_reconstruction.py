"""What is shown of a clip under its masks: hidden cubes, predictions, their loss."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.pixel_loss import pixel_target
from train.film import write_gif, write_mp4
from train.one_clip import Moments
from train.reconstruction import chosen_slots, draw_film, draw_sheet, guess
from train.strip import fitted
from videomae import masking
from videomae.clip import to_cubes
from videomae.data.decode import Video
from videomae.model import Input, VideoMAE, size_of

INPUT = Input(4, 32, (2, 8, 8))
MOMENTS = Moments([3, 5, 7, 9], [0.12, 0.2, 0.28, 0.36])
GREY = 128


class Perfect(VideoMAE):
    """Predicts what is there."""

    normalized = True

    def forward(self, frames, mask):
        return pixel_target(frames, mask.predicted, self.input.cube, normalize=self.normalized)


def clip():
    torch.manual_seed(0)
    return torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)


def model(cls=VideoMAE, input=INPUT):
    torch.manual_seed(0)
    return cls(size_of("vit_tiny"), input, decoder_depth=1).eval()


def at(sheet, cell):
    """(row, column) of every place where the cell is drawn."""
    height, width = cell.shape[:2]
    starts = np.argwhere((sheet[: 1 - height or None, : 1 - width or None] == cell[0, 0]).all(axis=2))
    starts = [(r, c) for r, c in starts if (sheet[r, c : c + width] == cell[0]).all()]
    return [(r, c) for r, c in starts if (sheet[r : r + height, c : c + width] == cell).all()]


@pytest.mark.parametrize(("kind", "ratio", "hidden"), [("tube", 0.75, 24), ("random", 0.9, 28), ("frame", 0.5, 16)])
def test_exactly_the_masked_cubes_are_hidden_and_ratios_come_out_as_counts(kind, ratio, hidden):
    frames = clip()
    one = guess(model(), frames, 7, kind=kind, ratio=ratio, normalized=True)
    assert one.counts == (hidden, 32)
    mask = masking.make(kind, INPUT.grid, ratio, torch.tensor([7]))
    assert torch.equal(one.mask.masked, mask.masked)
    for shown in (one.made.masked, one.made.with_statistics, one.made.without_statistics):
        cubes = to_cubes(shown, INPUT.cube)
        assert torch.equal(cubes[0, mask.visible[0]], to_cubes(frames, INPUT.cube)[0, mask.visible[0]])
    assert (to_cubes(one.made.masked, INPUT.cube)[0, mask.masked[0]] == GREY).all()


@pytest.mark.parametrize("normalized", [True, False])
def test_the_loss_is_the_mean_squared_error_on_the_hidden_cubes(normalized):
    frames, net = clip(), model()
    one = guess(net, frames, 7, kind="tube", ratio=0.75, normalized=normalized)
    cubes = to_cubes(frames, INPUT.cube)[0].double().numpy().reshape(32, -1, 3) / 255
    mean = cubes.mean(axis=1, keepdims=True)
    deviation = cubes.std(axis=1, ddof=1, keepdims=True) + 1e-6
    target = ((cubes - mean) / deviation if normalized else cubes)[one.mask.masked[0].numpy()]
    with torch.no_grad():
        pred = net(frames, one.mask)[0].double().numpy().reshape(target.shape)
    assert one.loss == pytest.approx(((pred - target) ** 2).mean(), rel=1e-4)
    assert one.flat == pytest.approx(((target.mean(axis=1, keepdims=True) - target) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_perfect_prediction_gives_back_the_original_with_its_statistics_only(normalized):
    frames, net = clip(), model(Perfect)
    net.normalized = normalized
    one = guess(net, frames, 7, kind="tube", ratio=0.75, normalized=normalized)
    assert one.loss < 1e-9
    assert (one.made.with_statistics.int() - frames.int()).abs().max() <= 1
    away = (one.made.without_statistics.int() - frames.int()).abs().max()
    assert away > 20 if normalized else away <= 1


@pytest.mark.long
@pytest.mark.parametrize("normalized", [True, False])
def test_the_sheet_has_a_row_for_every_way_and_a_column_for_every_slot(normalized):
    guesses = [guess(model(), clip(), 7, kind="tube", ratio=r, normalized=normalized) for r in (0.5, 0.75)]
    sheet = draw_sheet(guesses, INPUT, MOMENTS, normalized=normalized, title="t")
    shown = [guesses[0].made.original]
    for one in guesses:
        shown += [one.made.masked, one.made.with_statistics]
        shown += [one.made.without_statistics] if normalized else []
    places = [[at(sheet, fitted(row[0, t].numpy(), 96, 128)) for t in (0, 2)] for row in shown]
    assert all(len(found) == 1 for row in places for found in row)
    tops = [row[0][0][0] for row in places]
    assert tops == sorted(tops)
    assert [row[1][0][0] for row in places] == tops
    assert len({row[0][0][1] for row in places}) == len({row[1][0][1] for row in places}) == 1


@pytest.mark.long
def test_the_film_shows_every_frame_of_every_mask_and_is_written_so(tmp_path):
    guesses = [guess(model(), clip(), 7, kind="random", ratio=r, normalized=True) for r in (0.5, 0.75)]
    film = draw_film(guesses, MOMENTS, normalized=True, title="t")
    assert len(film) == 4
    for t, image in enumerate(film):
        for one in guesses:
            for way in one.made[1:4]:
                assert len(at(image, fitted(way[0, t].numpy(), 160, 384))) == 1
        assert len(at(image, fitted(guesses[0].made.original[0, t].numpy(), 160, 384))) == 2
    write_mp4(film, tmp_path / "f.mp4", rate=5)
    write_gif(film, tmp_path / "f.gif", rate=5)
    with Image.open(tmp_path / "f.gif") as image:
        assert image.n_frames == 4
    decoded = Video(tmp_path / "f.mp4").read(range(4))[:, : film.shape[1], : film.shape[2]]
    assert np.abs(decoded.astype(int) - film).mean() < 8


def test_long_clips_have_eight_columns_spread_evenly():
    assert chosen_slots(Input(32, 16, (2, 8, 8))) == list(range(0, 32, 4))
    assert chosen_slots(Input(6, 16, (2, 8, 8))) == [0, 2, 4]
    assert chosen_slots(Input(22, 16, (2, 8, 8))) == [0, 2, 4, 8, 10, 12, 16, 18]


def test_a_ratio_that_the_grid_does_not_allow_is_refused():
    one = partial(guess, model(), clip(), 7, normalized=True)
    for kind, ratio in (("frame", 0.4), ("tube", 0.01), ("random", 1.0)):
        with pytest.raises(ValueError, match="mask ratio"):
            one(kind=kind, ratio=ratio)
