"""What measuring whole training steps finds, and the rates that follow from it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bench.page import Ceilings
from bench.shapes import Shape, shape_of
from bench.steps import DECODER_DEPTHS
from bench.timing import Timing
from videomae.model import SIZES

# multiply-adds of a clip's forward pass, of 16 x 224 x 224 under a 90 % tube mask, as DESIGN section 8 states them:
# only visible cubes embedded, all queries in the decoder's last layer
STATED_GMAC = {"vit_small": 10.6, "vit_base": 33.8, "vit_large": 140.0}
# How many clips: the largest power of two, at most MOST_CLIPS, with which TOGETHER times the estimate for our own step
# fits into SHARE of the free memory. By counted traffic (bench/traffic.py) all sides of a group need 5.3 (ViT-H) to 6.1
# times as much: `published` runs its 3.5 to 3.8 times beside what the others and two captured graphs hold
MOST_CLIPS, TOGETHER, SHARE = 64, 6.5, 0.95
# a step's operations over the forward pass's multiply-adds: two for each, three times
FLOP_PER_MAC = 6


@dataclass(frozen=True)
class StepResult:
    """One side in one group, whose sides were measured in turn. Without timing, failure says why.

    losses: of its first steps, all on the same batch. peak_bytes: of a step, with weights, optimiser and batch.
    reserved_bytes: what the allocator took for it and has not given back. estimated_bytes: of the peak, before it ran.
    """

    size: str
    group: str
    side: str
    clips: int
    depth: int
    losses: tuple[float, ...] = ()
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    estimated_bytes: int | None = None
    timing: Timing | None = None
    failure: str = ""

    @property
    def ours(self) -> bool:
        return self.side.startswith("ours")

    @property
    def clips_per_second(self) -> float | None:
        return None if self.timing is None else self.clips / self.timing.median * 1e6

    def utilisation(self, ceilings: Ceilings) -> float | None:
        """The share of the measured rate of matrix products, by the stated operations, for every side the same."""
        rate = self.clips_per_second
        return None if rate is None else rate * FLOP_PER_MAC * stated_gmac(self.size) * 1e9 / ceilings.matmul


@dataclass(frozen=True)
class PartTimes:
    """Our step kernel by kernel, microseconds a clip: measured by part and direction, and at least by part."""

    size: str
    clips: int
    measured: dict[str, dict[str, float]]
    floors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstStep:
    """Seconds since the process began, at the end of each stage; Triton's cache was empty."""

    size: str
    clips: int
    engine: str
    imported: float
    built: float
    first_step: float
    second_step: float


@dataclass
class StepReport:
    """All that was found; a later result of the same side in the same group replaces an earlier one."""

    results: dict[tuple[str, str, str, int], StepResult] = field(default_factory=dict)
    clips: dict[str, int] = field(default_factory=dict)  # by size: as many as all sides had room for
    parts: list[PartTimes] = field(default_factory=list)
    first_steps: list[FirstStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        self.results[result.size, result.group, result.side, result.depth] = result

    def group(self, size: str, group: str) -> dict[str, StepResult]:
        """By side."""
        return {r.side: r for r in self.results.values() if (r.size, r.group) == (size, group)}

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(r.size for r in self.results.values()))

    def raw(self) -> dict[str, Any]:
        """For a json file."""
        return {
            "results": [asdict(r) for r in self.results.values()],
            "clips": self.clips,
            "parts": [asdict(p) for p in self.parts],
            "first_steps": [asdict(f) for f in self.first_steps],
            "notes": self.notes,
        }


def stated_gmac(size: str) -> float:
    """Billions of multiply-adds of a clip's forward pass, with the recipe's decoder: stated, or by the same formula."""
    return STATED_GMAC.get(size) or counted_gmac(shape_of(size, 1), DECODER_DEPTHS[size])


def counted_gmac(shape: Shape, decoder_depth: int) -> float:
    """The formula of DESIGN section 8."""
    size, N, V, M, K = SIZES[shape.size], shape.num_cubes, shape.num_visible, shape.num_masked, shape.cube_values
    D, E = size.width, size.decoder_width
    encoder = V * K * D + size.depth * (12 * V * D**2 + 2 * V**2 * D)
    decoder = V * D * E + decoder_depth * (12 * N * E**2 + 2 * N**2 * E) + M * E * K
    return (encoder + decoder) / 1e9
