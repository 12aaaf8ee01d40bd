"""Videos on their way to a model in use."""

import numpy as np
import pytest
import torch

from tests.train.classifiers import DENSE, write_labelled
from train.inference import Reading, read_views
from videomae.data.dataset import Sample, find_videos
from videomae.data.readers import ViewReader

READER = ViewReader(4, (16, 16), DENSE, clips=2, crops=1)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Seven videos, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    write_labelled(folder)
    for number in (1, 4):
        (folder / f"{number}.mp4").write_bytes(b"no video")
    return find_videos(folder / "test.csv").paths


@pytest.mark.parametrize("at_once", [1, 4, 6, 100])
def test_what_cannot_be_read_leaves_every_other_video_its_own_views(paths, at_once):
    seen, lost, indices = [], [], [6, 1, 0, 2, 4, 5, 3]
    reading = Reading(workers=0)
    given = {"views": 2, "device": torch.device("cpu"), "reading": reading, "at_once": at_once}
    for found in read_views(READER, paths, indices, **given):
        lost += [skip.sample.index for skip in found.skips]
        seen += found.indices
        assert found.frames.shape == (len(found.indices), 2, *READER.shape)
        for index, views in zip(found.indices, found.frames.numpy(), strict=True):
            alone = [np.empty(READER.shape, dtype=np.uint8) for _ in range(2)]
            READER.read_into(paths[index], [Sample(0, index, view) for view in range(2)], alone)
            assert np.array_equal(views, alone)
    assert (seen, lost) == ([6, 0, 2, 5, 3], [1, 4])


def test_no_videos_are_no_work(paths):
    assert list(read_views(READER, paths, [], views=2, device=torch.device("cpu"), reading=Reading(workers=0))) == []
