"""Have run times settled? A trend test for the warm-up, and what makes timed runs unstable.

Images are run in turn and may differ in cost, so run times have the period of the image sequence:
windows cover whole passes, and timed runs are compared with the usual time of their own image."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

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


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many runs and seconds the measuring of a row takes."""

    repeats: Annotated[int, Meta(ge=2)] = 200  # timed runs per clock
    warmup: Annotated[int, Meta(ge=0)] = 200  # at most this many warm-up runs per clock
    # Seconds per clock for the timed runs, and half of it for the warm-up.
    max_seconds: Annotated[float, Meta(gt=0)] = 10.0
    # That measure a row, one after another, each to all of these limits.
    processes: Annotated[int, Meta(ge=1)] = 1


@dataclass(frozen=True)
class Sample:
    """The time that one run took."""

    ms: float  # by the row's clock
    wall_ms: float  # by the host's clock, around the same run


Clock = Callable[[Callable[[], Any], Callable[[], None]], tuple[Sample, Any]]
TimedRun = Callable[[int], Sample]  # the run of that number, its input prepared outside the clock
Progress = Callable[[str, int, int], None]  # stage, runs done, runs in all


def wall_clock(run: Callable[[], Any], synchronize: Callable[[], None]) -> tuple[Sample, Any]:
    """Time `run` on the host, until everything it started has finished; also what it returns."""
    synchronize()
    start = time.perf_counter_ns()
    output = run()
    synchronize()
    elapsed = (time.perf_counter_ns() - start) / 1e6
    return Sample(elapsed, elapsed), output


class CudaClock:
    """Times a run between two CUDA events on the caller's stream, which the run has to use."""

    def __init__(self, device: Any):
        import torch

        self.device, self.torch = device, torch
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(
        self, run: Callable[[], Any], synchronize: Callable[[], None]
    ) -> tuple[Sample, Any]:
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
        return Sample(self.start.elapsed_time(self.end), wall_ms), output


def unseen(samples: list[Sample]) -> str | None:
    """Why the clock cannot be right: it saw much less than the host's; None where it agrees."""
    seen = float(np.median([sample.ms for sample in samples]))
    wall = float(np.median([sample.wall_ms for sample in samples]))
    if wall - seen <= MAX_UNSEEN_MS + MAX_UNSEEN_SHARE * wall:
        return None
    return (
        f"the CUDA events saw {seen:.3f} ms of the {wall:.3f} ms that a call takes: "
        "work ran outside their stream"
    )


def contradiction(compute_ms: float, end_to_end_ms: float) -> list[str]:
    """Return why two medians cannot both be right: end to end is compute and more."""
    if compute_ms <= (1 + REPEATED_WITHIN) * end_to_end_ms:
        return []
    return [f"impossible: compute took {compute_ms:.3f} ms, of {end_to_end_ms:.3f} ms end to end"]


def warm_up(
    run: TimedRun, limits: Limits, period: int, progress: Progress, earlier: Sequence[Sample] = ()
) -> dict:
    """Run until run times have settled, or to the limit; how many `runs`, and whether `settled`.

    `earlier` runs count.
    """
    times = [sample.ms for sample in earlier]
    deadline = time.monotonic() + limits.max_seconds / 2
    while len(times) < limits.warmup and time.monotonic() < deadline:
        if has_settled(times, period):
            break
        times.append(run(len(times)).ms)
        progress("warm-up", len(times), limits.warmup)
    return {"runs": len(times), "settled": has_settled(times, period)}


def timed_runs(run: TimedRun, limits: Limits, progress: Progress) -> list[Sample]:
    """`limits.repeats` runs, or as many as the time allows, but at least `MIN_RUNS`."""
    samples: list[Sample] = []
    deadline = time.monotonic() + limits.max_seconds
    with no_garbage_collection():
        while len(samples) < limits.repeats:
            if len(samples) >= MIN_RUNS and time.monotonic() > deadline:
                break
            samples.append(run(len(samples)))
            progress("timing", len(samples), limits.repeats)
    return samples


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
    """Return the statistics of some runs' times."""
    return {
        "mean": float(times.mean()),
        "std": float(times.std(ddof=1)),
        "min": float(times.min()),
        **{f"p{p}": float(np.percentile(times, p)) for p in PERCENTILES},
        "max": float(times.max()),
        "runs": len(times),
    }


def clock_statistics(samples: list[Sample], warmed: dict, period: int) -> dict:
    """Return what a record holds of one clock, in milliseconds per run."""
    times = np.array([sample.ms for sample in samples])
    return summary(times) | {
        "warmup": warmed,
        "unstable": instability(times, period),
        "samples": times.round(4).tolist(),
        "wall_p50": float(np.median([sample.wall_ms for sample in samples])),
    }
