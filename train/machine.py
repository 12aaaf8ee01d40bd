"""The machine that a run is on: its device, the cores that may decode, and how much memory is free."""

import os
from pathlib import Path

import torch

from kernels.launch import check
from videomae.data.pool import available_cpus

# of the free memory, what the estimate of a step may take: it is within 15 %, and a GPU holds little else; a CPU's
# memory is also other processes', the decoding workers', and the cache of files
SHARE = {"cuda": 0.85, "cpu": 0.5}
_CONTAINER = Path("/sys/fs/cgroup")


def decoding_cores(device: torch.device, processes: int = 1) -> int:
    """Cores that may decode for one of so many processes: a GPU waits for as many as there are; a CPU that trains needs
    half of them itself."""
    cpus = available_cpus() // processes
    return max(cpus - 1 if device.type == "cuda" else cpus // 2, 1)


def pick_device(wanted: str | None, number: int | None = None) -> torch.device:
    """cuda where there is one, else cpu; number: which of the machine's GPUs, the current one if not given. ValueError
    when cuda is asked for and there is none, or not so many."""
    has_gpu = torch.cuda.is_available()
    check(wanted != "cuda" or has_gpu, "no GPU that torch can use; --device cpu, or install the CUDA build of torch")
    if number is None or (wanted or "cuda") == "cpu" or not has_gpu:
        return torch.device(wanted or ("cuda" if has_gpu else "cpu"))
    count = torch.cuda.device_count()
    check(number < count, f"process {number} of this machine has no GPU: there are {count}; --nproc-per-node {count}")
    return torch.device("cuda", number)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = {}
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for line in info.read_text().splitlines():
        name, value = line.split(":")
        pages[name] = int(value.split()[0]) * 1024
    free = pages["MemAvailable"]
    limit = _CONTAINER / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        # what is kept of files counts as used, and is given up when memory is asked for
        kept = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        used = int((_CONTAINER / "memory.current").read_text()) - int(kept.get("inactive_file", 0))
        free = min(free, int(most) - used)
    return free


def memory_budget(device: torch.device, processes: int = 1) -> int:
    """Bytes that a step may be planned to take, in each of the machine's processes: a share of the free ones."""
    # every process has a GPU of its own, but none a CPU
    return int(free_memory(device) * SHARE[device.type]) // (processes if device.type == "cpu" else 1)


def bytes_text(size: int) -> str:
    """`12.3 GB`, `45 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
