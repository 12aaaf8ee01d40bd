"""Before the first step: devices, threads, memory, and how a recipe's batch becomes micro-batches that fit."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.launch import check
from videomae.model import Input, Size

# numbers kept for the backward pass per token, block and channel: norms, qkv, attention, both sides of the MLP's GELU
# and residuals
_KEPT_PER_CHANNEL = 17
_SHARE_OF_MEMORY = 0.5  # of what is free; the estimate is a formula, not a measurement


@dataclass(frozen=True)
class BatchPlan:
    """clips = micro_batch * accumulation, all on one device."""

    clips: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        return self.clips // self.micro_batch


def available_cpus() -> int:
    """Cores this process may use: affinity and the container's quota, where torch would count the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(int(limit) // int(period), 1))
    return cores


def pick_device(wanted: str | None) -> torch.device:
    """cuda where there is one, else cpu; ValueError when cuda is asked for and there is none."""
    has_gpu = torch.cuda.is_available()
    check(wanted != "cuda" or has_gpu, "no GPU that torch can use; --device cpu, or install the CUDA build of torch")
    return torch.device(wanted or ("cuda" if has_gpu else "cpu"))


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
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def clip_bytes(
    size: Size, input: Input, *, num_masked: int, decoder_depth: int, recompute: bool, bytes_each: int
) -> int:
    """Memory of one clip's activations in a training step, estimated: bytes_each is 4 in float32, 2 under autocast."""
    num_visible = input.num_cubes - num_masked
    layers = ((num_visible, size.width, size.depth), (input.num_cubes, size.decoder_width, decoder_depth))
    kept = 0
    for tokens, width, depth in layers:
        block = tokens * width * _KEPT_PER_CHANNEL
        kept += (tokens * width * depth + block) if recompute else block * depth
    # prediction, target and their difference are float32 whatever the model computes in
    loss = num_masked * input.cube_values * 4 * 4
    return kept * bytes_each + loss


def plan_batch(clips: int, *, per_clip: int, fixed: int, free: int, micro_batch: int | None = None) -> BatchPlan:
    """The fewest micro-batches of equal size that fit: fixed + micro_batch * per_clip bytes within half of the free
    ones.

    micro_batch: asked for by hand; ValueError unless it divides clips.
    """
    check(clips >= 1, f"batch size must be at least 1; got {clips}")
    if micro_batch is not None:
        check(
            micro_batch >= 1 and clips % micro_batch == 0,
            f"micro-batch {micro_batch} does not divide a step's {clips} clips",
        )
        return BatchPlan(clips, micro_batch)
    most = max(int((free * _SHARE_OF_MEMORY - fixed) // per_clip), 1)
    fitting = next(n for n in range(1, clips + 1) if clips % n == 0 and clips // n <= most)
    return BatchPlan(clips, clips // fitting)
