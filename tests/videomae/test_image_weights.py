"""image_weights: image transformers begin video ones with the same arithmetic, and what has no place is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

import videomae
from kernels.launch import IMAGENET_MEAN, IMAGENET_STD
from videomae.blocks import NORM_EPS
from videomae.data.sampling import Sampling
from videomae.image_weights import PROJECTION, inflated, is_image, to_official
from videomae.model import Encoder
from videomae.weights import describe, model_from, save_weights, set_normalization

WIDTH, HEADS = 64, 4  # vit_tiny's, two blocks deep
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def timm_weights(seed=0, patch=16, **others):
    """An ImageMAE encoder by its names; every tensor is random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, patch, patch), "patch_embed.proj.bias": (WIDTH,)}
    linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for i in range(2):
        shapes |= {f"blocks.{i}.norm{k}.{part}": (WIDTH,) for k in (1, 2) for part in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in (shapes | others).items()}


def timm_block(tensors, i, x):
    """A block by timm's formula, bias of keys included: independent of ours and of transformers."""

    def get(name):
        return tensors[f"blocks.{i}.{name}.weight"], tensors[f"blocks.{i}.{name}.bias"]

    batch, length, _ = x.shape
    packed = functional.linear(functional.layer_norm(x, (WIDTH,), *get("norm1"), eps=NORM_EPS), *get("attn.qkv"))
    q, k, v = packed.view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(-1)
    x = x + functional.linear((weights @ v).transpose(1, 2).flatten(2), *get("attn.proj"))
    hidden = functional.linear(functional.layer_norm(x, (WIDTH,), *get("norm2"), eps=NORM_EPS), *get("mlp.fc1"))
    return x + functional.linear(functional.gelu(hidden), *get("mlp.fc2"))


def hugging_face_model(kind, seed=0, **config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
    kind = getattr(transformers, kind)
    if kind is transformers.ViTMAEForPreTraining:
        sizes |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = kind(kind.config_class(**sizes, image_size=32, layer_norm_eps=NORM_EPS, **config))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model.eval()


def encoder(**others):
    return videomae.encoder("vit_tiny", **({"frames": 2, "image_size": 32} | others)).eval()


def still(seed=0, frames=2):
    """A clip [1, T, 32, 32, 3] of equal frames, and its image as an image model takes it."""
    image = torch.randint(0, 256, (1, 1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels = (image[:, 0].float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    return image.expand(-1, frames, -1, -1, -1).contiguous(), pixels.permute(0, 3, 1, 2)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_still_has_the_tokens_of_its_image(slots):
    tensors, (clip, image) = timm_weights(), still(frames=slots)
    model = encoder(frames=slots, cube=(slots, 16, 16))
    videomae.load_weights(model, tensors)
    model.positions.zero_()
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    wanted = functional.conv2d(image, weight, bias, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.embed(clip), wanted, rtol=1e-5, atol=2e-5)


def test_a_still_has_the_tokens_that_transformers_gives_its_image(tmp_path):
    theirs, (clip, image) = hugging_face_model("ViTModel"), still(1)
    theirs.save_pretrained(tmp_path)
    model = encoder()
    videomae.load_weights(model, tmp_path)
    model.positions.zero_()
    wanted = theirs.embeddings.patch_embeddings(image)
    torch.testing.assert_close(model.embed(clip), wanted, rtol=1e-5, atol=2e-5)


def test_its_blocks_compute_what_timms_do_bias_of_keys_or_not():
    tensors, model = timm_weights(), encoder()
    videomae.load_weights(model, tensors)
    x = torch.randn(2, 9, WIDTH)
    wanted = timm_block(tensors, 1, timm_block(tensors, 0, x))
    last = functional.layer_norm(wanted, (WIDTH,), tensors["norm.weight"], tensors["norm.bias"], eps=NORM_EPS)
    torch.testing.assert_close(model.blocks(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.blocks(x, model.norm), last, rtol=1e-5, atol=1e-5)


def saved(theirs, folder, form):
    """The model as a dict, in the spelling that it has in memory, or as a folder on disk."""
    if form == "memory":
        return theirs.state_dict()
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", ["memory", "disk"])
@pytest.mark.parametrize(
    "kind", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining", "DeiTForImageClassificationWithTeacher"]
)
def test_its_blocks_compute_what_transformers_do(kind, form, tmp_path):
    theirs, model = hugging_face_model(kind), encoder()
    report = videomae.load_weights(model, saved(theirs, tmp_path, form))
    assert report.format == "image (hugging face)"
    assert report.fresh == ()
    assert {"embeddings.cls_token", "embeddings.position_embeddings"} <= set(report.ignored)
    assert set(report.used) == set(model.state_dict())
    trunk = getattr(theirs, "vit", getattr(theirs, "deit", theirs))
    x = wanted = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        for layer in trunk.layers:
            wanted = layer(wanted)
        normed = trunk.layernorm(wanted)
        got, got_normed = model.blocks(x), model.blocks(x, model.norm)
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5
    assert ((got_normed - normed).abs().max() / normed.abs().max()).item() <= 1e-5


def test_what_has_no_place_is_dropped_and_said():
    others = {"dist_token": (1, 1, WIDTH), "head.weight": (5, WIDTH), "head.bias": (5,), "head_dist.weight": (5, WIDTH)}
    model = videomae.classifier("vit_tiny", num_classes=5, frames=2, image_size=32)
    before = model.head.weight.clone()
    report = videomae.load_weights(model, {"model": timm_weights(**others)})
    assert report.format == "image (timm)"
    assert set(report.ignored) == {*others, "cls_token", "pos_embed", "norm.weight", "norm.bias"}
    # of as many classes as ours, but of images
    assert set(report.fresh) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert torch.equal(model.head.weight, before)
    assert "an image model: its kernel is spread over 2 frames, its head not used" in str(report)
    assert "normalisation is not stated" in str(report)
    assert "not known here" not in str(report)


def test_a_masked_autoencoders_decoder_is_dropped():
    others = {"mask_token": (1, 1, 8), "decoder_pos_embed": (1, 5, 8), "decoder_blocks.0.attn.qkv.weight": (24, 8)}
    others |= {"decoder_embed.weight": (8, WIDTH), "decoder_norm.bias": (8,), "decoder_pred.weight": (768, 8)}
    report = videomae.load_weights(encoder(), {"model": timm_weights(**others)})
    assert set(report.ignored) == {*others, "cls_token", "pos_embed"}
    assert report.fresh == ()


def test_a_mean_pooled_image_model_leaves_an_encoder_its_norm():
    tensors = timm_weights(**{"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,)})
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("norm.")}
    model = encoder()
    report = videomae.load_weights(model, tensors)
    assert set(report.fresh) == {"norm.weight", "norm.bias"}
    assert torch.equal(model.norm.weight, torch.ones(WIDTH))


def change_json(path, **changes):
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | changes))


def test_the_normalisation_of_images_becomes_the_models(tmp_path):
    hugging_face_model("ViTModel").save_pretrained(tmp_path)
    model = encoder()
    assert "there is no preprocessor_config.json: mean stays" in str(videomae.load_weights(model, tmp_path))
    assert model.input.mean == IMAGENET_MEAN
    change_json(tmp_path / "preprocessor_config.json", image_mean=HALF[0], image_std=HALF[1])
    assert "normalised with the file's mean" in str(videomae.load_weights(model, tmp_path))
    assert (model.input.mean, model.input.std) == HALF


def test_a_timm_folder_states_its_normalisation(tmp_path):
    save_file(timm_weights(), tmp_path / "model.safetensors")
    change_json(tmp_path / "config.json", architecture="vit", pretrained_cfg={"mean": HALF[0], "std": HALF[1]})
    model = encoder()
    assert videomae.load_weights(model, tmp_path).format == "image (timm)"
    assert (model.input.mean, model.input.std) == HALF
    for wrong in ({"mean": 1}, [], {"mean": [float("inf")], "std": [1]}):
        change_json(tmp_path / "config.json", pretrained_cfg=wrong)
        with pytest.raises(ValueError, match="ill-formed|must be finite"):
            videomae.load_weights(encoder(), tmp_path)
    change_json(tmp_path / "config.json", pretrained_cfg={"mean": 1})
    with pytest.raises(ValueError, match="ill-formed"):
        videomae.load_weights(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_attention_heads": 8}, "heads 8, the model 4"),
        ({"hidden_act": "relu"}, "hidden_act 'gelu'; got 'relu'"),
        ({"model_type": "beit"}, "must be of an image model .*; its model_type is 'beit'"),
    ],
)
def test_a_config_of_another_model_is_refused(change, says, tmp_path):
    hugging_face_model("ViTModel").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **change)
    with pytest.raises(ValueError, match=says):
        videomae.load_weights(encoder(), tmp_path)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"blocks.0.ls1.gamma": (WIDTH,)}, "of another architecture: it has blocks.0.ls1.gamma"),
        ({"norm_pre.weight": (WIDTH,)}, "of another architecture: it has norm_pre.weight"),
        ({"blocks.0.attn.q_norm.weight": (16,)}, "it has blocks.0.attn.q_norm.weight"),
        ({"blocks.2.norm1.bias": (WIDTH,)}, "has 3 encoder blocks, the model 2"),
        ({"blocks.0.mlp.fc1.weight": (96, WIDTH)}, r"blocks.0.mlp.fc1.weight must be \(256, 64\), not \(96, 64\)"),
    ],
)
def test_it_refuses_image_models_that_compute_something_else(others, says):
    with pytest.raises(ValueError, match=says):
        videomae.load_weights(encoder(), timm_weights(**others))


def test_it_refuses_incomplete_ones_other_patches_and_models_that_are_not_begun_so():
    tensors = timm_weights()
    del tensors["blocks.1.attn.qkv.bias"]
    with pytest.raises(ValueError, match=r"blocks.1.attn.q_bias is missing, blocks.1.attn.v_bias is missing"):
        videomae.load_weights(encoder(), tensors)
    with pytest.raises(ValueError, match="patches of 8x8 pixels, the model's cubes have 16x16"):
        videomae.load_weights(encoder(), timm_weights(patch=8))
    pretrain = videomae.pretrain_model("vit_tiny", frames=2, image_size=32)
    with pytest.raises(ValueError, match="an image model, without a decoder for clips: load it into an Encoder"):
        videomae.load_weights(pretrain, timm_weights())
    with pytest.raises(ValueError, match="positions must be 'fresh'"):
        videomae.load_weights(encoder(), timm_weights(), positions="interpolate")
    theirs = {"embeddings.patch_embeddings.projection.weight": torch.ones(WIDTH, 3, 16, 16)}
    twice = ("layers.0.attention.q_proj.bias", "encoder.layer.0.attention.attention.query.bias")
    with pytest.raises(ValueError, match="twice, under two spellings"):
        to_official(theirs | dict.fromkeys(twice, torch.ones(1)), "a dict")


@pytest.fixture
def of_one_frame(tmp_path):
    """Our own image model, trained with another normalisation; its file."""
    torch.manual_seed(0)
    model = videomae.pretrain_model("vit_tiny", frames=1, image_size=32, cube=(1, 8, 8), decoder_depth=1)
    set_normalization(model, *HALF)
    model.input = model.encoder.input = replace(model.encoder.input, sampling=Sampling("dense", 4))
    save_weights(model, tmp_path / "image.safetensors")
    return model, tmp_path / "image.safetensors"


@pytest.mark.parametrize("slots", [2, 4])
def test_our_own_of_one_frame_gives_a_still_its_images_tokens(slots, of_one_frame):
    image, file = of_one_frame
    model = videomae.classifier("vit_tiny", num_classes=3, frames=8, image_size=32, cube=(slots, 8, 8))
    own = model.positions.clone()
    report = videomae.load_weights(model, file)
    assert report.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert len(report.used) == len(model.state_dict()) - 4
    clip, _ = still(frames=8)
    got, wanted = model.embed(clip) - model.positions, image.encoder.embed(clip[:, :1]) - image.encoder.positions
    torch.testing.assert_close(got, wanted.repeat(1, 8 // slots, 1), rtol=1e-5, atol=2e-5)
    for name, weight in model.blocks.named_parameters():
        assert torch.equal(weight, image.encoder.blocks.get_parameter(name)), name
    assert torch.equal(model.positions, own)
    assert (model.input.positions_of, model.input.sampling) == (None, None)
    assert (model.input.mean, model.input.std) == HALF


def test_the_report_on_our_own_says_what_became_of_kernel_and_positions(of_one_frame):
    report = videomae.load_weights(encoder(frames=16, cube=(2, 8, 8)), of_one_frame[1])
    assert report.format == "videomae"
    said = str(report)
    assert "the file's frames: 1, the model's: 16" in said
    assert "an image model: its kernel is spread over 2 frames\n" in said
    assert "positions: the model's own, of 8x4x4 cubes" in said
    assert "1 frame of 32x32 in cubes of 1x8x8" in describe(of_one_frame[1])


def test_our_own_remains_a_model_of_one_frame_where_cubes_have_one(of_one_frame):
    image, file = of_one_frame
    again, report = model_from(file)
    assert torch.equal(again.encoder.patch_embed.proj.weight, image.encoder.patch_embed.proj.weight)
    model = encoder(frames=4, cube=(1, 8, 8))
    report = videomae.load_weights(model, file)
    assert torch.equal(model.patch_embed.proj.weight, image.encoder.patch_embed.proj.weight)
    assert "positions: the model's own, of 4x4x4 cubes; the weights know 1x4x4" in str(report)
    assert "image model" not in str(report)


def test_our_own_is_refused_where_it_does_not_fit(of_one_frame):
    _, file = of_one_frame
    with pytest.raises(ValueError, match=r"image.safetensors has patches of 8x8 pixels, the model's cubes have 16x16"):
        videomae.load_weights(encoder(), file)
    with pytest.raises(ValueError, match="is an image model, whose positions are not those of clips"):
        videomae.load_weights(encoder(cube=(2, 8, 8)), file, positions="interpolate")
    pretrain = videomae.pretrain_model("vit_tiny", frames=2, image_size=32, cube=(2, 8, 8), decoder_depth=1)
    with pytest.raises(ValueError, match="an image model, without a decoder for clips: load it into an Encoder"):
        videomae.load_weights(pretrain, file)
    of_clips = encoder(cube=(2, 8, 8)).state_dict()
    for tensors in (of_clips, {}, {PROJECTION: torch.ones(3)}):
        with pytest.raises(
            ValueError, match="a dict is no image model: it has no patch_embed.proj.weight of one frame"
        ):
            inflated(tensors, (2, 8, 8), "a dict")


def test_it_tells_images_from_clips():
    assert is_image(timm_weights())
    assert not is_image(encoder().state_dict())


def test_a_model_is_built_of_an_image_file(tmp_path):
    hugging_face_model("ViTForImageClassification", num_labels=7).save_pretrained(tmp_path)
    model, report = model_from(tmp_path)
    assert type(model) is Encoder
    assert (model.input.frames, model.input.size, model.input.cube) == (16, (32, 32), (2, 16, 16))
    assert report.fresh == ()
    assert "image (hugging face) weights" in describe(tmp_path)
    assert "16 frames of 32x32 in cubes of 2x16x16 (not all of it is stated in the file)" in describe(tmp_path)
