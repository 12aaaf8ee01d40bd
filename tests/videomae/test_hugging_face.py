"""hugging_face: names and configs translate both ways without changing a bit, and contradictions are refused."""

import pytest
import torch

import videomae
from videomae import hugging_face
from videomae.hugging_face import from_official, is_hugging_face, stated_in, to_official
from videomae.model import Input

SMALL = {"frames": 4, "image_size": 32}
IN_LAYER = "videomae.encoder.layer.0.attention.attention"


def filled(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))
    return model


MODELS = {
    "pretrain": lambda: videomae.pretrain_model("vit_tiny", decoder_depth=2, **SMALL),
    "classifier": lambda: videomae.classifier("vit_tiny", num_classes=5, **SMALL),
}


@pytest.fixture(params=MODELS)
def official(request):
    return filled(MODELS[request.param]()).state_dict()


def as_version_4(theirs):
    return {
        name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): tensor for name, tensor in theirs.items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("version", [4, 5])
def test_it_goes_there_and_back_without_changing_a_bit(official, version):
    theirs = from_official(official)
    assert is_hugging_face(list(theirs))
    assert not is_hugging_face(list(official))
    assert f"{IN_LAYER}.query.bias" in theirs
    if version == 4:
        theirs = as_version_4(theirs)
        assert f"{IN_LAYER}.q_bias" in theirs
    assert_same(to_official(theirs), official)


def test_it_gives_query_key_and_value_their_rows():
    official = filled(MODELS["pretrain"]()).state_dict()
    qkv, theirs = official["encoder.blocks.0.attn.qkv.weight"], from_official(official)
    for i, part in enumerate(("query", "key", "value")):
        assert torch.equal(theirs[f"{IN_LAYER}.{part}.weight"], qkv[64 * i : 64 * (i + 1)])
    assert torch.equal(
        theirs["decoder.decoder_layers.1.intermediate.dense.weight"], official["decoder.blocks.1.mlp.fc1.weight"]
    )
    assert torch.equal(theirs["videomae.layernorm.weight"], official["encoder.norm.weight"])
    assert "decoder.head.weight" in theirs
    assert "mask_token" in theirs


def test_it_reads_the_names_of_a_model_saved_alone():
    encoder = filled(videomae.encoder("vit_tiny", **SMALL)).state_dict()
    alone = {name.removeprefix("videomae."): tensor for name, tensor in from_official(encoder).items()}
    assert is_hugging_face(list(alone))
    assert_same(to_official(alone), encoder)


def test_it_takes_a_key_bias_of_zero_and_no_other(official):
    theirs = from_official(official) | {f"{IN_LAYER}.key.bias": torch.zeros(64)}
    assert_same(to_official(theirs), official)
    with pytest.raises(ValueError, match=r"blocks.0.attn.k_bias is not zero"):
        to_official(theirs | {f"{IN_LAYER}.key.bias": torch.eye(64)[0]})


def test_it_refuses_two_spellings_and_thirds_of_an_attention(official):
    theirs = from_official(official)
    with pytest.raises(ValueError, match="under two spellings"):
        to_official(theirs | {f"{IN_LAYER}.q_bias": torch.zeros(64)})
    del theirs[f"{IN_LAYER}.value.weight"]
    with pytest.raises(ValueError, match=r"no blocks.0.attn.v.weight"):
        to_official(theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "vit"}, "must be a VideoMAE's; its model_type is 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act 'gelu'; got 'relu'"),
        ({"qv_bias": False}, "qv_bias true"),
        ({"patch_size": None}, "ill-formed"),
        ({"hidden_size": float("inf")}, "ill-formed"),
        ({"num_hidden_layers": 1 << 40}, "sizes must be whole numbers"),
        ({"architectures": ["VideoMAEForVideoClassification"], "use_mean_pooling": False}, "reads the first token"),
    ],
)
def test_it_refuses_configs_of_other_architectures(change, says):
    with pytest.raises(ValueError, match=says):
        stated_in({"model_type": "videomae"} | change, {})


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_it_refuses_another_kind_of_normalisation(change):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert stated_in({"model_type": "videomae"}, half).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="must divide pixels by 255"):
        stated_in({"model_type": "videomae"}, half | change)


def test_it_reads_the_config_it_writes():
    model = videomae.pretrain_model("vit_tiny", frames=8, image_size=(32, 64), cube=(4, 8, 8))
    size, input = model.encoder.size, model.input
    config = hugging_face.config_of(size, input, "pretrain", decoder_depth=4, num_classes=0, final_norm=True)
    stated = stated_in(config, hugging_face.preprocessor_of(input))
    assert (stated.width, stated.depth, stated.heads) == (size.width, size.depth, size.heads)
    assert (stated.decoder_width, stated.decoder_heads) == (size.decoder_width, size.decoder_heads)
    assert (stated.frames, stated.image_size, stated.cube) == (8, (32, 64), (4, 8, 8))
    assert (stated.mean, stated.std) == (input.mean, input.std)
    oblong = Input(4, 32, (2, 16, 8))
    with pytest.raises(ValueError, match="square cubes"):
        hugging_face.config_of(size, oblong, "pretrain", decoder_depth=4, num_classes=0, final_norm=True)
