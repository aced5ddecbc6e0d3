"""Have run times settled? A trend test for the warm-up, and what makes timed runs unstable.

Images are run in turn and may differ in cost, so run times have the period of the image sequence:
windows cover whole passes, and timed runs are compared with the usual time of their own image."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MIN_WINDOW, MAX_WINDOW = 20, 60  # runs that the warm-up's test looks at
SETTLED_DRIFT = 0.02  # between the halves of the window: of no consequence
SIGNIFICANT = 1.96  # standard deviations, two-sided 5 %
UNSTABLE_DRIFT = 0.05  # between the halves of the timed runs
UNSTABLE_SPREAD = 0.25  # from the 10th to the 90th percentile, of the median
REPEATED_WITHIN = 0.05  # the medians of two processes or runs, where times are to be relied on


def apart(medians: Sequence[float]) -> float:
    """How far medians of the same row are apart, of the smallest: see `REPEATED_WITHIN`."""
    return max(medians) / min(medians) - 1


def window_length(period: int) -> int:
    """How many runs to look at when images repeat after `period` runs: an even number of passes."""
    two_passes = 2 * period
    return min(MAX_WINDOW, two_passes * math.ceil(MIN_WINDOW / two_passes))


def drift(times: Sequence[float]) -> float:
    """How much slower the second half ran than the first, of the medians; 0.1 is 10 % slower."""
    half = len(times) // 2
    return float(np.median(times[half:]) / np.median(times[:half]) - 1)


def trend(times: Sequence[float]) -> float:
    """Mann-Kendall's test: the trend in standard deviations, positive when runs get slower."""
    n = len(times)
    values = np.asarray(times)
    balance = np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum()
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return float((balance - np.sign(balance)) / deviation)


def has_settled(times: Sequence[float], period: int) -> bool:
    """Whether the last runs neither drift noticeably nor show a significant trend."""
    length = window_length(period)
    if len(times) < length:
        return False
    window = times[-length:]
    return abs(drift(window)) <= SETTLED_DRIFT or abs(trend(window)) < SIGNIFICANT


def instability(times: Sequence[float], period: int) -> list[str]:
    """Why the timed runs are not to be relied on; empty when they are.

    Run `i` is of image `i % period`.
    """
    relative = _relative_to_own_image(np.asarray(times, float), period)
    reasons = []
    moved = drift(relative) if len(relative) > 1 else 0.0
    if abs(moved) > UNSTABLE_DRIFT:
        reasons.append(f"drift of {moved:+.0%} from the first to the second half of the runs")
    low, middle, high = np.percentile(relative, (10, 50, 90))
    spread = (high - low) / middle
    if spread > UNSTABLE_SPREAD:
        reasons.append(f"spread of {spread:.0%} from the 10th to the 90th percentile")
    return reasons


def _relative_to_own_image(times: np.ndarray, period: int) -> np.ndarray:
    """Times divided by the median of their own image, where every image ran at least 3 times."""
    if len(times) < 3 * period:
        return times
    own = np.array([np.median(times[image::period]) for image in range(period)])
    return times / own[np.arange(len(times)) % period]


MIN_RUNS = 10  # timed, however long they take
PERCENTILES = (50, 90, 99)
# What a call takes by the wall clock beyond what its CUDA events saw: Python and two waits.
MAX_UNSEEN_MS, MAX_UNSEEN_SHARE = 0.1, 0.2


@dataclass(frozen=True)
class Limits:
    """When to stop."""

    repeats: int = 200  # timed runs per clock
    warmup: int = 200  # at most so many warm-up runs per clock
    max_seconds: float = 10.0  # per clock for the timed runs, and half of it for the warm-up
    processes: int = 1  # that measure a row, one after another, each to all of these limits


@dataclass(frozen=True)
class Lap:
    """One run."""

    ms: float  # by the row's clock
    wall_ms: float  # by the host's clock, around the same run


@dataclass(frozen=True)
class WarmUp:
    """What the warm-up came to."""

    runs: int
    settled: bool  # else it ended at a limit


Clock = Callable[[Callable[[], Any], Callable[[], None]], tuple[Lap, Any]]
Run = Callable[[int], Lap]  # the run of a given number, its input prepared outside the clock
Progress = Callable[[str, int, int], None]  # stage, runs done, runs in all


def wall_clock(run: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[Lap, Any]:
    """Time `run` on the host, until everything it started has finished; also what it returns."""
    synchronize()
    start = time.perf_counter_ns()
    output = run()
    synchronize()
    elapsed = (time.perf_counter_ns() - start) / 1e6
    return Lap(elapsed, elapsed), output


class CudaClock:
    """Times a run between two CUDA events on the caller's stream, which the run has to use."""

    def __init__(self, device: Any):
        import torch

        self.device, self.torch = device, torch
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[Lap, Any]:
        """Time `run`; also what it returns."""
        with self.torch.cuda.device(self.device):
            synchronize()
            start = time.perf_counter_ns()
            self.start.record()
            output = run()
            self.end.record()
            synchronize()
            self.end.synchronize()
            wall_ms = (time.perf_counter_ns() - start) / 1e6
        return Lap(self.start.elapsed_time(self.end), wall_ms), output


def unseen(laps: list[Lap]) -> str | None:
    """Why the clock cannot be right: it saw much less than the host's; None where it agrees."""
    seen, wall = (float(np.median([getattr(lap, k) for lap in laps])) for k in ("ms", "wall_ms"))
    if wall - seen <= MAX_UNSEEN_MS + MAX_UNSEEN_SHARE * wall:
        return None
    return (
        f"the CUDA events saw {seen:.3f} ms of the {wall:.3f} ms that a call takes: "
        "work ran outside their stream"
    )


def warm_up(
    run: Run, limits: Limits, period: int, progress: Progress, earlier: Sequence[Lap] = ()
) -> WarmUp:
    """Run until run times have settled, or to the limit; `earlier` runs count."""
    times = [lap.ms for lap in earlier]
    deadline = time.monotonic() + limits.max_seconds / 2
    while len(times) < limits.warmup and time.monotonic() < deadline:
        if has_settled(times, period):
            break
        times.append(run(len(times)).ms)
        progress("warm-up", len(times), limits.warmup)
    return WarmUp(len(times), has_settled(times, period))


def timed_runs(run: Run, limits: Limits, progress: Progress) -> list[Lap]:
    """`limits.repeats` runs, or as many as the time allows, but at least `MIN_RUNS`."""
    laps: list[Lap] = []
    deadline = time.monotonic() + limits.max_seconds
    with no_garbage_collection():
        while len(laps) < limits.repeats:
            if len(laps) >= MIN_RUNS and time.monotonic() > deadline:
                break
            laps.append(run(len(laps)))
            progress("timing", len(laps), limits.repeats)
    return laps


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the timed runs, as `timeit` does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def summary(times: np.ndarray) -> dict:
    """The statistics of some runs."""
    return {
        "mean": float(times.mean()),
        "std": float(times.std(ddof=1)),
        "min": float(times.min()),
        **{f"p{p}": float(np.percentile(times, p)) for p in PERCENTILES},
        "max": float(times.max()),
        "runs": len(times),
    }


def statistics(laps: list[Lap], warmed: WarmUp, period: int) -> dict:
    """What a record holds of one clock, in milliseconds per run."""
    times = np.array([lap.ms for lap in laps])
    return summary(times) | {
        "warmup": asdict(warmed),
        "unstable": instability(times, period),
        "samples": times.round(4).tolist(),
        "wall_p50": float(np.median([lap.wall_ms for lap in laps])),
    }
