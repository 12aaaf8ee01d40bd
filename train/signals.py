"""How a run is asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, after the step at hand."""

import contextlib
import signal
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stop_signals(
    after: str | None = "this step; once more to stop at once, without saving", *, is_last_word: bool = False
) -> Iterator[list[int]]:
    """A list that SIGTERM, SIGUSR1 or Ctrl-C appends its number to; the loop ends after the step at hand. A second one
    ends it at once, unless the first is the last word: schedulers send to every process, and torchrun once more.
    after: what the loop does then, in words; None: nothing is said."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received and not is_last_word:
            raise KeyboardInterrupt
        if not received and after is not None:
            print(f"\nstopping after {after}", file=sys.stderr)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
