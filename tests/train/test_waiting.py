"""The advice of a run that waits for its data: its first change follows from the numbers, and they are right."""

from train.waiting import Supply, advice
from videomae.data.dataset import Spent
from videomae.data.loader import Effort

USUAL = Spent(open=0.002, decode=0.06, crop=0.002, waited=0.0)
HERE = Supply(workers=4, cores=16, views=1, batches_ahead=4, prepared=False, remote=False)


def told(supply, *, waited=0.5, rate=100.0, spent=USUAL):
    return advice(supply, waited=waited, clips_per_second=rate, effort=Effort(10, Spent(*(10 * x for x in spent))))


def test_says_what_was_measured():
    text = told(HERE)
    # half of the time was waited for 100 clips/s: the step takes 200, at 64 ms each
    assert "waited for data 50% of the time, 100 clips/s instead of 200" in text
    assert "64.0 ms (opening 2.0, decoding 60.0, cropping 2.0; 0% of it not computing)" in text
    assert "13 workers would keep up; there are 4" in text


def test_free_cores_come_first():
    assert "Change first: --workers 13 (16 cores here)" in told(HERE)
    assert "Change first: --workers 8 (8 cores here)" in told(_but(cores=8))


def test_files_that_are_dear_to_decode_come_next():
    text = told(_but(workers=16, cores=8), rate=400)
    assert "python -m videomae.data.prepare IN OUT" in text
    assert "52 cores would be needed, 8 are here" in text


def test_prepared_files_leave_views():
    text = told(_but(workers=16, cores=16, prepared=True, views=2), rate=1000)
    assert "Change first: --data.views-per-decode 4" in text


def test_workers_that_wait_for_bytes_point_at_the_storage():
    slow = Spent(0.01, 0.05, 0.004, 0.05)
    assert "the storage. A local or faster disk" in told(_but(workers=16), rate=400, spent=slow)
    assert "A larger --data.cache-gb" in told(_but(workers=16, remote=True), rate=400, spent=slow)


def test_enough_workers_that_still_come_late_need_more_batches_ahead():
    assert "Change first: --loader.batches-ahead 8" in told(_but(workers=13))


def _but(**changes):
    return Supply(**{**HERE.__dict__, **changes})
