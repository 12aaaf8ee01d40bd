"""How far a command is that does not train."""

import sys
import time

from tqdm import tqdm

_SAY_EVERY = 30.0  # seconds, where no bar is drawn


class Progress:
    """A bar where stderr is a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int = 0, unit: str = "videos") -> None:
        self._total, self._done, self._begun, self._unit = total, done, done, unit
        self._started = self._said = time.monotonic()
        interactive = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", leave=False, disable=not interactive)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= _SAY_EVERY:
            self._said = now
            rate = (self._done - self._begun) / (now - self._started)
            left = (self._total - self._done) / rate / 60
            done = f"{self._done:,} of {self._total:,} {self._unit}"
            print(f"{done}, {rate:.3g} a second, {left:.0f} minutes left", flush=True)
