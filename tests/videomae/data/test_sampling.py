"""Frame numbers of pre-training clips: the published check values, and the official rule step by step."""

import pytest

from videomae.data.sampling import num_starts, pretrain_frames, pretrain_start
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
