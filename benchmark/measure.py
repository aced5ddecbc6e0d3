"""What a row measures: an extractor, the images it runs on, and what it found on them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aliked.backends import Spec, create_extractor
from aliked.errors import InputError
from aliked.features import Extractor, Features, features_of_batch
from aliked.files import sha256
from aliked.parity import FP16, FP32, Parity, compare_features, judge
from aliked.ties import Expected
from benchmark import environment
from benchmark.artifacts import load_reference
from benchmark.environment import AllocatorPeak, Watch
from benchmark.rows import Row
from benchmark.timing import (
    CudaClock,
    Lap,
    Limits,
    Progress,
    Run,
    WarmUp,
    statistics,
    timed_runs,
    unseen,
    wall_clock,
    warm_up,
)

OUTPUTS = ("keypoints", "descriptors", "scores")


class WrongAnswer(Exception):
    """A runtime does something else than it was asked for."""


@dataclass(frozen=True)
class Job:
    """What to measure, with everything that it takes."""

    row: Row
    spec: Spec
    images: dict[str, np.ndarray]  # by name; uint8 [H, W, 3], all of one size
    reference: Path  # the expected features
    limits: Limits


class Batches:
    """The images in turn, `size` at a time, until the sequence of batches repeats."""

    def __init__(self, images: Sequence[np.ndarray], size: int):
        self.images, self.size = images, size
        self.count = math.lcm(len(images), size) // size

    def members(self, index: int) -> list[int]:
        """The numbers of the images in batch `index`."""
        start = index % self.count * self.size
        return [i % len(self.images) for i in range(start, start + self.size)]

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [B, H, W, 3]."""
        return np.stack([self.images[i] for i in self.members(index)])


class Subject:
    """The extractor under measurement, and what it returned in each clock's first pass."""

    def __init__(self, job: Job):
        self.row = job.row
        self.names = list(job.images)
        self.batches = Batches(list(job.images.values()), job.row.batch)
        self.extractor: Extractor = create_extractor(job.row.backend, job.spec)
        self._check_device()
        self.extractor.synchronize()
        by_events = job.row.device == "cuda" and torch.cuda.is_available()
        self.clock = CudaClock(job.spec.device) if by_events else wall_clock
        self.clock_name = "CUDA events" if by_events else "wall clock"
        self.found: dict[str, tuple[str, Features]] = {}  # by label: image name and features

    def _check_device(self) -> None:
        device = str(getattr(self.extractor, "device", self.row.device))
        if not device.startswith(self.row.device):
            raise WrongAnswer(f"it runs on {device}, but this row is to run on {self.row.device}")

    def compute(self, index: int) -> Lap:
        """One run on device tensors that are already there."""
        lap, _ = self._compute(index)
        return lap

    def checked_compute(self, index: int) -> Lap:
        """The same, keeping what was found."""
        lap, outputs = self._compute(index)
        self._keep("compute", index, self._to_features(outputs))
        return lap

    def end_to_end(self, index: int) -> Lap:
        """One run from images in host memory to features in host memory; keeps what was found."""
        batch, extractor = self.batches[index], self.extractor
        if len(batch) == 1:  # as users call it
            lap, features = wall_clock(lambda: [extractor(batch[0])], extractor.synchronize)
        else:
            lap, features = wall_clock(
                lambda: extractor.extract_batch(batch), extractor.synchronize
            )
        if index < self.batches.count:
            self._keep("end to end", index, features)
        return lap

    def _compute(self, index: int) -> tuple[Lap, dict[str, Any]]:
        batch = self.extractor.to_device(self.batches[index])
        return self.clock(lambda: self.extractor.infer(batch), self.extractor.synchronize)

    def _keep(self, clock: str, index: int, features: list[Features]) -> None:
        members = self.batches.members(index)
        for place, (image, found) in enumerate(zip(members, features, strict=True)):
            name = self.names[image]
            position = f" at {place} of batch {index}" if self.row.batch > 1 else ""
            self.found[f"{name}{position} ({clock})"] = name, found

    def _to_features(self, outputs: dict[str, Any]) -> list[Features]:
        rows = [_to_host(outputs[name]) for name in OUTPUTS]
        expected = (self.row.batch, self.row.keypoints())
        for name, values in zip(OUTPUTS, rows, strict=True):
            if values.shape[:2] != expected:
                raise WrongAnswer(
                    f"{name} is {list(values.shape)} where a batch of {expected[0]} with "
                    f"{expected[1]} keypoints was asked for; give a model file made for that"
                )
        return features_of_batch(*rows)


def _to_host(values: Any) -> np.ndarray:
    """A device array of any backend as a NumPy array in host memory."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values.numpy())


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
