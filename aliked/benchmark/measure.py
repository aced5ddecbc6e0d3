"""Measuring one row in this process: time by two clocks, memory, and parity with the reference."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aliked.benchmark import environment
from aliked.benchmark.memory import AllocatorPeak
from aliked.benchmark.reference import load_reference
from aliked.benchmark.subject import Job, Subject, WrongAnswer
from aliked.benchmark.timing import (
    Lap,
    Limits,
    Progress,
    Run,
    WarmUp,
    statistics,
    timed_runs,
    unseen,
    warm_up,
)
from aliked.benchmark.watch import Watch
from aliked.errors import InputError
from aliked.features import Extractor
from aliked.files import sha256
from aliked.parity import FP16, FP32, Parity, compare_features, judge
from aliked.ties import Expected

TOLERANCES = {"fp32": FP32, "fp16": FP16}
CLOCKS_EVERY = 20  # runs between two looks at the GPU's clocks
# A GPU runtime that leaves one of these to the processor is another runtime.
HEAVY_OPERATORS = {"Conv", "DeformConv", "GridSample", "MatMul", "Gemm", "MaxPool", "TopK"}


def measure(job: Job, progress: Progress) -> dict:
    """All that a record says of a row that runs."""
    watch = Watch(job.spec.device)
    progress("loading", 0, 1)
    start = time.perf_counter()
    subject = Subject(job)
    load_s = time.perf_counter() - start
    started = start_up(subject, watch, job.limits, progress)
    problems = [stray_nodes(subject)]

    laps = timed_runs(watched(subject.compute, watch), job.limits, progress)
    problems.append(unseen(laps))
    compute = statistics(laps, started.warmed, subject.batches.count)

    warmed = warm_up(subject.end_to_end, job.limits, subject.batches.count, progress)
    laps = timed_runs(watched(subject.end_to_end, watch), job.limits, progress)
    end_to_end = statistics(laps, warmed, subject.batches.count)

    parity = compare(subject, load_reference(job.reference, job.row.top_k or None))
    problems = [problem for problem in problems if problem]
    return {
        "clock": subject.clock_name,
        "compute_ms": compute,
        "end_to_end_ms": end_to_end,
        "images_per_second": {
            "compute": 1000 * job.row.batch / compute["mean"],
            "end_to_end": 1000 * job.row.batch / end_to_end["mean"],
        },
        "load_s": load_s,  # of a process with `process.imported_once` imported
        "first_run_s": started.first_run_s,
        "memory": started.memory,
        "clocks_seen": watch.clocks_seen(),
        "parity": parity,
        "problems": problems,
        "ranked": parity["passed"] and not problems,
        "per_image": per_image(subject, compute, end_to_end),
        "settings": environment.settings(),
        "model_file": describe_file(job.spec.model_path),
    }


@dataclass(frozen=True)
class StartUp:
    """What came before the first timed run."""

    first_run_s: float
    warmed: WarmUp
    memory: dict


def start_up(subject: Subject, watch: Watch, limits: Limits, progress: Progress) -> StartUp:
    """The first run, one checked pass over all images, the warm-up; then the memory it took."""
    allocator = allocator_of(subject.extractor)
    progress("first run", 0, 1)
    first_run_s = subject.compute(0).wall_ms / 1000
    first_pass = [subject.checked_compute(index) for index in range(subject.batches.count)]
    warmed = warm_up(subject.compute, limits, subject.batches.count, progress, first_pass)
    return StartUp(first_run_s, warmed, read_memory(watch, allocator))


def watched(run: Run, watch: Watch) -> Run:
    """`run`, with a look at the GPU's clocks now and then, outside the timed part."""

    def watched_run(index: int) -> Lap:
        if index % CLOCKS_EVERY == 0:
            watch.look()
        return run(index)

    return watched_run


def allocator_of(extractor: Extractor) -> AllocatorPeak | None:
    """PyTorch's allocator where it is what the extractor allocates through."""
    device = getattr(extractor, "device", None)
    on_gpu = isinstance(device, torch.device) and device.type == "cuda"
    return AllocatorPeak(device) if on_gpu else None


def read_memory(watch: Watch, allocator: AllocatorPeak | None) -> dict:
    """MiB of the process, how they were found, and the allocator's peak above the loaded model."""
    mib, method = watch.memory_mib()
    return {
        "process_mib": mib,
        "method": method,
        "allocator_peak_above_model_mib": allocator and allocator.above_mib(),
    }


def stray_nodes(subject: Subject) -> str | None:
    """What a GPU runtime left to the processor, where it tells; None where that is nothing."""
    if subject.row.device == "cpu" or not hasattr(subject.extractor, "placement"):
        return None
    nodes = subject.extractor.placement().get("CPUExecutionProvider", {})
    heavy = [f"{n} {name}" for name, n in sorted(nodes.items()) if name in HEAVY_OPERATORS]
    return f"part of the model ran on the CPU: {', '.join(heavy)}" if heavy else None


def compare(subject: Subject, reference: dict[str, Expected]) -> dict:
    """What was timed, judged beside the reference's features."""
    try:
        parities = {
            label: compare_features(reference[name].features, found, ties=reference[name].ties)
            for label, (name, found) in subject.found.items()
        }
    except InputError as error:  # descriptors of another length
        raise WrongAnswer(f"it is another model: {error}") from error
    tolerance = TOLERANCES[subject.row.precision]
    verdict = judge(parities, tolerance)
    return {
        "tolerance": tolerance.name,
        "passed": verdict.passed,
        "reasons": verdict.reasons[:5],
        **overall(list(parities.values())),
    }


def overall(parities: list[Parity]) -> dict:
    """The figures of all images together."""
    common = sum(p.common for p in parities)
    total = sum(max(p.reference, p.other) for p in parities)
    return {
        "compared": len(parities),
        "keypoints_in_common": common / total if total else 1.0,
        "undecided": sum(p.undecided for p in parities),
        "mean_cosine": sum(p.common * p.mean_cosine for p in parities) / max(common, 1),
        "min_cosine": min(p.min_cosine for p in parities),
        "max_shift_px": max(p.max_shift_px for p in parities),
    }


def per_image(subject: Subject, compute: dict, end_to_end: dict) -> list[dict] | None:
    """Median times and keypoints of each image; None for batches."""
    if subject.row.batch > 1:
        return None
    period = subject.batches.count
    return [
        {
            "image": name,
            "compute_ms": median_of(compute["samples"], i, period),
            "end_to_end_ms": median_of(end_to_end["samples"], i, period),
            "keypoints": len(subject.found[f"{name} (compute)"][1]),
        }
        for i, name in enumerate(subject.names)
    ]


def median_of(samples: list[float], image: int, period: int) -> float | None:
    """Of the runs of one image; None where the time limit left none."""
    own = samples[image::period]
    return float(np.median(own)) if own else None


def describe_file(path: Path | None) -> dict | None:
    """Name and SHA-256 of the model file, where there is one."""
    return {"name": Path(path).name, "sha256": sha256(path)} if path else None
