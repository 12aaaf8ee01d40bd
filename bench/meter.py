"""How a device's time and memory are read while a whole step runs: events and PyTorch's allocator on a GPU, elsewhere a
clock and nothing. Benches of steps take a meter, so that they run without a GPU too."""

import gc
import os
import time
from typing import Any

import torch


class Meter:
    """Without a GPU."""

    how = "clock"
    has_memory = False

    def mark(self) -> Any:
        """A moment of the device's work, in the order in which it was given."""
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another; waits for the latter."""
        return end - begin

    def wait(self) -> None:
        """Until the device has done all it was given."""

    def keep_busy(self, seconds: float) -> None:
        """The device does nothing else for so long, while it is given work."""

    def clear(self) -> None:
        """Give back all memory that nothing refers to."""
        gc.collect()

    def allocated(self) -> int:
        """Bytes of all living tensors."""
        return 0

    def reserved(self) -> int:
        """Bytes that the process took from the device for tensors, in use or not."""
        return 0

    def free(self) -> int:
        """Bytes that nobody has taken."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def restart_peak(self) -> None:
        """From now on, `peak` is of what comes."""

    def peak(self) -> int:
        """The most bytes that living tensors had at once."""
        return 0

    def retries(self) -> int:
        """How often an allocation fitted only after unused memory was given back, which costs time."""
        return 0


class GpuMeter(Meter):
    """On a CUDA device, of whose tensors it counts; what libraries allocate by themselves is in `free` only."""

    how = "events"
    has_memory = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def keep_busy(self, seconds: float) -> None:
        # in clock cycles, of which no GPU does more than 2.1 billion a second: at least so long
        torch.cuda._sleep(int(seconds * 2.1e9))

    def clear(self) -> None:
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def retries(self) -> int:
        return torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)


def meter_of(device: torch.device) -> Meter:
    return GpuMeter(device) if device.type == "cuda" else Meter()
