"""What an evaluation is asked: sampling and classes from flags, weights and data; the recipes."""

import pytest
import torch

import videomae
from tests.train.classifiers import DENSE, NAMES, tiny_classifier
from train.evaluation import (
    EVALUATE,
    AskedSampling,
    find_tested,
    parse_views,
    read_classifier,
    view_reader,
    weights_hash,
)
from videomae.data.sampling import Sampling
from videomae.model import Input
from videomae.weights import save_weights


@pytest.mark.parametrize(
    ("asked", "stated", "gives"),
    [
        (AskedSampling(), Sampling("dense", 2), Sampling("dense", 2)),
        (AskedSampling(stride=3), Sampling("dense", 2), Sampling("dense", 3)),
        (AskedSampling("uniform"), Sampling("dense", 2), Sampling("uniform")),
        (AskedSampling("dense", 4), Sampling("uniform"), Sampling("dense", 4)),
        (AskedSampling("dense"), Sampling("dense", 2), Sampling("dense", 2)),
        (AskedSampling(), Sampling("uniform"), Sampling("uniform")),
        (AskedSampling(stride=2), None, Sampling("dense", 2)),
    ],
)
def test_flags_come_before_what_the_weights_state(asked, stated, gives):
    assert asked.resolve(stated) == gives


@pytest.mark.parametrize(
    ("asked", "stated", "says"),
    [
        (AskedSampling("dense"), None, "needs --sampling.stride"),
        (AskedSampling("dense"), Sampling("uniform"), "needs --sampling.stride"),
        (AskedSampling(stride=2), Sampling("uniform"), "uniform sampling, which has no stride"),
    ],
)
def test_half_a_sampling_is_refused(asked, stated, says):
    with pytest.raises(ValueError, match=says):
        asked.resolve(stated)


def test_views_of_every_stride_th_frame_suit_a_set_of_some():
    def nearest(sampling, views, step):
        return view_reader(Input(4, 16, (2, 8, 8)), sampling, views, step=step, allow_nearest=True).nearest

    dense = Sampling("dense", 4)
    assert [nearest(dense, "5x3", step) for step in (1, 2, 4, 3)] == [False, False, False, True]
    # the middle clip is spread over its window
    assert nearest(dense, "1x1", 4)
    assert not nearest(dense, "1x3", 4)
    assert nearest(Sampling("uniform"), "2x3", 2)


def test_recipes_follow_the_published_protocols():
    made = {name: recipe() for name, recipe in EVALUATE.items()}
    assert {name: (c.views, c.sampling.kind, c.sampling.stride) for name, c in made.items()} == {
        "as-trained": (None, None, None),
        "k400": ("5x3", "dense", 4),
        "ssv2": ("2x3", "uniform", None),
        "ucf101": ("5x3", "dense", 4),
        "hmdb51": ("10x3", "dense", 2),
        "demo": ("1x1", "dense", 1),
    }
    for name, config in made.items():
        assert config.recipe == name
        assert "python -m train.evaluate" in EVALUATE[name].__doc__
        assert config.views is None or parse_views(config.views)


def test_a_hash_of_weights_sees_every_number(tmp_path):
    model = tiny_classifier(tmp_path / "w.safetensors", sampling=DENSE)
    assert weights_hash(model) == weights_hash(tiny_classifier(tmp_path / "w.safetensors"))
    with torch.no_grad():
        model.head.bias[1] += 1e-6
    assert weights_hash(model) != weights_hash(tiny_classifier(tmp_path / "w.safetensors"))


def listed(folder, labels, classes=None):
    folder.mkdir()
    (folder / "test.csv").write_text("".join(f"{i}.mp4 {label}\n" for i, label in enumerate(labels)))
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes))
    return str(folder)


def in_folders(folder, *classes):
    for i, name in enumerate(classes):
        (folder / "test" / name).mkdir(parents=True)
        (folder / "test" / name / f"{i}.mp4").touch()
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return tiny_classifier(tmp_path / "w.safetensors", sampling=DENSE)


@pytest.fixture
def named(tmp_path):
    return tiny_classifier(tmp_path / "w.safetensors", sampling=DENSE, classes=NAMES)


def test_labels_that_the_head_lacks_are_refused(model, named, tmp_path):
    path = listed(tmp_path / "data", (0, 3))
    with pytest.raises(ValueError, match="has the label 3; the weights' head has 3 classes, 0 to 2"):
        find_tested(path, "test", model)
    with pytest.raises(ValueError, match="has the label 3; there are 3 classes, 0 to 2"):
        find_tested(path, "test", named)


def test_numbers_are_taken_as_they_are(model, named, tmp_path):
    path = listed(tmp_path / "data", (2, 0))
    assert find_tested(path, "test", model).labels == (2, 0)
    assert find_tested(path, "test", named).labels == (2, 0)
    model.classes = ("0", "1", "2")
    assert find_tested(path, "test", model).labels == (2, 0)


def test_the_same_names_in_another_order_are_refused(named, tmp_path):
    with pytest.raises(ValueError, match="label 1 is peel, there chop"):
        find_tested(listed(tmp_path / "other", (0, 1), ("boil", "peel", "chop")), "test", named)
    assert find_tested(listed(tmp_path / "same", (0, 1), NAMES), "test", named).labels == (0, 1)
    with pytest.raises(ValueError, match="none of the 3 classes: fry"):
        find_tested(in_folders(tmp_path / "folders", "boil", "fry"), "test", named)


def test_class_folders_are_numbered_by_the_weights_names(model, named, tmp_path):
    path = in_folders(tmp_path / "data", "peel", "chop")
    assert find_tested(path, "test", named).labels == (1, 2)
    with pytest.raises(ValueError, match="has 2 classes, chop to peel, the weights' head 3 without names"):
        find_tested(path, "test", model)
    assert find_tested(in_folders(tmp_path / "all", *NAMES), "test", model).labels == (0, 1, 2)


def test_names_may_be_spelled_with_underscores(named, tmp_path):
    named.classes = ("Air Drumming", "boil", "zip_line")
    assert find_tested(in_folders(tmp_path / "data", "zip line", "air_drumming"), "test", named).labels == (0, 2)
    path = listed(tmp_path / "listed", (0, 1), ("air_drumming", "zip line", "boil"))
    with pytest.raises(ValueError, match="label 1 is zip line, there boil"):
        find_tested(path, "test", named)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda **parts: videomae.detector("vit_tiny", num_classes=3, **parts), "a detector, which classifies boxes"),
        (lambda **parts: videomae.encoder("vit_tiny", **parts), "an encoder, without a head for classes"),
    ],
)
def test_weights_without_a_classifier_are_refused(make, says, tmp_path):
    save_weights(make(frames=4, image_size=32), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"a.safetensors holds {says}"):
        read_classifier(str(tmp_path / "a.safetensors"))
