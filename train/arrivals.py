"""What steps computed on the device, given out once it has arrived on the host by itself: no step waits for it."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

LAG = 2  # steps after which values are waited for, if they have not arrived

T = TypeVar("T")


class _Way(NamedTuple):
    """values: on the host. event: that they are there; None where they always were."""

    item: object
    values: Tensor
    event: torch.cuda.Event | None

    def has_come(self) -> bool:
        return self.event is None or self.event.query()


class Arrivals(Generic[T]):
    """Items whose values are on their way, in order."""

    def __init__(self) -> None:
        self._on_the_way: deque[_Way] = deque()

    def push(self, item: T, values: Tensor) -> Iterator[tuple[T, list[float]]]:
        """Send values off; gives out the items whose values have come, and waits for those pushed LAG pushes before."""
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._on_the_way.append(_Way(item, values, event))
        while self._on_the_way and (self._on_the_way[0].has_come() or len(self._on_the_way) > LAG):
            yield self._next()

    def drain(self) -> Iterator[tuple[T, list[float]]]:
        """Wait for all that are on their way."""
        while self._on_the_way:
            yield self._next()

    def _next(self) -> tuple[T, list[float]]:
        item, values, event = self._on_the_way.popleft()
        if event is not None:
            event.synchronize()
        return item, values.tolist()  # type: ignore[return-value]
