"""One worker of a pool: a process that `pool.py` starts on `main` here. It dies with its parent."""

import ctypes
import itertools
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import torch

from videomae.data.pool import Answer, Service

_TRIM_EVERY = 500  # tasks; it takes a few ms


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent goes, even in the middle of a decode that blocks."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def _give_memory_back() -> None:
    """Return freed memory to the system, where the C library can: decoders leave it in pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(socket_fd: int, parent: int) -> None:
    """Perform the tasks that the socket brings, one at a time, by the service that it brings first."""
    die_with(parent)
    torch.set_num_threads(1)
    link = Connection(socket_fd)
    service: Service = link.recv()
    link.send("ready")
    # decoders write to stderr what they also raise, into the middle of the progress bar
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for done in itertools.count():
        if done % _TRIM_EVERY == 0:
            _give_memory_back()
        try:
            task = link.recv()
        except EOFError:
            return
        try:
            answer = Answer(service(task))
        except Exception:
            link.send(Answer(bug=traceback.format_exc()))
            raise
        link.send(answer)
