"""Which goals a whole training step meets."""

from collections.abc import Callable, Iterable

from bench.page import Ceilings, Goal
from bench.step_results import StepReport, StepResult

CLIPS_PER_SECOND = {"vit_base": 1600}
UTILISATION = {"vit_base": 0.40, "vit_large": 0.45}
# rival, the group where it was measured, how many times faster our fastest engine there is to be
SPEED = (("published", "step", 3.0), ("transformers", "step", 2.0), ("transformers, compiled", "compiled", 1.25))
# our side, and what share of transformers' peak memory it may take
MEMORY = (("ours, eager", 0.8), ("ours, graph", 0.8), ("ours, graph, norms anew", 0.6))
# first losses of all sides, but for one that has no float32 weights to compute them from
SAME_LOSS, ROUGH = 1e-3, "transformers, bfloat16 weights"
# of our engines, over all compared steps: rounding that weights carry from step to step, no more
SAME_ENGINE = 5e-3
ESTIMATE = 0.15
FIRST_STEP_SECONDS = 20.0


def step_goals(steps: StepReport, ceilings: Ceilings | None) -> list[Goal]:
    """Every goal that something was measured for."""
    found: list[Goal] = []
    for size in steps.sizes:
        if steps.group(size, "step"):
            found += _rate_goals(steps, size, ceilings)
            found += [g for side, share in MEMORY for g in _memory_goal(steps, size, side, share)]
            found += [_loss_goal(steps, size), _engine_goal(steps, size)]
        found += [_speed_goal(steps, size, *wanted) for wanted in SPEED if steps.group(size, wanted[1])]
        found += [_estimate_goal(r) for r in steps.group(size, "memory").values()]
        found += _depth_goals(steps, size)
    for f in steps.first_steps:
        where = f"{f.size}, {f.clips} clips, {f.engine}, Triton's cache empty"
        measured = f"{f.first_step:.1f} s, of them {f.imported:.1f} for imports"
        met = f.first_step < FIRST_STEP_SECONDS
        found.append(Goal(f"first step in less than {FIRST_STEP_SECONDS:.0f} s", where, measured, met))
    return found


def fastest(results: Iterable[StepResult]) -> StepResult | None:
    """Of ours."""
    timed = [r for r in results if r.ours and r.timing]
    return min(timed, key=lambda r: r.timing.median, default=None)


def difference(losses: Iterable[float], others: Iterable[float]) -> float:
    """The largest relative one; not a number where a loss is none."""
    found = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=False)]
    return max(found, key=lambda d: (d != d, d), default=float("nan"))


def _where(r: StepResult) -> str:
    return f"{r.size}, {r.clips} clips"


def _rate_goals(steps: StepReport, size: str, ceilings: Ceilings | None) -> list[Goal]:
    results = [*steps.group(size, "step").values(), *steps.group(size, "compiled").values()]
    best = fastest(results)
    where = f"{_where(results[0])}, {best.side if best else 'no engine was timed'}"
    found = []
    if size in CLIPS_PER_SECOND:
        wanted, rate = CLIPS_PER_SECOND[size], best and best.clips_per_second
        measured = f"{rate:,.0f} clips/s" if rate else "not measured"
        found.append(Goal(f"at least {wanted:,} clips/s", where, measured, rate >= wanted if rate else None))
    if size in UTILISATION:
        share = best.utilisation(ceilings) if best and ceilings else None
        text = f"at least {UTILISATION[size]:.0%} of the measured rate of matrix products"
        measured = "not measured" if share is None else f"{share:.1%}"
        found.append(Goal(text, where, measured, None if share is None else share >= UTILISATION[size]))
    return found


def _speed_goal(steps: StepReport, size: str, rival: str, group: str, wanted: float) -> Goal:
    results = steps.group(size, group)
    best, other = fastest(results.values()), results.get(rival)
    text = f"at least {wanted:g} times as fast as {rival}"
    where = _where(next(iter(results.values())))
    if best is None or other is None or other.timing is None:
        reason = other.failure if other and other.failure else "not measured"
        return Goal(text, where, reason, None)
    assert best.timing is not None
    ratio = other.timing.median / best.timing.median
    return Goal(text, where, f"{ratio:.2f} times, by {best.side}", ratio >= wanted)


def _memory_goal(steps: StepReport, size: str, side: str, share: float) -> list[Goal]:
    results = steps.group(size, "step")
    ours, theirs, plain = (results.get(name) for name in (side, "transformers", "ours, graph"))
    if ours is None:
        return []
    text = f"peak memory at most {share:g} of transformers'"
    where = f"{_where(ours)}, {side}"
    if theirs is None or not theirs.peak_bytes or not ours.peak_bytes:
        return [Goal(text, where, "not measured", None)]
    ratio = ours.peak_bytes / theirs.peak_bytes
    measured = f"{ratio:.2f}: {ours.peak_bytes / 1e9:.1f} of {theirs.peak_bytes / 1e9:.1f} GB"
    if "anew" in side and plain and plain.timing and ours.timing:
        measured += f"; takes {ours.timing.median / plain.timing.median:.3f} of ours, graph's time"
    return [Goal(text, where, measured, ratio <= share)]


def _loss_goal(steps: StepReport, size: str) -> Goal:
    results = {**steps.group(size, "compiled"), **steps.group(size, "step")}
    with_losses = {side: r.losses[0] for side, r in results.items() if r.losses}
    text = f"first losses of all sides within {SAME_LOSS:g} of each other"
    where = f"{_where(next(iter(results.values())))}, {len(with_losses)} sides"
    exact = {side: loss for side, loss in with_losses.items() if side != ROUGH}
    if len(exact) < 2:
        return Goal(text, where, "not measured", None)
    apart = difference([max(exact.values())], [min(exact.values())])
    if any(loss != loss for loss in exact.values()):
        apart = float("nan")
    measured = f"{apart:.1e}"
    if ROUGH in with_losses:
        rough = difference([with_losses[ROUGH]], [next(iter(exact.values()))])
        measured += f"; {rough:.1e} off with bfloat16 weights, which does not count"
    return Goal(text, where, measured, apart <= SAME_LOSS)


def _engine_goal(steps: StepReport, size: str) -> Goal:
    results = {**steps.group(size, "compiled"), **steps.group(size, "step")}
    ours = {side: r for side, r in results.items() if r.ours and r.losses}
    count = max((len(r.losses) for r in ours.values()), default=0)
    text = f"our engines' losses within {SAME_ENGINE:g} over {count} steps"
    eager = ours.pop("ours, eager", None)
    ours = {side: r for side, r in ours.items() if eager and r.clips == eager.clips}
    where = f"{_where(next(iter(results.values())))}, {', '.join(s.removeprefix('ours, ') for s in ours)} beside eager"
    if eager is None or not ours:
        return Goal(text, where, "not measured", None)
    apart = {side: difference(r.losses, eager.losses) for side, r in ours.items()}
    worst = max(apart, key=lambda side: (apart[side] != apart[side], apart[side]))
    return Goal(text, where, f"{apart[worst]:.1e}, {worst}", apart[worst] <= SAME_ENGINE)


def _estimate_goal(r: StepResult) -> Goal:
    text = f"the memory estimate within {ESTIMATE:.0%} of the peak"
    where = f"{_where(r)}, {r.side}"
    if not r.peak_bytes or not r.estimated_bytes:
        return Goal(text, where, r.failure or "not measured", None)
    off = r.estimated_bytes / r.peak_bytes - 1
    measured = f"{off:+.1%}: {r.estimated_bytes / 1e9:.2f} for {r.peak_bytes / 1e9:.2f} GB"
    return Goal(text, where, measured, abs(off) <= ESTIMATE)


def slope(steps: StepReport, size: str, side: str, value: Callable[[StepResult], float | None]) -> float | None:
    """What one more decoder layer adds to a value, from the shallowest measured depth to the deepest."""
    known = [
        (r.depth, value(r))
        for r in steps.results.values()
        if (r.size, r.group, r.side) == (size, "depth", side) and value(r) is not None
    ]
    if len(known) < 2:
        return None
    (low, first), (high, last) = min(known), max(known)
    assert first is not None
    assert last is not None
    return (last - first) / (high - low)


def _depth_goals(steps: StepReport, size: str) -> list[Goal]:
    sides = steps.group(size, "depth")
    if not sides:
        return []
    where = f"{_where(next(iter(sides.values())))}, {', '.join(sides)}"
    found = []
    for what, scale, unit, value in (
        ("memory", 1e9, "GB", lambda r: r.peak_bytes),
        ("time", 1e3, "ms", lambda r: r.timing and r.timing.median),
    ):
        slopes = {side: slope(steps, size, side, value) for side in sides}
        ours = [s for side, s in slopes.items() if side.startswith("ours")]
        others = [s for side, s in slopes.items() if not side.startswith("ours")]
        text = f"a decoder layer adds less {what} than in every other side"
        if not ours or not others or None in (*ours, *others):
            found.append(Goal(text, where, "not measured", None))
            continue
        measured = ", ".join(f"{s / scale:.2f} {unit} {side}" for side, s in slopes.items())
        found.append(Goal(text, where, measured, max(ours) < min(others)))
    return found
