"""The hash behind every random choice."""

import torch

from videomae.keys import Draws, key, keys


def test_scalar_and_tensor_forms_agree_on_negative_and_large_numbers():
    numbers = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    table = keys(7, torch.tensor(numbers)[:, None], torch.tensor(numbers), 3)
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            assert table[i, j].item() == key(7, a, b, 3)


def test_never_changes():
    # a change of these values would change every sample of every run that is to be resumed
    assert key(0) == -2152535657050944081
    assert (key(1, 2, 3), key(3, 2, 1)) == (-3426316478316322125, -3014456889458036892)
    draws = Draws(1, 2)
    assert [draws.below(10**9) for _ in range(2)] == [84732305, 287313794]


def test_draws_are_uniform_and_different():
    draws = Draws(4)
    counts = torch.bincount(torch.tensor([draws.below(13) for _ in range(13000)]), minlength=13)
    assert ((counts - 1000).abs() < 150).all()
    assert [Draws(1).below(2**60)] != [Draws(2).below(2**60)]


def test_uniform_numbers_fill_zero_to_one_with_53_bits():
    draws = Draws(6)
    numbers = [draws.uniform() for _ in range(4000)]
    assert 0 <= min(numbers) < 0.002
    assert 0.998 < max(numbers) < 1
    assert all((number * 2**53).is_integer() for number in numbers)
    assert any(number * 2**53 % 2 for number in numbers)
    counts = torch.histc(torch.tensor(numbers), bins=10, min=0, max=1)
    assert ((counts - 400).abs() < 100).all()
    assert Draws(1, 2).uniform() == key(key(1, 2), 1) % 2**53 / 2**53


def test_normal_numbers_have_the_normal_moments_and_tails():
    draws = Draws(8)
    numbers = torch.tensor([draws.normal() for _ in range(8000)], dtype=torch.float64)
    assert abs(numbers.mean()) < 0.05
    assert abs(numbers.std() - 1) < 0.04
    assert abs((numbers**4).mean() - 3) < 0.4
    for bound, share in ((1, 0.3173), (2, 0.0455)):
        assert abs((numbers.abs() > bound).double().mean() - share) < 0.02
