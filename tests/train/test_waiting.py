"""The advice of a run that waits for its data: its first change follows from the numbers, and they are right."""

from dataclasses import replace

import pytest

from train.waiting import Supply, advice
from videomae.data.loader import Effort
from videomae.data.readers import Spent

USUAL = Spent(open=0.002, decode=0.06, crop=0.002, waited=0.0)
SLOW = Spent(open=0.01, decode=0.05, crop=0.004, waited=0.05)
HERE = Supply(workers=4, cores=15, views=1, batches_ahead=4, stored=False, cached=False)


def told(supply=HERE, *, waited=0.5, rate=100, seconds=10.0, spent=USUAL, tasks_per_clip=1.0):
    """Over so many seconds, of videos that took spent each."""
    videos = int(rate * seconds * tasks_per_clip)
    effort = Effort(videos, Spent(*(videos * x for x in spent)))
    return advice(supply, waited=waited, clips_per_second=rate, effort=effort, elapsed=seconds)


def test_says_what_was_measured():
    text = told()
    # half of the time was waited for 100 clips/s: the step takes 200, at 64 ms each
    assert "waited for data 50% of the time, 100 clips/s instead of 200" in text
    assert "64.0 ms (opening 2.0, decoding 60.0, cropping 2.0; 0% of it not computing)" in text
    assert "13 workers would keep up; there are 4" in text


@pytest.mark.parametrize(("tasks_per_clip", "workers"), [(0.25, 4), (0.5, 7), (1.0, 13)])
def test_counts_what_was_decoded_however_views_are_split(tasks_per_clip, workers):
    # four views of a video decoded at once, two by two, or each by itself
    assert f"so {workers} workers would keep up" in told(replace(HERE, views=4), tasks_per_clip=tasks_per_clip)


@pytest.mark.parametrize(
    ("supply", "spent", "rate", "first"),
    [
        (HERE, USUAL, 100, "--workers 13 (15 cores here to decode)"),
        (replace(HERE, cores=8), USUAL, 100, "--workers 8 (8 cores here to decode)"),
        # every core decodes already, as is the default
        (replace(HERE, workers=15), USUAL, 400, "the files. 52 cores would be needed, here are 15"),
        (replace(HERE, workers=15, stored=True, views=2), USUAL, 400, "--data.views-per-decode 4"),
        (replace(HERE, workers=15), SLOW, 400, "the storage. A local or faster disk"),
        (replace(HERE, workers=15, cached=True), SLOW, 400, "the storage. A larger --data.cache-gb"),
        # enough of them on average
        (replace(HERE, workers=13), USUAL, 100, "--loader.batches-ahead 8"),
    ],
)
def test_one_change_comes_first(supply, spent, rate, first):
    assert f"Change first: {first}" in told(supply, spent=spent, rate=rate)
