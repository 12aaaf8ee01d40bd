"""Predictions on disk: lines that come back, files that are joined, locks."""

import numpy as np
import pytest

from train.predictions import Predictions, Row, claim, parse_row

VECTOR = np.array([0.25, 1e-30, 0.75], dtype=np.float32)


def made(*indices):
    return [Row(i, f"/{i}.mp4", 0, 0, VECTOR) for i in indices]


def lost(index, reason="cut off"):
    return Row(index, f"/{index}.mp4", 0, 0, unreadable=reason)


def test_a_row_comes_back_as_it_was_written():
    row = Row(3, "/a/\udcff.mp4", 2, 0.1234, VECTOR)
    again = parse_row(row.line(), 3)
    assert (again.index, again.path, again.label, again.seconds) == (3, "/a/\udcff.mp4", 2, 0.1234)
    assert np.array_equal(again.probabilities, VECTOR)
    assert again.line() == row.line()
    assert parse_row(row.line(), 4) is None
    lost = Row(3, "a", 2, 0.0, unreadable="cut off")
    assert parse_row(lost.line(), 3) == lost
    for cut in (1, 10, 60, len(row.line()) - 3):
        assert parse_row(row.line()[:cut], 3) is None


@pytest.mark.parametrize("cut", [1, 3, 50, 150])
def test_a_line_that_was_cut_off_is_no_row_and_no_part_of_the_next(tmp_path, cut):
    with Predictions(tmp_path, (0, 1), 3) as predictions:
        predictions.append(made(0, 1))
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    with Predictions(tmp_path, (0, 1), 3) as predictions:
        assert set(predictions.rows) == ({0} if cut < 150 else {0} - {1})
        predictions.append(made(1, 2))
        assert predictions.join(3)
    assert [parse_row(line, 3).index for line in file.read_text().splitlines()] == [0, 1, 2]


def test_the_last_of_several_joins_all_files_in_order(tmp_path):
    parts = [Predictions(tmp_path, (i, 3), 3) for i in range(3)]
    for i, predictions in enumerate(parts):
        with predictions:
            predictions.append(made(i + 3, i))
            assert predictions.join(6) == (i == 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "predictions.jsonl"]
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [parse_row(line, 3).index for line in lines] == list(range(6))


def test_a_prediction_stands_before_a_failure_whichever_was_first(tmp_path):
    with Predictions(tmp_path, (0, 2), 3) as first, Predictions(tmp_path, (1, 2), 3) as second:
        first.append([lost(0), *made(1)])
        second.append([*made(0), lost(1)])
        assert second.join(2)
        assert [row.unreadable for row in second.rows.values()] == [None, None]


def test_the_same_failure_is_written_once(tmp_path):
    with Predictions(tmp_path, (0, 1), 3) as predictions:
        for reason in ("cut off", "cut off", "missing"):
            predictions.append([lost(0, reason)])
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2
    assert Predictions(tmp_path, (0, 1), 3).rows[0].unreadable == "missing"


def test_one_part_has_one_process(tmp_path):
    refused = pytest.raises(ValueError, match=f"another process is at work on part 1/2 of {tmp_path}")
    with Predictions(tmp_path, (1, 2), 3), Predictions(tmp_path, (0, 2), 3), refused:
        Predictions(tmp_path, (1, 2), 3)
    Predictions(tmp_path, (1, 2), 3)


def test_time_is_shared_by_the_rows_it_took(tmp_path):
    with Predictions(tmp_path, (0, 1), 3) as predictions:
        predictions.append(made(0, 1))
        predictions.append(made(2))
        first, second, third = (predictions.rows[i].seconds for i in range(3))
    assert 0 < first == second < 5
    assert 0 < third < 5


def test_a_folder_belongs_to_one_protocol(tmp_path):
    out = tmp_path / "out"
    claim(out, {"views": "5x3", "mean": [0.5]}, {"commit": "c"})
    claim(out, {"views": "5x3", "mean": [0.5]}, {"commit": "d"})
    with pytest.raises(ValueError, match="another protocol \\(views: 5x3 then, 1x1 now\\); give another --out"):
        claim(out, {"views": "1x1", "mean": [0.5]}, {})
    (out / "protocol.json").write_text("{")
    with pytest.raises(ValueError, match="protocol.json is damaged"):
        claim(out, {"views": "5x3", "mean": [0.5]}, {})
    (out / "protocol.json").unlink()
    (out / "predictions.jsonl").touch()
    with pytest.raises(ValueError, match="without a protocol.json"):
        claim(out, {"views": "5x3", "mean": [0.5]}, {})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        claim(tmp_path / "file", {}, {})
