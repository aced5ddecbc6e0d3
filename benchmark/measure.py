"""One row: time by two clocks, memory, and whether what was timed is right."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aliked.backends import Spec
from aliked.features import Extractor
from aliked.files import sha256
from aliked.matching import PairRuntime
from aliked.patches import form_in_use
from benchmark import environment
from benchmark.artifacts import load_matches, load_reference
from benchmark.environment import AllocatorPeak, Monitor
from benchmark.records import CLOCKS
from benchmark.rows import ImageSet, Row
from benchmark.subjects import ExtractorSubject, PairSubject, Subject, median_of
from benchmark.timing import (
    REPEATED_WITHIN,
    Limits,
    Progress,
    Sample,
    TimedRun,
    apart,
    clock_statistics,
    contradiction,
    summary,
    timed_runs,
    unseen,
    warm_up,
)

CLOCKS_EVERY = 20  # runs between two readings of the GPU's clocks
# A GPU runtime that leaves one of these to the processor is another runtime.
HEAVY_OPERATORS = {"Conv", "DeformConv", "GridSample", "MatMul", "Gemm", "MaxPool", "TopK"}


@dataclass(frozen=True)
class Measure:
    """Measure a row; the result is what a record says of one that ran, as JSON has it."""

    row: Row
    spec: Spec
    images: ImageSet
    reference: Path  # the expected features
    limits: Limits
    min_similarity: float | None = None
    matcher_weights: Path | None = None

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.spec.device

    def run(self, progress: Progress) -> dict:
        """Open the subject in this process and return what `measure` finds of it."""
        reference = load_reference(self.reference, self.row.top_k or None)
        images = self.images.load()

        def open_subject() -> Subject:
            if self.row.graph == "extractor":
                return ExtractorSubject(self.row, self.spec, images, reference)
            expected = load_matches(self.reference)
            return PairSubject(
                self.row, self.spec, images, reference, expected, self.matcher_weights
            )

        return measure(open_subject, self.spec, self.limits, progress, self.min_similarity)


def measure(
    open_subject: Callable[[], Subject],
    spec: Spec,
    limits: Limits,
    progress: Progress,
    min_similarity: float | None = None,
) -> dict:
    """Return all that a record says of a row that runs.

    With `min_similarity` also how many keypoints of an image match those of the next.
    """
    monitor = Monitor(spec.device)
    progress("loading", 0, 1)
    start = time.perf_counter()
    subject = open_subject()
    load_s = time.perf_counter() - start
    period = subject.period

    allocator = allocator_of(subject.runtime)
    progress("first run", 0, 1)
    with environment.observed(subject.runtime) as inside:
        first_run_s = subject.compute(0).wall_ms / 1000
    first_pass = [subject.checked_compute(index) for index in range(period)]
    warmed = warm_up(subject.compute, limits, period, progress, first_pass)
    memory = read_memory(monitor, allocator)

    samples = timed_runs(monitored(subject.compute, monitor), limits, progress)
    compute = clock_statistics(samples, warmed, period)
    problems = [problem for problem in (stray_nodes(subject), unseen(samples)) if problem]

    warmed = warm_up(subject.end_to_end, limits, period, progress)
    samples = timed_runs(monitored(subject.end_to_end, monitor), limits, progress)
    end_to_end = clock_statistics(samples, warmed, period)
    return {
        **speed(subject, compute, end_to_end),
        **judgement(subject, problems),
        "load_s": load_s,  # of a process with `process.imported_once` imported
        "first_run_s": first_run_s,
        "memory": memory,
        "clocks_seen": monitor.clocks_seen(),
        "matches": subject.matches(min_similarity),
        "settings": {
            "tf32": environment.tf32_of(subject.runtime),
            "garbage_collector": monitor.collects_garbage,
            "get_patches": form_in_use(),
            **inside,
        },
        "model_file": describe_file(spec.model_path),
    }


def speed(subject: Subject, compute: dict, end_to_end: dict) -> dict:
    """Return what a record says of both clocks, from the statistics of each."""
    row = subject.row
    if row.top_k > 0:  # in threshold mode a single call of PyTorch's does less than a batch's
        for clock in (compute, end_to_end):
            clock["unstable"] += contradiction(compute["p50"], end_to_end["p50"])
    return {
        "clock": subject.clock_name,
        "compute_ms": compute,
        "end_to_end_ms": end_to_end,
        "images_per_second": {
            "compute": 1000 * row.images_per_run / compute["mean"],
            "end_to_end": 1000 * row.images_per_run / end_to_end["mean"],
        },
        "per_image": subject.per_image(compute, end_to_end),
    }


def judgement(subject: Subject, problems: list[str]) -> dict:
    """Return what a record says of what was timed: parity, `problems`, whether it is ranked."""
    parity = subject.parity()
    ranked = parity["passed"] and not problems
    return {"parity": parity, "problems": problems, "ranked": ranked}


def monitored(run: TimedRun, monitor: Monitor) -> TimedRun:
    """Return `run` with a reading of the GPU's clocks now and then, outside the timed part."""

    def monitored_run(index: int) -> Sample:
        if index % CLOCKS_EVERY == 0:
            monitor.note()
        return run(index)

    return monitored_run


def allocator_of(runtime: Extractor | PairRuntime) -> AllocatorPeak | None:
    """Return PyTorch's allocator where it is what the runtime allocates through."""
    device = getattr(runtime, "torch_device", None)
    return AllocatorPeak(device) if device and device.type == "cuda" else None


def read_memory(monitor: Monitor, allocator: AllocatorPeak | None) -> dict:
    """Return MiB of the process, how they were found, and the allocator's peak above the model."""
    mib, method = monitor.memory_mib()
    return {
        "process_mib": mib,
        "method": method,
        "allocator_peak_above_model_mib": allocator and allocator.above_mib(),
    }


def stray_nodes(subject: Subject) -> str | None:
    """Return what a GPU runtime left to the processor, where it tells; None for nothing."""
    if subject.row.device == "cpu" or not hasattr(subject.runtime, "placement"):
        return None
    nodes = subject.runtime.placement().get("CPUExecutionProvider", {})
    heavy = [f"{n} {name}" for name, n in sorted(nodes.items()) if name in HEAVY_OPERATORS]
    return f"part of the model ran on the CPU: {', '.join(heavy)}" if heavy else None


def describe_file(path: Path | None) -> dict | None:
    """Return name and SHA-256 of the model file, where there is one."""
    return {"name": Path(path).name, "sha256": sha256(path)} if path else None


# What differs from process to process, such as the core that it runs on, shows in no single one:
# all its runs may agree within a percent, and be a fifth off.


def merged(results: Sequence[dict]) -> dict:
    """Return what `measure` found in each process as one: all runs, most memory, worst parity."""
    if len(results) == 1:
        return results[0]
    clocks = {clock: _merged_clock([r[clock] for r in results]) for clock in CLOCKS}
    worst = min((r["parity"] for r in results), key=_quality)
    problems = _distinct(r["problems"] for r in results)
    return results[0] | {
        **clocks,
        "images_per_second": {
            name: rate * results[0][f"{name}_ms"]["mean"] / clocks[f"{name}_ms"]["mean"]
            for name, rate in results[0]["images_per_second"].items()
        },
        "load_s": statistics.median(r["load_s"] for r in results),
        "first_run_s": statistics.median(r["first_run_s"] for r in results),
        "memory": max((r["memory"] for r in results), key=lambda m: m["process_mib"] or 0.0),
        "clocks_seen": _merged_ranges([r["clocks_seen"] for r in results if r["clocks_seen"]]),
        "parity": worst,
        "problems": problems,
        "ranked": worst["passed"] and not problems,
        "per_image": _merged_images([r["per_image"] for r in results]),
    }


def _merged_clock(clocks: list[dict]) -> dict:
    """The statistics of all runs, and the processes' medians."""
    samples = list(itertools.chain.from_iterable(c["samples"] for c in clocks))
    medians = [c["p50"] for c in clocks]
    return summary(np.array(samples)) | {
        "warmup": {
            "runs": sum(c["warmup"]["runs"] for c in clocks),
            "settled": all(c["warmup"]["settled"] for c in clocks),
        },
        "unstable": _distinct([*(c["unstable"] for c in clocks), _differ(medians)]),
        "samples": samples,
        "wall_p50": statistics.median(c["wall_p50"] for c in clocks),
        "process_medians": medians,
    }


def _differ(medians: list[float]) -> list[str]:
    distance = apart(medians)
    return [f"medians of the processes {distance:.0%} apart"] if distance > REPEATED_WITHIN else []


def _quality(parity: dict) -> tuple:
    common = parity["keypoints_in_common"]
    common = parity.get("matches_in_common") if common is None else common
    return parity["passed"], common, parity["mean_cosine"] or -math.inf


def _distinct(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def _merged_ranges(seen: list[dict]) -> dict | None:
    """The lowest and the highest of all, and everything that held the clocks down."""
    if not seen:
        return None
    ranges = {
        name: environment.span(itertools.chain.from_iterable(s[name] for s in seen if s[name]))
        for name in seen[0].keys() - {"held_down_by"}
    }
    return ranges | {"held_down_by": sorted(_distinct(s["held_down_by"] for s in seen))}


def _merged_images(lists: list[list[dict] | None]) -> list[dict] | None:
    """Each image's median over the processes."""
    if lists[0] is None:
        return None
    return [
        same[0] | {clock: median_of(image[clock] for image in same) for clock in CLOCKS}
        for same in zip(*lists, strict=True)
    ]
