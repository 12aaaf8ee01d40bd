"""Where every random choice of the data path comes from: a counter-based hash of (seed, epoch, index, view).

The mixing function is SplitMix64's (Steele, Lea and Flood, 2014), on 64-bit integers: the same on every device, batch
split and process count, and with every library version. A key is an int64; `Draws` turns one into a sequence of
numbers.
"""

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _mix(z: int) -> int:
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def key(*numbers: int) -> int:
    """One key, in int64's range, for a tuple of integers."""
    z = 0
    for number in numbers:
        z = _mix(z ^ (number & _MASK))
    return _signed(z)


def keys(*numbers: int | Tensor) -> Tensor:
    """`key` for int64 tensors that broadcast together: int64 of the broadcast shape, equal to `key` element by
    element."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        # a logical shift: int64's own keeps the sign
        return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))

    z: int | Tensor = 0
    for number in numbers:
        z = z ^ number
        z = (z if isinstance(z, Tensor) else torch.tensor(_signed(z & _MASK))) + _signed(_GOLDEN)
        z = shifted(shifted(z, 30) * _signed(_FIRST), 27) * _signed(_SECOND)
        z = shifted(z, 31)
    assert isinstance(z, Tensor)
    return z


class Draws:
    """A sequence of numbers that is a pure function of its key."""

    def __init__(self, *numbers: int) -> None:
        self._key = key(*numbers)
        self._count = 0

    def below(self, n: int) -> int:
        """The next integer, uniform in [0, n)."""
        self._count += 1
        return (key(self._key, self._count) & _MASK) % n

    def uniform(self) -> float:
        """The next number, uniform in [0, 1), of 53 bits."""
        return self.below(1 << 53) / (1 << 53)

    def normal(self) -> float:
        """The next number of mean 0 and deviation 1 (Box and Muller, 1958)."""
        radius = math.sqrt(-2 * math.log(1 - self.uniform()))
        return radius * math.cos(2 * math.pi * self.uniform())
