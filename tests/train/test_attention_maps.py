"""Attention maps: the weights are the layer's own, and each is drawn at its cube."""

import numpy as np
import pytest
import torch

import kernels
from train.attention_maps import Layer, Map, Query, attention_maps, draw_attention, mean_weights, parse_layers
from train.one_clip import Moments
from videomae import masking
from videomae.blocks import Attention
from videomae.model import Encoder, Input, VideoMAE, size_of

INPUT = Input(4, 32, (2, 8, 8))  # 2 x 4 x 4 cubes
ALL = Query()


def trained(cls=VideoMAE, **options):
    """Random weights that attend to some more than to others."""
    torch.manual_seed(0)
    model = cls(size_of("vit_tiny"), INPUT, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def clip():
    torch.manual_seed(1)
    return torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8)


def mask(ratio=0.75):
    return masking.make("random", INPUT.grid, ratio, torch.tensor([5]))


def weights_of(attention, x):
    """[A, L, L] in float64, by the definition."""
    x, heads, width = x.double().numpy(), attention.heads, x.shape[1]
    q, k, _ = np.split(x @ attention.qkv.weight.detach().double().numpy().T, 3, axis=1)
    q = q + attention.q_bias.detach().double().numpy()
    q, k = (each.reshape(len(x), heads, width // heads).transpose(1, 0, 2) for each in (q, k))
    scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(width // heads))
    return scores / scores.sum(axis=2, keepdims=True)


def test_the_weights_are_those_that_the_layer_mixes_values_with(monkeypatch):
    torch.manual_seed(0)
    attention = Attention(24, 3)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(7, 24)
    weights = torch.stack([mean_weights(attention, x, torch.tensor([q])) for q in range(7)], dim=1)
    assert np.abs(weights.detach().numpy() - weights_of(attention, x)).max() < 1e-5
    values = (x @ attention.qkv.weight[48:].T + attention.v_bias).view(7, 3, 8)
    mixed = attention.proj(torch.einsum("aqk,kad->qad", weights, values).flatten(1))
    torch.testing.assert_close(mixed, attention(x[None]).whole()[0], atol=1e-5, rtol=1e-4)
    # a few queries at a time
    monkeypatch.setattr("train.attention_maps._AT_ONCE", 1)
    asked = torch.tensor([1, 4, 6])
    torch.testing.assert_close(mean_weights(attention, x, asked), weights[:, asked].mean(dim=1))


@torch.no_grad()
def test_each_layer_is_asked_with_what_it_is_given():
    model, frames, hidden = trained(decoder_depth=2), clip(), mask()
    first, second = model.encoder.blocks
    for part, cubes in ((None, torch.arange(32)), (hidden, hidden.visible[0])):
        x = model.encoder.embed(frames, None if part is None else part.visible)
        made = attention_maps(model, frames, [Layer("encoder", 2), Layer("encoder", 1)], query=ALL, mask=part)
        given = [first.norm1(x), second.norm1(sum(first(x, None)))]
        for one, block, tokens in zip(made, (second, first), given[::-1], strict=True):
            expected = torch.full((4, 32), torch.nan)
            expected[:, cubes] = torch.from_numpy(weights_of(block.attn, tokens[0]).mean(axis=1)).float()
            torch.testing.assert_close(one.shares.flatten(1), expected, equal_nan=True, atol=1e-6, rtol=1e-4)
            assert (one.queries, one.tokens) == (len(cubes), len(cubes))


@torch.no_grad()
def test_a_decoder_is_asked_for_its_hidden_cubes():
    model, frames, hidden = trained(decoder_depth=2), clip(), mask()
    (one,) = attention_maps(model, frames, [Layer("decoder", 2)], query=ALL, mask=hidden)
    visible = model.encoder_to_decoder(model.encoder(frames, hidden.visible))
    x = kernels.decoder_input(
        visible, model.mask_token.flatten(), model.decoder_positions, hidden.visible, hidden.masked
    )
    first, second = model.decoder.blocks
    weights = weights_of(second.attn, second.norm1(sum(first(x, None)))[0])[:, 8:].mean(axis=1)
    order = torch.cat((hidden.visible[0], hidden.masked[0]))
    torch.testing.assert_close(one.shares.flatten(1)[:, order], torch.from_numpy(weights).float(), atol=1e-6, rtol=1e-4)
    assert (one.queries, one.tokens) == (24, 32)


def test_a_query_is_the_cube_at_its_place():
    model, hidden = trained(Encoder), mask()
    number = int(hidden.visible[0, 3])
    cube = (number // 16, number // 4 % 4, number % 4)
    query = Query.parse(",".join(map(str, cube)), INPUT.grid)
    (seen,) = attention_maps(model, clip(), [Layer("encoder", 1)], query=query, mask=hidden)
    assert (seen.queries, seen.tokens) == (1, 8)
    with torch.no_grad():
        x = model.blocks[0].norm1(model.embed(clip(), hidden.visible))[0]
    expected = weights_of(model.blocks[0].attn, x)[:, 3]
    assert np.abs(seen.shares.flatten(1)[:, hidden.visible[0]].numpy() - expected).max() < 1e-5
    other = int(hidden.masked[0, 0])
    gone = Query((other // 16, other // 4 % 4, other % 4))
    with pytest.raises(ValueError, match="hidden by the mask; visible are .*"):
        attention_maps(model, clip(), [Layer("encoder", 1)], query=gone, mask=hidden)


@pytest.mark.parametrize("text", ["", "max", "1,2", "2,0,0", "0,4,0", "0,0,4", "-1,0,0", "0,0,0,0", "0;0;0"])
def test_what_is_no_cube_of_the_clip_is_refused(text):
    with pytest.raises(ValueError, match="query must be mean, or a cube as SLOT,ROW,COLUMN below 2,4,4"):
        Query.parse(text, INPUT.grid)


def test_layers_have_numbers_from_one_on():
    model = trained(decoder_depth=3)
    assert parse_layers(["2", "last", "decoder.last", "1"], model) == [
        Layer("encoder", 2),
        Layer("decoder", 3),
        Layer("encoder", 1),
    ]
    assert parse_layers(["all", "decoder.all"], model) == [
        *(Layer("encoder", n) for n in (1, 2)),
        *(Layer("decoder", n) for n in (1, 2, 3)),
    ]
    for text, says in (
        ("0", "encoder has the layers 1 to 2"),
        ("3", "1 to 2"),
        ("decoder.4", "decoder has the layers 1 to 3"),
        ("first", "a layer is a number"),
        ("-1", "a layer is a number"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_layers([text], model)
    with pytest.raises(ValueError, match="no decoder"):
        parse_layers(["decoder.1"], trained(Encoder))


@pytest.mark.parametrize("each_head", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_brightest_is_drawn_at_its_cube(each_head):
    input = Input(20, 32, (2, 8, 8))  # ten slots: not all are shown
    shares = torch.full((2, 10, 4, 4), 0.5 / 159)
    shares[:, 9, 1, 2] = 0.5
    shares[:, 0, 0, 0] = torch.nan
    frames, moments = torch.full((20, 32, 32, 3), 100, dtype=torch.uint8), Moments(range(20), range(20))

    def draw(query):
        one = Map(Layer("encoder", 1), shares, 160, 160)
        return draw_attention(
            [one], frames, input, moments, query=query, each_head=each_head, title="", seen=""
        ).astype(int)

    marked = (draw(Query((9, 1, 2))) == (0, 255, 80)).all(axis=2)
    rows, columns = np.nonzero(marked)
    tops = [top for top in np.unique(rows) if top - 1 not in rows]
    # a frame around the cube in the original and in every map, in the last column only
    assert len(tops) == (3 if each_head else 2)
    height = 128 // 4
    assert columns.max() - columns.min() + 1 == height
    sheet = draw(Query((9, 1, 2)))
    inner = sheet[tops[1] + 4, columns.min() + 4]
    # inferno's brightest, seven tenths, over grey 100
    assert np.abs(inner - (0.7 * np.array([252, 255, 164]) + 30)).max() <= 2
    assert sheet[tops[1] + 4, columns.min() - 20].sum() < inner.sum() / 3
    # what has no token is neither bright nor dark
    for top in tops[1:]:
        assert (sheet[top - height : top] == 190).all(axis=(0, 2)).sum() == height
