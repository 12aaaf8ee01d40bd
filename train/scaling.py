"""What a step takes of time on so many GPUs: arithmetic, starting kernels, the update, the network, decoding. Formulas
and data sheets, nothing measured but what decoding costs; `train.plan --gpus N` prints them.

    step = max(arithmetic or starting kernels, whichever is longer + update + what the network is not done with, data)

Bandwidths are the links' own: no latency, no other traffic, no network that is shared.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from kernels.launch import check
from train.memory import Workload
from videomae.blocks import Recompute

Parallel = Literal["ddp", "fsdp"]
Files = Literal["original", "h264-fast", "jpeg"]


@dataclass(frozen=True)
class Gpu:
    """A data sheet's figures; bytes and operations a second."""

    name: str
    memory: float  # GB, as sold: what the driver shows is up to 7 % more
    peak: float  # bfloat16 with sums in float32, dense
    memory_bandwidth: float
    link: float  # to the other GPUs of a machine, in one direction
    in_machine: int


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways; DGX
        # H200: 8
        Gpu("h200", 141, 989.4e12, 4.8e12, 450e9, 8),
        # NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s, 1,979 TFLOP/s with sparsity, NVLink 900 GB/s both ways; DGX
        # H100: 8
        Gpu("h100", 80, 989.4e12, 3.35e12, 450e9, 8),
        # NVIDIA A100 data sheet, SXM, 80 and 40 GB: 2,039 and 1,555 GB/s, 312 TFLOP/s, NVLink 600 GB/s both ways; DGX
        # A100: 8
        Gpu("a100-80", 80, 312e12, 2.039e12, 300e9, 8),
        Gpu("a100-40", 40, 312e12, 1.555e12, 300e9, 8),
        # NVIDIA L40S data sheet: 48 GB, 864 GB/s, 362.05 TFLOP/s, no NVLink, PCIe 4.0 x16 64 GB/s both ways; servers
        # with 8
        Gpu("l40s", 48, 362.05e12, 0.864e12, 32e9, 8),
        # NVIDIA Ada architecture paper, GeForce RTX 4090: 24 GB, 1,008 GB/s, 165.2 TFLOP/s, no NVLink, PCIe 4.0 x16;
        # machines differ, 4 is assumed. Without peer access bytes go by the host's memory, more slowly than this
        Gpu("rtx4090", 24, 165.2e12, 1.008e12, 32e9, 4),
        # NVIDIA HGX B200: 180 GB of the 192 on the package, 8 TB/s, 2.25 PFLOP/s dense, NVLink 1.8 TB/s both ways
        Gpu("b200", 180, 2.25e15, 8e12, 900e9, 8),
    )
}

# one core's clips a second by views per decode, and bytes of a video: bench/results/loader.md, of 16 x 224 x 224 at
# stride 4 from 10 s of 340 x 256
DECODED: Mapping[Files, Mapping[int, float]] = {
    "original": {1: 18.26, 2: 35.78, 4: 68.97},
    "h264-fast": {1: 103.0, 2: 194.2, 4: 314.2},
    "jpeg": {1: 187.7, 2: 324.9, 4: 514.5},
}
VIDEO_BYTES: Mapping[Files, float] = {"original": 994e3, "h264-fast": 1.921e6, "jpeg": 4.915e6}

# of a step, of each block, and of what is computed anew in it, as bench/traffic.py counts them
_STARTS, _STARTS_OF_BLOCK = 97, 39
_STARTS_AGAIN: Mapping[Recompute, int] = {"none": 0, "norms": 3, "mlp": 5, "block": 16}
# of a kernel from Python: assumed, the low end of the 5 to 25 us that eager PyTorch takes for an op
_SECONDS_OF_START = 5e-6
# of the update: AdamW reads 16 and writes 12 a parameter, the gradient's norm reads 4 (bench/results/traffic.md: 32)
_UPDATE_BYTES = 32
# of the memory's peak bandwidth, what such kernels reach: assumed, 4.3 of an H200's 4.8 TB/s
_REACHED = 0.9
# of DistributedDataParallel: the gradients that are ready last, which no backward pass hides
_BUCKET = 25 * 2**20
# Llama 3 (arXiv 2407.21783, table 5): 419 unplanned stops in 54 days of 16,384 H100
_GPU_HOURS_OF_FAULT = 54 * 24 * 16_384 / 419


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a clip, 2 for a multiply-add. again: what backward computes anew."""

    forward: float
    backward: float
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again

    @property
    def backward_share(self) -> float:
        return (self.backward + self.again) / self.total


def operations(work: Workload) -> Operations:
    """Those of matrix products. Attention computes its weights again in backward: two products forward, five back."""
    size, counts, N = work.size, work.counts, work.counts.visible + work.counts.decoded
    V, P, D, E, K = counts.visible, counts.predicted, size.width, size.decoder_width, work.input.cube_values
    blocks = [_block(V, V, D)] * size.depth
    linear = 0.0
    if work.decoder_depth:
        last = P if work.short_last_layer else N
        blocks += [_block(N, N, E)] * (work.decoder_depth - 1) + [_block(N, last, E)]
        linear = V * D * E + P * E * K
    embedded = V * K * D
    attended = sum(attention for _, attention, _ in blocks)
    linear += sum(products for products, _, _ in blocks)
    again = 0.0
    if work.recompute == "block":
        # a block's last product is not needed to go back through it
        again = attended + sum(products - hidden for products, _, hidden in blocks)
    elif work.recompute == "mlp":
        again = sum(hidden for _, _, hidden in blocks)
    # nothing wants the gradient of the pixels
    return Operations(2 * (embedded + linear + attended), 2 * (embedded + 2 * linear + 2.5 * attended), 2 * again)


def _block(tokens: int, narrowed: int, width: int) -> tuple[float, float, float]:
    """Multiply-adds of a block's products, of its attention, and of one of its MLP's two products. narrowed: tokens
    that attend, and go through the MLP; queries, keys and values are one product of all."""
    products = (3 * tokens + 9 * narrowed) * width**2
    return products, 2 * tokens * narrowed * width, 4 * narrowed * width**2


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind. network: bytes a second between machines, in one direction, for all GPUs of a machine."""

    gpu: Gpu
    gpus: int
    network: float = 50e9
    cores: int | None = None  # of a machine; enough if not given

    def __post_init__(self) -> None:
        check(self.gpus >= 1, f"--gpus must be at least 1; got {self.gpus}")
        check(0 < self.network < 1e15, f"--network must be positive, in GB/s; got {self.network / 1e9:g}")
        check(self.cores is None or self.cores >= 1, f"--cores must be at least 1; got {self.cores}")

    @property
    def machines(self) -> int:
        return ceil(self.gpus / self.gpu.in_machine)

    @property
    def in_machine(self) -> int:
        return min(self.gpus, self.gpu.in_machine)

    @property
    def bandwidth(self) -> float:
        """Of the slowest link of a ring through all GPUs, which passes each machine's network once."""
        return self.gpu.link if self.machines == 1 else min(self.gpu.link, self.network)

    @property
    def decoding_cores(self) -> int | None:
        """Of a machine: all but one for each GPU's own process, as `machine.decoding_cores` has it."""
        return None if self.cores is None else max(self.cores // self.in_machine - 1, 1) * self.in_machine

    @property
    def hours_to_fault(self) -> float:
        return _GPU_HOURS_OF_FAULT / self.gpus


@dataclass(frozen=True)
class Exchange:
    """What the processes of a step tell each other. sent: bytes by each GPU; seconds: on the slowest link; waited: of
    them, those that nothing hides."""

    sent: float
    seconds: float
    waited: float

    @property
    def hidden(self) -> float:
        return self.seconds - self.waited


def ring(num_bytes: float, gpus: int) -> float:
    """Bytes that each GPU sends when all of them gather, or reduce and scatter, so many; an all-reduce is both."""
    return (gpus - 1) / gpus * num_bytes


def exchange(
    cluster: Cluster, parallel: Parallel, work: Workload, *, forward: float, backward: float, accumulation: int
) -> Exchange:
    """forward, backward: seconds of a micro-batch, behind which ddp hides its all-reduce in the last backward pass, and
    fsdp two gathers in every micro-batch and a reduce-scatter in the last. Gradients and weights are float32."""
    num_bytes = 4.0 * work.num_parameters
    once = ring(num_bytes, cluster.gpus)
    seconds = once / cluster.bandwidth
    if parallel == "ddp":
        unhidden = 2 * seconds * min(_BUCKET / num_bytes, 1.0)
        return Exchange(2 * once, 2 * seconds, max(2 * seconds - backward, unhidden))
    # nothing runs beside a pass's first gather, nor the last block's scatter
    unhidden = seconds / (work.size.depth + work.decoder_depth)
    each = max(seconds - forward, unhidden) + max(seconds - backward, unhidden)
    last = max(seconds - forward, unhidden) + max(2 * seconds - backward, 2 * unhidden)
    passes = 2 * accumulation + 1
    return Exchange(passes * once, passes * seconds, (accumulation - 1) * each + last)


def clips_of_core(files: Files, views: int) -> float:
    """Clips a second that a core decodes; between and beyond the measured views by the time that a view adds."""
    measured = DECODED[files]
    if views in measured:
        return measured[views]
    first, fourth = 1 / measured[1], 4 / measured[4]
    added = (fourth - first) / 3
    return views / (first + added * (views - 1))


@dataclass(frozen=True)
class Rate:
    """Of one GPU: measured clips a second, or else the share of its peak at which it computes."""

    share: float = 0.4
    clips_per_second: float | None = None

    def __post_init__(self) -> None:
        check(0 < self.share <= 1, f"--mfu must be above 0 and at most 1; got {self.share:g}")
        measured = self.clips_per_second
        check(measured is None or 0 < measured < 1e6, f"--clips-per-second must be positive; got {measured}")

    def of(self, gpu: Gpu, work: Workload) -> float:
        """Clips a second where nothing waits."""
        return self.clips_per_second or self.share * gpu.peak / operations(work).total


@dataclass(frozen=True)
class Step:
    """Seconds of a step, on the GPU with the most to do: the same for all."""

    clips: int  # of all GPUs
    arithmetic: float
    starts: float  # the GPU waits for kernels to be started
    update: float
    exchange: Exchange
    data: float  # the GPU waits for clips

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.starts + self.update + self.exchange.waited + self.data

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.seconds

    @property
    def computing(self) -> float:
        """Share of the time."""
        return self.arithmetic / self.seconds

    @property
    def breaks(self) -> tuple[str, float]:
        """What keeps the GPUs from computing the most, and its share of the time."""
        losses = {
            "decoding": self.data,
            "network": self.exchange.waited,
            "kernel starts": self.starts,
            "update": self.update,
        }
        name = max(losses, key=lambda name: losses[name])
        return name, losses[name] / self.seconds


def predict(
    cluster: Cluster,
    work: Workload,
    rate: Rate,
    *,
    micro_batch: int,
    accumulation: int,
    parallel: Parallel = "ddp",
    eager: bool = True,
    core_clips: float = 0.0,
) -> Step:
    """A step, estimated. eager: every kernel is started from Python; core_clips: clips a second that a core decodes."""
    ops, gpu = operations(work), cluster.gpu
    arithmetic = micro_batch / rate.of(gpu, work)
    started = _SECONDS_OF_START * _starts(work) if eager else 0.0
    each = max(arithmetic, started)
    share = ops.backward_share
    told = exchange(
        *(cluster, parallel, work),
        forward=(1 - share) * each,
        backward=share * each,
        accumulation=accumulation,
    )
    own = work.num_parameters / (cluster.gpus if parallel == "fsdp" else 1)
    update = _UPDATE_BYTES * own / (_REACHED * gpu.memory_bandwidth)
    clips = micro_batch * accumulation * cluster.gpus
    busy = accumulation * each + update + told.waited
    data = 0.0
    if cluster.decoding_cores is not None:
        # the fullest machine's GPUs wait, and all others for them
        fed = cluster.decoding_cores * core_clips / cluster.in_machine
        data = max(micro_batch * accumulation / fed - busy, 0.0)
    return Step(clips, accumulation * arithmetic, accumulation * (each - arithmetic), update, told, data)


def _starts(work: Workload) -> int:
    blocks = work.size.depth + work.decoder_depth
    return _STARTS + (_STARTS_OF_BLOCK + _STARTS_AGAIN[work.recompute]) * blocks
