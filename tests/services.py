"""Services for pools of workers in tests: imported by the workers, so they stand in a module of their own."""

import ctypes
import os
import signal
import time
from typing import Any, NamedTuple


class Odd(NamedTuple):
    """A task: something to do, and a number to give back."""

    what: str
    number: int


class OddJobs:
    """Does what a task says, well or badly."""

    fds = ()

    def __call__(self, task: Odd) -> Any:
        if task.what == "sleep in C":
            # with the interpreter's lock held: no signal handler, no other thread of this process gets it out
            ctypes.PyDLL(None).sleep(1000)
        elif task.what == "crash in C":
            ctypes.string_at(0)
        elif task.what == "exit":
            os._exit(7)
        elif task.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif task.what == "raise":
            raise KeyError("a bug")
        elif task.what == "GPUs":
            return os.environ["CUDA_VISIBLE_DEVICES"]
        elif task.what == "wait":
            time.sleep(2)
        return task.number, os.getpid()


class OpenByDecord:
    """Opens a file with decord, which waits in C for a pipe's other end."""

    fds = ()

    def __call__(self, path: str) -> int:
        import decord

        return len(decord.VideoReader(path, num_threads=1))


def read_part(paths: list[str], part: int, parts: int, out: str) -> None:
    """Read every process's share of ten global batches of six clips, two views each, and save what came."""
    import torch

    from videomae.data.augment import Augment
    from videomae.data.dataset import Order
    from videomae.data.loader import Loader
    from videomae.data.readers import ClipReader

    order, size = Order(len(paths), 3, views=2), 12 // parts
    reader = ClipReader(frames=4, size=(16, 16), stride=1, augment=Augment(), seed=3, views=2)
    batches = [order.samples(12 * step + part * size, size) for step in range(10)]
    with Loader(reader, paths, batches, batch_size=size, workers=part + 1) as loader:
        torch.save([(batch.frames.clone(), batch.keys) for batch in loader], out)
