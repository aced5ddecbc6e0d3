"""Two clocks around one extractor: warm-up until it has settled, timed runs, statistics."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aliked.benchmark.stationarity import has_settled, instability

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
