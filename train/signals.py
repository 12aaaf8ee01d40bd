"""How a run is asked to stop: by SIGTERM, SIGUSR1 or Ctrl-C, after the step at hand."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

# seconds in which a second SIGTERM is the first one, told twice: schedulers tell every process, and torchrun tells its
# own once more
_TWICE = 10.0


@contextlib.contextmanager
def stop_signals(
    after: str | None = "this step; once more to stop at once, without saving", *, is_last_word: bool = False
) -> Iterator[list[int]]:
    """A list that SIGTERM, SIGUSR1 or Ctrl-C appends its number to; the loop ends after the step at hand. A second one
    ends it at once, unless the first is the last word: schedulers send to every process, and torchrun once more.
    after: what the loop does then, in words; None: nothing is said."""
    received: list[int] = []
    since = -_TWICE

    def note(number: int, _: object) -> None:
        nonlocal since
        if received and (is_last_word or (number != signal.SIGINT and time.monotonic() < since + _TWICE)):
            return
        if received:
            raise KeyboardInterrupt
        since = time.monotonic()
        received.append(number)
        if after is not None:
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                print(f"\nstopping after {after}", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
