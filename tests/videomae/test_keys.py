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
