"""One training at a time in a run folder: its first process holds a lock there, which the system lets go of when the
process ends, however it does."""

import contextlib
import errno
import os
import platform
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # only POSIX systems have it; elsewhere nothing is locked
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


class Claim:
    """The lock of a folder, which is there, until `close`. Raises ValueError where another process holds it; where
    nothing can be locked it says so, and the run goes on without."""

    def __init__(self, folder: Path) -> None:
        self._file: int | None = None
        path = folder / NAME
        if fcntl is None:
            return
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            self._warn(path, error)
            return
        try:
            # of the process, not of the file as flock's: a child that outlives it holds nothing
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self._warn(path, error)
                return
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "unknown"
            self.close()
            raise ValueError(
                f"another training writes to {folder} (process {holder}): wait for it, stop it, or give another --out; "
                f"if it is gone, remove {path}"
            ) from error
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()} on {platform.node()}\n".encode(), 0)

    def _warn(self, path: Path, error: OSError) -> None:
        print(f"note: {path}: {error.strerror}; nothing keeps a second training out of the folder", file=sys.stderr)

    def close(self) -> None:
        """Let go of it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()
