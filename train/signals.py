"""How a run is asked to stop: by SIGTERM or Ctrl-C, after the step at hand."""

import contextlib
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals(after: str = "this step; once more to stop at once, without saving") -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C appends its number to; the loop ends after the step at hand. A second one ends it
    at once. after: what the loop does then, in words."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print(f"\nstopping after {after}", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
