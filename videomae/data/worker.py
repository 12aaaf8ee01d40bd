"""One worker of the loader: a process that `loader.py` starts on `main` here.

It decodes the clips that its socket names into the shared memory, and says when each is there. It dies with its parent.
"""

import ctypes
import mmap
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch

from videomae.data.dataset import ClipReader, Sample
from videomae.data.decode import UnreadableVideo


class Task(NamedTuple):
    """Views of one clip to read, and the slots of the shared memory that they go to."""

    ticket: int
    path: str
    samples: tuple[Sample, ...]
    slots: tuple[int, ...]


class Done(NamedTuple):
    """What became of a task: unreadable holds the reason when the video could not be read, bug a traceback when the
    code failed."""

    ticket: int
    unreadable: str | None = None
    bug: str | None = None


def perform(task: Task, reader: ClipReader, clips: np.ndarray) -> Done:
    """Read task's views into clips [slots, T, H, W, 3]."""
    try:
        for slot, clip in zip(task.slots, reader.read(task.path, task.samples), strict=True):
            clips[slot] = clip
    except UnreadableVideo as error:
        return Done(task.ticket, unreadable=error.reason)
    return Done(task.ticket)


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent goes, even in the middle of a decode that blocks."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


def main(socket_fd: int, memory_fd: int, size: int, parent: int) -> None:
    _die_with(parent)
    torch.set_num_threads(1)
    link = Connection(socket_fd)
    reader: ClipReader = link.recv()
    clips = np.frombuffer(mmap.mmap(memory_fd, size), dtype=np.uint8).reshape(-1, *reader.shape)
    link.send("ready")
    # decoders write to stderr what they also raise, into the middle of the progress bar
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    while True:
        try:
            task: Task = link.recv()
        except EOFError:
            return
        try:
            done = perform(task, reader, clips)
        except Exception:
            link.send(Done(task.ticket, bug=traceback.format_exc()))
            raise
        link.send(done)
