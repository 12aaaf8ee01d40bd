"""Which windows of a video are looked at, that a reader gives just their pixels, and that features are the model's."""

import numpy as np
import pytest
import torch

import videomae
from tests.videos import moving_frames, write_video
from videomae import features
from videomae.data.dataset import Sample
from videomae.data.decode import UnreadableVideo, Video
from videomae.data.sampling import Sampling
from videomae.features import WindowReader, Windows, features_of, video_features
from videomae.model import Encoder, Input, Size

SIZE = Size(32, 2, 2, 32, 2)


def make(kind, image_size=24, seed=0, **changes):
    torch.manual_seed(seed)
    input = Input(4, image_size, (2, 8, 8), **changes)
    if kind == "classifier":
        model = videomae.classifier("vit_tiny", num_classes=3, frames=4, image_size=image_size, cube=(2, 8, 8))
    elif kind == "pretrain":
        model = videomae.pretrain_model("vit_tiny", frames=4, image_size=image_size, cube=(2, 8, 8), decoder_depth=1)
    else:
        model = Encoder(SIZE, input, final_norm=kind == "encoder")
    for parameter in model.parameters():  # norms whose weights are 1 and 0 would not be missed
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video.mp4", moving_frames(41, 48, 64))


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 1), (4, 3), (16, 4)])
@pytest.mark.parametrize("hop", [None, 1, 5, 16, 100])
def test_windows_cover_a_video_of_any_length_once_and_end_with_it(length, stride, hop):
    windows = Windows(length, Sampling("dense", stride), hop)
    span, every = length * stride, hop or length * stride
    for num_frames in range(1, 201):
        starts = windows.starts(num_frames)
        # from counting: one, and one more for every hop begun of what the first leaves
        assert len(starts) == 1 + -(-max(num_frames - span, 0) // every)
        assert starts[:-1] == [every * k for k in range(len(starts) - 1)]
        assert starts[-1] == min(every * (len(starts) - 1), max(num_frames - span, 0))
        if every <= span and num_frames >= span:
            seen = np.zeros(num_frames, dtype=bool)
            for start in starts:
                seen[start : start + span] = True
            assert seen.all()
        for start in starts:
            numbers = windows.frames(num_frames, start)
            assert len(numbers) == length
            assert 0 <= min(numbers) <= max(numbers) < num_frames
            if num_frames >= span:
                assert numbers == list(range(start, start + span, stride))


def test_windows_of_a_set_that_stores_every_fourth_frame_start_on_those():
    windows = Windows(4, Sampling("dense", 4))
    assert windows.starts(40, 4) == [0, 16, 24]
    assert windows.starts(42, 4) == [0, 16, 24]  # 26 is not stored
    assert windows.starts(5, 4) == [0]
    with pytest.raises(ValueError, match="only frames 0, 4, 8, ... are stored, which do not suit a hop of 6"):
        Windows(4, Sampling("dense", 4), 6).starts(40, 4)
    with pytest.raises(ValueError, match="do not suit a stride of 2"):
        Windows(4, Sampling("dense", 2)).starts(40, 4)


def test_a_short_video_repeats_its_last_frame():
    assert Windows(4, Sampling("dense", 2)).frames(6, 0) == [0, 2, 4, 4]


def test_windows_are_sampled_as_the_weights_say():
    assert Windows.of(Input(4, 24, (2, 8, 8))).sampling == Sampling("dense", 4)
    uniform = Input(4, 24, (2, 8, 8), sampling=Sampling("uniform"))
    assert Windows.of(uniform).starts(100) == [0]
    assert Windows.of(uniform).frames(100, 0) == [12, 37, 62, 87]
    assert Windows.of(uniform, stride=2, hop=5) == Windows(4, Sampling("dense", 2), 5)
    with pytest.raises(ValueError, match="uniform sampling makes one clip"):
        Windows.of(uniform, hop=5)
    with pytest.raises(ValueError, match="hop must be at least 1 frame; got 0"):
        Windows(4, hop=0)


@pytest.mark.parametrize("at_once", [1, 128 << 20])
def test_a_reader_gives_the_middle_square_of_every_frame_halved(video, monkeypatch, at_once):
    monkeypatch.setattr(features, "_AT_ONCE", at_once)
    reader = WindowReader(Windows(4, Sampling("dense", 2), 5), (24, 24))
    out = [np.zeros((4, 24, 24, 3), dtype=np.uint8) for _ in range(3)]
    reader.read_into(str(video), [Sample(0, 0, view) for view in (1, 3, 7)], out)
    whole = Video(video).read(range(41)).astype(float)
    for start, clip in zip((5, 15, 33), out, strict=True):  # the last one of 8 ends at 41
        cut = whole[start : start + 8 : 2, :, 8:56]
        # half the size without antialiasing: the mean of two by two pixels
        halved = (cut[:, ::2, ::2] + cut[:, 1::2, ::2] + cut[:, ::2, 1::2] + cut[:, 1::2, 1::2]) / 4
        assert np.abs(clip - halved).max() <= 1  # two roundings


def test_a_reader_refuses_a_window_that_is_not_there(video):
    reader = WindowReader(Windows(4), (24, 24))
    with pytest.raises(UnreadableVideo, match="41 frames, fewer than a moment ago"):
        reader.read_into(str(video), [Sample(0, 0, 3)], [np.zeros((4, 24, 24, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="windows are square; the model takes 24 x 32"):
        WindowReader(Windows(4), (24, 32))


@pytest.mark.parametrize("kind", ["encoder", "bare", "pretrain", "classifier"])
@pytest.mark.parametrize("level", ["clip", "token"])
def test_features_are_those_of_a_slow_direct_computation(video, kind, level):
    model = make(kind, image_size=48).eval()
    found = video_features(model, video, stride=3, hop=7, level=level, at_once=2)
    whole = Video(video).read(range(41))
    expected = []
    for start in (0, 7, 14, 21, 28, 29):
        clip = whole[start : start + 12 : 3, :, 8:56] / np.float32(255)
        clip = (clip - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        encoder = model.encoder if kind == "pretrain" else model
        with torch.no_grad():
            tokens = encoder.blocks(encoder.embed(torch.from_numpy(clip)[None]))[0]
            if kind in ("encoder", "pretrain"):
                tokens = torch.nn.functional.layer_norm(
                    tokens, tokens.shape[-1:], encoder.norm.weight, encoder.norm.bias, eps=1e-6
                )
            pooled = tokens.mean(0)
            if kind == "classifier":
                pooled = model.fc_norm(pooled[None])[0]
        expected.append(tokens if level == "token" else pooled)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_classifiers_head_gives_its_logits_of_the_features():
    model = make("classifier").eval()
    frames = torch.randint(0, 256, (2, 4, 24, 24, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.head(features_of(model, frames)), model(frames))


def test_a_models_mode_and_gradients_stay(video):
    model = make("classifier")
    model.blocks[1].drop_path.rate = 0.9
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = video_features(model, video)
    # stochastic depth would make two calls differ
    assert torch.equal(first, video_features(model, video))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    # can be learned from
    torch.nn.Linear(first.shape[1], 2)(first).sum().backward()


def test_the_package_offers_it_and_says_what_it_takes(video, tmp_path):
    assert videomae.video_features is video_features
    with pytest.raises(ValueError, match="level must be one of clip, token; got 'frame'"):
        video_features(make("encoder"), video, level="frame")
    with pytest.raises(UnreadableVideo, match="no such file"):
        video_features(make("encoder"), tmp_path / "none.mp4")
