"""What is known of weights' training, and who says so."""

import json

import pytest

from train.origin import stride_of, target_of

KNOWN = {"target.normalize": False, "mask.kind": "random", "mask.ratio": 0.8, "sampling.stride": 3}


def write_run(folder, config):
    weights = folder / "checkpoints" / "step_7" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (folder / "config.json").write_text(config)
    return weights


@pytest.mark.parametrize("normalize", [True, False])
def test_a_run_says_what_it_predicts(tmp_path, normalize):
    weights = write_run(tmp_path, json.dumps({"config": KNOWN | {"target.normalize": normalize}}))
    for source in (weights, weights.parent):
        target = target_of(str(source), None, "auto")
        assert target.normalized == normalize
        assert "config.json says so" in target.source
        assert "random masks of ratio 0.8" in target.trained
        assert stride_of(str(source)) == 3


def test_a_run_of_another_loss_says_so(tmp_path):
    for loss, said in (("mse", ""), ("l1", " by the l1 loss")):
        weights = write_run(tmp_path / loss, json.dumps({"config": KNOWN | {"target.loss": loss}}))
        assert target_of(str(weights), None, "auto").trained.endswith(f"ratio 0.8{said}")


def test_weights_that_state_it_are_believed_before_a_run(tmp_path):
    weights = write_run(tmp_path, json.dumps({"config": KNOWN}))
    target = target_of(str(weights), True, "auto")
    assert target.normalized
    assert "weights say so" in target.source
    assert "random masks of ratio 0.8" in target.trained


def test_where_nobody_says_the_published_is_assumed_and_said(tmp_path):
    (tmp_path / "w.pth").touch()
    target = target_of(str(tmp_path / "w.pth"), None, "auto")
    assert target.normalized
    assert "assumed" in target.source
    assert "--target pixels" in target.source
    assert stride_of(str(tmp_path / "w.pth")) is None


def test_the_user_has_the_last_word(tmp_path):
    weights = str(write_run(tmp_path, json.dumps({"config": KNOWN})))
    assert target_of(weights, None, "normalized").normalized
    assert not target_of(weights, None, "pixels").normalized
    assert "--target" in target_of(weights, None, "pixels").source


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3}', '{"config": [1]}'])
def test_a_damaged_record_of_a_run_is_refused(tmp_path, text):
    weights = str(write_run(tmp_path, text))
    for ask in (lambda: target_of(weights, None, "auto"), lambda: stride_of(weights)):
        with pytest.raises(ValueError, match="config.json is none of a run"):
            ask()
