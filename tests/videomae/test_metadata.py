"""metadata: our own files keep classes and sampling, which older files lack, and say what they are."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import videomae
from videomae.data.sampling import KeyFrameClip, Sampling
from videomae.inputs import adopt
from videomae.model import SIZES, Encoder, Input
from videomae.weight_files import Stated
from videomae.weights import describe, main, model_from, save_hugging_face, save_official, save_weights

NAMES = ("diving", "juggling", "a, b")
UNIFORM, DENSE = Sampling("uniform", 1), Sampling("dense", 4)
KEY_CLIP = KeyFrameClip(8, 12.5, 64)
PARTS = {"frames": 4, "image_size": 32}


def classifier(classes=NAMES, sampling=UNIFORM, num_classes=3):
    model = videomae.classifier("vit_tiny", num_classes=num_classes, **PARTS)
    model.classes = classes
    adopt(model, Stated(sampling=sampling))
    return model


def fresh(num_classes=3):
    return classifier(None, None, num_classes)


def detector(classes=NAMES, class_ids=(1, 12, 80), key_clip=KEY_CLIP, num_classes=3):
    model = videomae.detector("vit_tiny", num_classes=num_classes, **PARTS)
    model.classes, model.class_ids, model.key_clip = classes, class_ids, key_clip
    return model


@pytest.fixture
def path(tmp_path):
    save_weights(classifier(), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def rewrite(path, **changes):
    """The file with other metadata; None takes an entry away."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | changes
    save_file(load_file(path), path, {name: value for name, value in metadata.items() if value is not None})


def test_classes_and_sampling_come_back(path):
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["sampling"]) == {"kind": "uniform", "stride": 1}
    given = fresh()
    videomae.load_weights(given, path)
    for model in (given, model_from(path)[0]):
        assert model.classes == NAMES
        assert model.input.sampling == UNIFORM


def test_a_model_keeps_its_own_and_says_so(path):
    mine = classifier(tuple(reversed(NAMES)), DENSE)
    said = str(videomae.load_weights(mine, path))
    assert mine.classes == tuple(reversed(NAMES))
    assert mine.input.sampling == DENSE
    assert "the file's classes have other names or another order; the model keeps its own" in said
    assert "the file's sampling: Sampling(kind='uniform', stride=1)" in said
    said = str(videomae.load_weights(classifier(), path))
    assert "classes" not in said
    assert "sampling" not in said


def test_names_belong_to_the_head(path):
    # a head of other classes stays fresh, and so are its classes' names
    five, encoder = fresh(5), videomae.encoder("vit_tiny", **PARTS)
    assert "the file names" not in str(videomae.load_weights(five, path))
    assert five.classes is None
    videomae.load_weights(encoder, path)
    assert encoder.input.sampling == UNIFORM
    rewrite(path, classes='["x"]')
    three = fresh()
    assert "the file names 1 classes, not the head's 3" in str(videomae.load_weights(three, path))
    assert three.classes is None


def test_what_a_detector_knows_comes_back(tmp_path):
    path = tmp_path / "a.safetensors"
    source = detector()
    adopt(source, Stated(sampling=DENSE))
    save_weights(source, path)
    given = detector(None, None, None)
    videomae.load_weights(given, path)
    for model in (given, model_from(path)[0]):
        assert (model.classes, model.class_ids, model.key_clip) == (NAMES, (1, 12, 80), KEY_CLIP)
        assert model.input == source.input
    # a rate of none is all frames, which is not the same as nothing stated
    save_weights(detector(key_clip=KeyFrameClip(rate=None)), path)
    assert model_from(path)[0].key_clip == KeyFrameClip(rate=None)
    save_weights(detector(None, None, None), path)
    model, _ = model_from(path)
    assert (model.classes, model.class_ids, model.key_clip) == (None, None, None)


def test_a_detector_keeps_its_own_and_says_so(tmp_path):
    save_weights(detector(), tmp_path / "a.safetensors")
    mine = detector(tuple(reversed(NAMES)), (3, 2, 1), KeyFrameClip())
    said = str(videomae.load_weights(mine, tmp_path / "a.safetensors"))
    assert (mine.classes, mine.class_ids, mine.key_clip) == (tuple(reversed(NAMES)), (3, 2, 1), KeyFrameClip())
    assert "the file's classes have other names or another order; the model keeps its own" in said
    assert "the file's classes have other numbers or another order; the model keeps its own" in said
    assert "the file's clips: KeyFrameClip(stride=8, rate=12.5, short_side=64), the model's, which stay:" in said
    five = detector(None, None, None, num_classes=5)
    videomae.load_weights(five, tmp_path / "a.safetensors")
    assert (five.classes, five.class_ids, five.key_clip) == (None, None, KEY_CLIP)
    rewrite(tmp_path / "a.safetensors", class_ids="[4]")
    said = str(videomae.load_weights(detector(), tmp_path / "a.safetensors"))
    assert "the file numbers 1 classes, not the head's 3" in said


def test_a_detector_takes_no_sampling_and_no_names_from_a_classifier(path):
    model = detector(None, None, None)
    videomae.load_weights(model, path)
    assert model.input.sampling is None
    assert model.classes is None
    # nor a classifier from a detector
    save_weights(detector(), path)
    other = fresh()
    videomae.load_weights(other, path)
    assert other.classes is None
    assert not hasattr(other, "class_ids")


def test_ids_are_as_many_as_classes_and_differ(tmp_path):
    for ids in ((1, 2), (1, 2, 2)):
        with pytest.raises(ValueError, match="class_ids must be 3 different ones; got"):
            save_weights(detector(class_ids=ids), tmp_path / "a")
    with pytest.raises(ValueError, match="must name all 3 classes; got 2 names"):
        save_weights(detector(NAMES[:2]), tmp_path / "a")


def test_the_command_says_what_a_detector_is(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(detector(), path)
    assert describe(path).splitlines()[1:] == [
        "  kind      detector, 3 classes",
        "  size      vit_tiny: width 64, 2 blocks, 4 heads",
        "  clip      4 frames of 32x32 in cubes of 2x16x16",
        "  classes   diving, juggling, a, b",
        "  sampling  around key frames, stride 8 at 12.5 frames a second, short side 64",
    ]
    save_weights(detector(None, None, KeyFrameClip(rate=None)), path)
    assert "stride 4 at every rate, short side 256" in describe(path)
    save_official(detector(), tmp_path / "b.pth")
    assert "kind      detector, 3 classes" in describe(tmp_path / "b.pth")


def test_files_from_before_they_were_written_still_load(path):
    rewrite(path, classes=None, sampling=None)
    model, _ = model_from(path)
    assert model.classes is None
    assert model.input.sampling is None
    mine = classifier()
    videomae.load_weights(mine, path)
    assert (mine.classes, mine.input.sampling) == (NAMES, UNIFORM)


@pytest.mark.parametrize("normalized", [True, False, None])
def test_what_pretraining_predicts_comes_back_in_both_formats(normalized, tmp_path):
    model = videomae.pretrain_model("vit_tiny", frames=2, image_size=16, cube=(2, 8, 8), decoder_depth=1)
    model.normalized = normalized
    save_weights(model, tmp_path / "ours.safetensors")
    save_hugging_face(model, tmp_path / "theirs")
    assert model_from(tmp_path / "ours.safetensors")[0].normalized is normalized
    # transformers takes it as normalised where nothing is said
    assert model_from(tmp_path / "theirs")[0].normalized is (normalized is not False)


def test_pretraining_keeps_its_sampling_in_encoder_and_decoder(tmp_path):
    source = videomae.pretrain_model("vit_tiny", decoder_depth=1, **PARTS)
    adopt(source, Stated(sampling=DENSE))
    save_weights(source, tmp_path / "a.safetensors")
    model, _ = model_from(tmp_path / "a.safetensors")
    assert model.input.sampling == model.encoder.input.sampling == DENSE


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": '{"kind": "random", "stride": 1}'},
        {"sampling": "3"},
        {"classes": "3"},
        {"positions": "{}"},
        {"key_clip": "3"},
        {"frames": '"16"'},
        {"image_size": "[1048576, 1048576]"},
        {"mean": "[1e400, 0, 0]"},
        {"class_ids": "[1e400]"},
        {"cube": "[" * 100_000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_ill_formed_metadata_is_refused(path, change):
    rewrite(path, **change)
    with pytest.raises(ValueError, match="metadata that is missing or ill-formed"):
        model_from(path)


def test_as_many_names_as_classes_are_wanted(tmp_path):
    with pytest.raises(ValueError, match="must name all 3 classes; got 2 names"):
        save_weights(classifier(NAMES[:2]), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_hugging_faces_labels_are_the_classes(tmp_path):
    save_hugging_face(classifier(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "diving", "1": "juggling", "2": "a, b"}
    assert config["label2id"] == {"diving": 0, "juggling": 1, "a, b": 2}
    given = fresh()
    videomae.load_weights(given, tmp_path)
    assert given.classes == model_from(tmp_path)[0].classes == NAMES


def test_transformers_reads_and_writes_them(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_hugging_face(classifier(), tmp_path / "ours")
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "ours")
    assert theirs.config.id2label == dict(enumerate(NAMES))
    theirs.save_pretrained(tmp_path / "theirs")
    assert model_from(tmp_path / "theirs")[0].classes == NAMES


@pytest.mark.parametrize("num_classes", [3, 12])
def test_labels_that_stand_for_none_are_none(num_classes, tmp_path):
    # with twelve, text would sort 10 before 2
    save_hugging_face(fresh(num_classes), tmp_path)
    assert "LABEL_2" in (tmp_path / "config.json").read_text()
    assert model_from(tmp_path)[0].classes is None


def test_labels_with_gaps_are_refused(tmp_path):
    save_hugging_face(classifier(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "2": "b"}}))
    with pytest.raises(ValueError, match="must name the labels 0 to 1 in id2label"):
        model_from(tmp_path)


def test_the_command_says_what_a_file_is(path, tmp_path, capsys):
    assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert said == describe(path) + "\n"
    assert said.splitlines()[1:] == [
        "  kind      classifier, 3 classes",
        "  size      vit_tiny: width 64, 2 blocks, 4 heads",
        "  clip      4 frames of 32x32 in cubes of 2x16x16",
        "  classes   diving, juggling, a, b",
        "  sampling  uniform, stride 1",
    ]
    save_official(videomae.pretrain_model("vit_tiny", decoder_depth=3), tmp_path / "b.pth")
    said = describe(tmp_path / "b.pth")
    assert "b.pth: official weights" in said
    assert "pretrain, decoder of 3 blocks" in said
    assert "16 frames of 224x224 in cubes of 2x16x16 (not all of it is stated in the file)" in said
    assert "sampling  not stated" in said
    save_weights(Encoder(SIZES["vit_tiny"], Input(4, 32, positions_of=(8, 14, 14))), tmp_path / "c.safetensors")
    assert "positions interpolated from 8x14x14 cubes" in describe(tmp_path / "c.safetensors")


def test_the_command_wants_a_format_for_a_target(path, capsys):
    for arguments in ([str(path), "out"], [str(path), "--to", "hf"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "OUT and --to go together" in capsys.readouterr().err
    assert main(["nowhere.pth"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
