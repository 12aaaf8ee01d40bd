"""The record of skipped clips and the limit at which a run stops."""

import json

import pytest

from train.skipped import Skipped, TooManyUnreadable, merge_parts, part_of
from videomae.data.dataset import Sample
from videomae.data.loader import Skip

PATHS = tuple(f"/videos/{i}.mp4" for i in range(2000))


def skip(index, epoch=0, reason="damaged"):
    return Skip(Sample(epoch, index, 0), PATHS[index], reason)


def test_writes_each_skip_once_and_replays_those_before_the_resumed_step(tmp_path):
    path = tmp_path / "skipped.jsonl"
    skipped = Skipped(path, PATHS, 0)
    assert skipped.see([Sample(0, 3, 0), Sample(0, 4, 0)], [skip(3)], step=5) == [skip(3)]
    # a file is named once, each of its clips recorded
    assert skipped.see([Sample(1, 3, 0)], [skip(3, epoch=1, reason="hung")], step=9) == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 9]
    assert lines[0] == {"step": 5, "epoch": 0, "index": 3, "view": 0, "path": PATHS[3], "reason": "damaged"}
    # a kill can leave half a line
    with path.open("a") as file:
        file.write('{"step": 9, "epo')
    again = Skipped(path, PATHS, 9)
    assert again.known == {Sample(0, 3, 0): "damaged", Sample(1, 3, 0): "hung"}
    assert again.see([Sample(1, 3, 0)], [skip(3, epoch=1, reason="hung")], step=9) == []
    assert len(path.read_text().splitlines()) == 2
    # skips of steps that are done again are forgotten: the video may have been mended since
    assert Skipped(path, PATHS, 8).known == {Sample(0, 3, 0): "damaged"}


def test_a_record_and_parts_that_were_cut_short_become_one(tmp_path):
    path = tmp_path / "skipped.jsonl"
    for rank in (0, 1, 2):
        Skipped(path, PATHS, 0, rank).see([Sample(0, rank, 0)], [skip(rank)], step=1 + rank)
    # one that was merged, and not removed before a kill
    again = part_of(path, 1).read_text()
    with path.open("a") as file:
        file.write(again + '{"step": 3, "ep')
    merge_parts(path, 3)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["skipped.jsonl"]


@pytest.mark.parametrize(
    ("num_videos", "stops_at"), [(1000, 11), (2000, 21), (100, 11), (7, 7), (1, 1), (10, 10), (3200, None)]
)
def test_stops_past_one_percent_and_ten_files_or_all(tmp_path, num_videos, stops_at):
    paths = tuple(f"/videos/{i}.mp4" for i in range(num_videos))
    skipped = Skipped(tmp_path / "skipped.jsonl", paths, 0)
    for index in range(30):
        if index + 1 == stops_at:
            with pytest.raises(TooManyUnreadable, match=rf"/videos/{index}\.mp4: damaged") as stop:
                skipped.see([Sample(0, index, 0)], [skip(index)], step=1)
            assert ("none of the videos" in str(stop.value)) == (stops_at == num_videos)
            return
        skipped.see([Sample(0, index, 0)], [skip(index)], step=1)
    assert stops_at is None


def test_counts_distinct_files(tmp_path):
    skipped = Skipped(tmp_path / "skipped.jsonl", ("/videos/0.mp4", "/videos/0.mp4"), 0)
    with pytest.raises(TooManyUnreadable, match="none of the videos"):
        skipped.see([Sample(0, 1, 0)], [Skip(Sample(0, 1, 0), "/videos/0.mp4", "damaged")], step=1)


def test_a_file_that_can_be_read_elsewhere_does_not_count(tmp_path):
    skipped = Skipped(tmp_path / "skipped.jsonl", PATHS[:1], 0)
    skipped.see([Sample(0, 0, 0)], [], step=1)
    assert skipped.see([Sample(1, 0, 0)], [skip(0, epoch=1)], step=2) == [skip(0, epoch=1)]


def test_replayed_skips_do_not_count_towards_the_limit(tmp_path):
    path = tmp_path / "skipped.jsonl"
    first = Skipped(path, PATHS[:1], 0)
    first.see([Sample(0, 0, 0)], [], step=1)
    first.see([Sample(1, 0, 0)], [skip(0, epoch=1)], step=2)
    # one video, which this part of the run has not read yet: counted, the skip would be all of them
    assert Skipped(path, PATHS[:1], 2).see([Sample(1, 0, 0)], [skip(0, epoch=1)], step=2) == []


def test_stops_when_the_storage_is_gone(tmp_path):
    """Files that were read before, so that none of them counts as unreadable."""
    paths = PATHS[:50]
    skipped = Skipped(tmp_path / "skipped.jsonl", paths, 0)
    assert skipped.see([Sample(0, i, 0) for i in range(50)], [], step=1) == []
    for epoch in (1, 2, 3):
        # half of them, then one that is there: not in a row
        skipped.see([Sample(epoch, i, 0) for i in range(26)], [skip(i, epoch) for i in range(25)], step=epoch + 1)
    for epoch in (4, 5):
        batch = [Sample(epoch, i, 0) for i in range(49)]
        skipped.see(batch, [skip(i, epoch) for i in range(49)], step=epoch + 1)
    with pytest.raises(TooManyUnreadable, match=r"100 clips one after another.*/1\.mp4: damaged; is its storage gone"):
        skipped.see([Sample(6, 0, 0), Sample(6, 1, 0)], [skip(0, 6), skip(1, 6)], step=7)
