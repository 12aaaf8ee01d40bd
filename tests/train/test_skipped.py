"""The record of skipped clips and the limit at which a run stops."""

import json

import pytest

from train.skipped import Skipped, TooManyUnreadable
from videomae.data.dataset import Sample
from videomae.data.loader import Skip


def skip(index, epoch=0, reason="damaged"):
    return Skip(Sample(epoch, index, 0), f"/videos/{index}.mp4", reason)


def test_writes_each_skip_once_and_knows_it_after_a_restart(tmp_path):
    path = tmp_path / "skipped.jsonl"
    skipped = Skipped(path, 1000)
    skipped.see([Sample(0, 3, 0), Sample(0, 4, 0)], [skip(3)], step=5)
    skipped.see([Sample(1, 3, 0)], [skip(3, epoch=1, reason="hung")], step=9)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 9]
    assert lines[0] == {"step": 5, "epoch": 0, "index": 3, "view": 0, "path": "/videos/3.mp4", "reason": "damaged"}
    again = Skipped(path, 1000)
    assert again.known == {Sample(0, 3, 0): "damaged", Sample(1, 3, 0): "hung"}
    again.see([Sample(1, 3, 0)], [skip(3, epoch=1, reason="hung")], step=9)
    assert len(path.read_text().splitlines()) == 2
    assert (again.clips, again.files) == (1, 1)


@pytest.mark.parametrize(
    ("num_videos", "stops_at"), [(1000, 11), (2000, 21), (10**6, None), (100, 11), (7, 7), (1, 1), (10, 10)]
)
def test_stops_past_one_percent_and_ten_files_or_all(tmp_path, num_videos, stops_at):
    skipped = Skipped(tmp_path / "skipped.jsonl", num_videos)
    for index in range(30):
        if index + 1 == stops_at:
            with pytest.raises(TooManyUnreadable, match=rf"/videos/{index}\.mp4: damaged") as stop:
                skipped.see([Sample(0, index, 0)], [skip(index)], step=1)
            assert ("none of the videos" in str(stop.value)) == (stops_at == num_videos)
            return
        skipped.see([Sample(0, index, 0)], [skip(index)], step=1)
    assert stops_at is None


def test_a_file_that_can_be_read_elsewhere_does_not_count(tmp_path):
    skipped = Skipped(tmp_path / "skipped.jsonl", 1)
    skipped.see([Sample(0, 0, 0)], [], step=1)
    skipped.see([Sample(1, 0, 0)], [skip(0, epoch=1)], step=2)
    assert skipped.files == 1
