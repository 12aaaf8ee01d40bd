"""Frame numbers of clips: the published check values, and the official rules step by step."""

import numpy as np
import pytest

from videomae.data.sampling import KeyFrameClip, Sampling, num_starts, pretrain_frames, pretrain_start
from videomae.keys import Draws


def test_long_videos_start_anywhere_that_fits():
    assert pretrain_frames(300, 16, 4, 0) == list(range(0, 61, 4))
    assert num_starts(300, 16, 4) == 237
    assert pretrain_frames(300, 16, 4, 236) == list(range(236, 297, 4))
    assert num_starts(64, 16, 4) == 1
    assert num_starts(63, 16, 4) == 1


@pytest.mark.parametrize(
    ("num_frames", "stride", "expected"),
    [
        (50, 4, [*range(0, 49, 4), 48, 48, 48]),
        (5, 4, [0] * 16),
        (20, 2, [*range(0, 19, 2), *[18] * 6]),
        (1, 4, [0] * 16),
        (2, 1, [0] * 16),
    ],
    ids=str,
)
def test_short_videos_repeat_a_frame(num_frames, stride, expected):
    assert pretrain_frames(num_frames, 16, stride) == expected


def test_short_videos_follow_the_official_rule():
    for num_frames in range(1, 64):
        for stride in (1, 2, 3, 4):
            if num_frames >= 16 * stride:
                continue
            offset, expected = 1, []  # counted from 1
            for _ in range(16):
                expected.append(offset - 1)
                if offset + stride < num_frames:
                    offset += stride
            assert pretrain_frames(num_frames, 16, stride) == expected, (num_frames, stride)


def test_starts_are_drawn_among_the_frames_that_are_stored():
    for step, last in ((1, 236), (2, 236), (4, 236), (3, 234)):
        seen = {pretrain_start(300, 16, 12 if step == 3 else 4, Draws(n), step) for n in range(2000)}
        most = 300 - 16 * 12 if step == 3 else last
        assert seen == set(range(0, most + 1, step))
    # a short video has one place, whatever is stored
    assert pretrain_start(50, 16, 4, Draws(1), 4) == 0
    with pytest.raises(ValueError, match="only frames 0, 4, 8, ... are stored"):
        pretrain_start(300, 16, 2, Draws(1), 4)


def test_the_clip_around_a_key_frame_is_as_published():
    published = [-31, -27, -23, -19, -15, -11, -7, -3, 1, 5, 9, 13, 17, 21, 25, 29]
    for before, after in ((50, 50), (32, 32), (1000, 33)):
        assert KeyFrameClip().offsets(before, after, 16) == published
    # a side that is shorter than 32 cuts the other, and ends repeat
    assert KeyFrameClip().offsets(25, 50, 16) == [-25, -25, *published[2:14], 24, 24]
    assert KeyFrameClip().offsets(50, 3, 16) == [-3] * 8 + [1] + [2] * 7
    assert KeyFrameClip().offsets(0, 9, 16) == [0] * 16
    # (40 - 15) // 2 + 1 is the 13th of the 40
    assert KeyFrameClip(stride=3).offsets(20, 20, 5) == [-7, -4, -1, 2, 5]
    with pytest.raises(ValueError, match="must be in its video; got 3 frames before, 0 after"):
        KeyFrameClip().offsets(3, 0, 16)


def test_clips_around_key_frames_refuse_what_cannot_be():
    for change in ({"stride": 0}, {"rate": 0.0}, {"rate": 1001.0}, {"short_side": 0}):
        with pytest.raises(ValueError, match=f"clip.{next(iter(change)).replace('_', '-')} must be"):
            KeyFrameClip(**change)


DENSE, UNIFORM = Sampling(), Sampling("uniform")


class Fixed:
    """Draws that always give the first, or the last, number."""

    def __init__(self, last):
        self.last = last

    def below(self, n):
        return n - 1 if self.last else 0


FIRST, LAST = Fixed(False), Fixed(True)


def test_dense_clips_are_the_published_ones():
    # RECIPES F.2
    assert DENSE.train(300, 16, FIRST) == [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
    assert DENSE.train(300, 16, LAST) == [
        235,
        239,
        243,
        247,
        252,
        256,
        260,
        264,
        269,
        273,
        277,
        281,
        286,
        290,
        294,
        298,
    ]
    assert DENSE.train(50, 16, LAST) == [0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49, 49, 49, 49, 49]
    assert DENSE.train(30, 16, LAST) == [0, 5, 10, 15, 20, 25] + [29] * 10


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 16, 17])
def test_dense_clips_follow_the_official_rule(stride, length):
    span = length * stride
    for num_frames in range(1, 300, 3):
        if num_frames > span:
            # the exclusive end is drawn from span to num_frames - 1; version 2 takes the middle for validation
            for end, got in (
                (span, Sampling("dense", stride).train(num_frames, length, FIRST)),
                (num_frames - 1, Sampling("dense", stride).train(num_frames, length, LAST)),
                ((span + num_frames) // 2, Sampling("dense", stride).middle(num_frames, length)),
            ):
                points = np.linspace(end - span, end, num=length)
                assert got == np.clip(points, end - span, end - 1).astype(int).tolist(), (num_frames, end)
        else:
            points = np.linspace(0, num_frames, num=num_frames // stride)
            points = np.concatenate((points, np.full(length - num_frames // stride, num_frames)))
            expected = np.clip(points, 0, num_frames - 1).astype(int).tolist()
            assert Sampling("dense", stride).train(num_frames, length, FIRST) == expected, num_frames
            assert Sampling("dense", stride).middle(num_frames, length) == expected, num_frames


def test_dense_clips_start_anywhere_that_is_published():
    starts = {DENSE.train(75, 16, Draws(n))[0] for n in range(400)}
    assert starts == set(range(75 - 64))


def test_uniform_clips_take_a_frame_of_each_part():
    # RECIPES F.3: parts of 300 // 16 = 18 frames; the last 12 are never used
    assert UNIFORM.train(300, 16, FIRST) == list(range(0, 288, 18))
    assert UNIFORM.train(300, 16, LAST) == list(range(17, 288, 18))
    assert UNIFORM.middle(300, 16) == list(range(9, 288, 18))
    drawn = [UNIFORM.train(40, 16, Draws(n)) for n in range(200)]
    assert {tuple(i // 2 for i in clip) for clip in drawn} == {tuple(range(16))}
    # each part on its own
    assert all({clip[k] % 2 for clip in drawn} == {0, 1} for k in range(16))
    assert len({tuple(clip) for clip in drawn}) > 190


def test_uniform_clips_of_short_videos_repeat_the_first_frame_and_give_the_others():
    assert UNIFORM.train(5, 16, LAST) == [0] * 11 + [0, 1, 2, 3, 4]
    assert UNIFORM.middle(5, 16) == [0] * 11 + [0, 1, 2, 3, 4]
    assert UNIFORM.train(16, 16, LAST) == list(range(16))


def test_uniform_views_are_the_published_ones():
    # RECIPES F.3
    first = [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]
    second = [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 26, 28, 31, 33, 36, 38]
    assert UNIFORM.views(40, 16, 2) == [first, second]
    assert UNIFORM.views(40, 16, 1) == [first]


@pytest.mark.parametrize("clips", [1, 2, 4])
def test_uniform_views_follow_the_official_rule(clips):
    # version 2's: all clips' frames merged and sorted, of which clip s takes every clips-th one from s on; sums of
    # binary fractions, so float64 is exact
    for num_frames in range(1, 400):
        tick = num_frames / 16
        merged = sorted(int(s * tick / clips + tick * x) for s in range(clips) for x in range(16))
        assert UNIFORM.views(num_frames, 16, clips) == [merged[s::clips] for s in range(clips)], num_frames


def test_dense_views_are_the_published_ones():
    # RECIPES F.4
    assert [view[0] for view in DENSE.views(300, 16, 5)] == [4 * start for start in (0, 14, 29, 44, 59)]
    for num_frames in (1, 3, 40, 61, 64):
        views = DENSE.views(num_frames, 16, 5)
        stored = list(range(0, num_frames, 4))
        assert views == [stored + stored[-1:] * (16 - len(stored))] * 5
    for num_frames in range(1, 400):
        kept = list(range(0, num_frames, 4))
        while len(kept) < 16:
            kept.append(kept[-1])
        step = max((len(kept) - 16) / 4, 0)
        expected = [kept[int(k * step) : int(k * step) + 16] for k in range(5)]
        assert DENSE.views(num_frames, 16, 5) == expected, num_frames


def test_one_dense_view_is_the_middle_one():
    assert DENSE.views(300, 16, 1) == [list(range(4 * 29, 4 * 45, 4))]
    assert DENSE.views(10, 16, 1) == [[0, 4, 8] + [8] * 13]


@pytest.mark.parametrize("sampling", [DENSE, Sampling("dense", 2), UNIFORM], ids=str)
@pytest.mark.parametrize("length", [8, 16, 32])
def test_clips_of_any_video_are_sorted_frames_of_it(sampling, length):
    for num_frames in range(1, 401):
        drawn = [sampling.train(num_frames, length, Draws(num_frames, n)) for n in range(2)]
        views = [view for clips in (1, 2, 5) for view in sampling.views(num_frames, length, clips)]
        for clip in (*drawn, sampling.middle(num_frames, length), *views):
            assert len(clip) == length
            assert clip == sorted(clip)
            assert clip[0] >= 0
            assert clip[-1] < num_frames


def test_refuses_unknown_kinds_and_empty_videos():
    with pytest.raises(ValueError, match="kind must be dense or uniform; got 'tsn'"):
        Sampling("tsn")
    with pytest.raises(ValueError, match="stride must be at least 1; got 0"):
        Sampling("dense", 0)
    for sampling in (DENSE, UNIFORM):
        with pytest.raises(ValueError, match="at least one clip; got 0"):
            sampling.views(300, 16, 0)
        for read in (lambda s=sampling: s.middle(0, 16), lambda s=sampling: s.train(0, 16, Draws(1))):
            with pytest.raises(ValueError, match="no clip of 16 frames can be read from a video of 0"):
                read()
