"""One row: time by two clocks, memory, and whether what was timed is right."""

import abc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aliked.backends import Spec, create_extractor, create_pair_runtime
from aliked.errors import InputError
from aliked.features import OUTPUTS, Extractor, Features, features_of_batch
from aliked.files import sha256
from aliked.matching import (
    Arrays,
    Matches,
    PairRuntime,
    match_mutual,
    matcher_inputs,
    matches_of_rows,
)
from aliked.parity import (
    MATCH_TOLERANCES,
    TOLERANCES,
    Parity,
    Verdict,
    compare_features,
    compare_matches,
    in_terms_of,
    judge,
    judge_matches,
)
from aliked.patches import form_in_use
from aliked.ties import Expected
from benchmark import environment
from benchmark.artifacts import load_matches, load_reference
from benchmark.environment import AllocatorPeak, Monitor
from benchmark.records import CLOCKS
from benchmark.rows import ImageSet, Row
from benchmark.timing import (
    REPEATED_WITHIN,
    CudaClock,
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
    wall_clock,
    warm_up,
)


class WrongAnswer(Exception):
    """A runtime does something else than it was asked for."""


class Batches:
    """The images in turn, `size` at a time, until the sequence of batches repeats."""

    def __init__(self, images: Sequence[np.ndarray], size: int):
        self.images, self.size = images, size
        self.count = math.lcm(len(images), size) // size

    def members(self, index: int) -> list[int]:
        """Return the numbers of the images in batch `index`."""
        start = index % self.count * self.size
        return [i % len(self.images) for i in range(start, start + self.size)]

    def __getitem__(self, index: int) -> np.ndarray:
        """Return batch `index`, uint8 [B, H, W, 3]."""
        return np.stack([self.images[i] for i in self.members(index)])


class Subject(abc.ABC):
    """The runtime under measurement, and what it returned in each clock's first pass."""

    period: int  # runs until the inputs repeat

    def __init__(self, row: Row, device: str, runtime: Extractor | PairRuntime) -> None:
        """`device` is the row's, such as "cuda:1"."""
        self.row, self.runtime = row, runtime
        self._check_device()
        runtime.synchronize()
        by_events = row.device == "cuda" and torch.cuda.is_available()
        self.clock = CudaClock(device) if by_events else wall_clock
        self.clock_name = "CUDA events" if by_events else "wall clock"

    def compute(self, index: int) -> Sample:
        """Time one run on device tensors that are already there."""
        return self._compute(index)[0]

    def _compute(self, index: int) -> tuple[Sample, dict[str, Any]]:
        batch = self.runtime.to_device(self.inputs(index))
        return self.clock(lambda: self.runtime.infer(batch), self.runtime.synchronize)

    @abc.abstractmethod
    def inputs(self, index: int) -> Any:
        """What goes into run `index`, in host memory."""

    @abc.abstractmethod
    def checked_compute(self, index: int) -> Sample:
        """Time one run like `compute`, and keep what it returned."""

    @abc.abstractmethod
    def end_to_end(self, index: int) -> Sample:
        """Time one run from host memory to host memory; keep what the first pass returned."""

    @abc.abstractmethod
    def parity(self) -> dict:
        """The verdict on what was timed, and its figures for everything together."""

    @abc.abstractmethod
    def per_image(self, compute: dict, end_to_end: dict) -> list[dict] | None:
        """Median times and keypoints of each image, where that is what was timed."""

    @abc.abstractmethod
    def matches(self, min_similarity: float | None) -> float | None:
        """The mean number of matches of an image with the next, where that is asked for."""

    def _check_device(self) -> None:
        device, wanted = self.runtime.device, self.row.device
        if device.partition(":")[0] != wanted:
            raise WrongAnswer(f"it runs on {device}, but this row is to run on {wanted}")


class ExtractorSubject(Subject):
    """A row's extractor on images."""

    def __init__(
        self,
        row: Row,
        spec: Spec,
        images: dict[str, np.ndarray],
        reference: dict[str, Expected],
    ) -> None:
        """`images` are uint8 [H, W, 3] by name, all of one size; what to expect of each."""
        super().__init__(row, spec.device, create_extractor(row.backend, spec))
        self.names, self.reference = list(images), reference
        self.batches = Batches(list(images.values()), row.batch)
        self.period = self.batches.count
        self.returned: dict[str, tuple[str, Features]] = {}  # by label: image name and features

    def inputs(self, index: int) -> np.ndarray:
        """Batch `index`."""
        return self.batches[index]

    def checked_compute(self, index: int) -> Sample:
        """Time one run like `compute`, and keep what it returned."""
        sample, outputs = self._compute(index)
        self._keep("compute", index, self._to_features(outputs))
        return sample

    def end_to_end(self, index: int) -> Sample:
        """Time one run from images to features, both in host memory; keep what it returned."""
        batch, extractor = self.batches[index], self.runtime
        if len(batch) == 1:  # as users call it
            sample, features = wall_clock(lambda: [extractor(batch[0])], extractor.synchronize)
        else:
            sample, features = wall_clock(
                lambda: extractor.extract_batch(batch), extractor.synchronize
            )
        if index < self.batches.count:
            self._keep("end to end", index, features)
        return sample

    def features(self) -> list[Features]:
        """Return what the compute clock's first pass gave of each image."""
        by_name = {name: features for name, features in reversed(self.returned.values())}
        return [by_name[name] for name in self.names]

    def parity(self) -> dict:
        """The verdict on what was timed, and its figures for all images together."""
        try:
            parities = {
                label: compare_features(expected.features, features, ties=expected.ties)
                for label, (name, features) in self.returned.items()
                for expected in [self.reference[name]]
            }
        except InputError as error:  # descriptors of another length
            raise WrongAnswer(f"it is another model: {error}") from error
        tolerance = TOLERANCES[self.row.precision]
        figures = overall(list(parities.values()))
        return judged(judge(parities, tolerance), tolerance.name) | figures

    def per_image(self, compute: dict, end_to_end: dict) -> list[dict] | None:
        """Median times and keypoints of each image; None for batches."""
        if self.row.batch > 1:
            return None
        return [
            {
                "image": name,
                "compute_ms": median_of(compute["samples"][i :: self.period]),
                "end_to_end_ms": median_of(end_to_end["samples"][i :: self.period]),
                "keypoints": len(features),
            }
            for i, (name, features) in enumerate(zip(self.names, self.features(), strict=True))
        ]

    def matches(self, min_similarity: float | None) -> float | None:
        """The mean number of mutual nearest neighbours of an image with the next."""
        pairs = list(itertools.pairwise(self.features()))
        if min_similarity is None or not pairs:
            return None
        counts = [
            len(match_mutual(first.descriptors, second.descriptors, min_similarity))
            for first, second in pairs
        ]
        return statistics.mean(counts)

    def _keep(self, clock: str, index: int, features: list[Features]) -> None:
        members = self.batches.members(index)
        for place, (image, of_image) in enumerate(zip(members, features, strict=True)):
            name = self.names[image]
            position = f" at {place} of batch {index}" if self.row.batch > 1 else ""
            self.returned[f"{name}{position} ({clock})"] = name, of_image

    def _to_features(self, outputs: dict[str, Any]) -> list[Features]:
        rows = [_to_host(outputs[name]) for name in OUTPUTS]
        expected = (self.row.batch, self.row.selection.rows(self.row.height, self.row.width))
        for name, values in zip(OUTPUTS, rows, strict=True):
            if values.shape[:2] != expected:
                raise WrongAnswer(
                    f"{name} is {list(values.shape)} where a batch of {expected[0]} with "
                    f"{expected[1]} keypoints was asked for; give a model file made for that"
                )
        return features_of_batch(*rows)


class PairSubject(Subject):
    """A row's runtime of LightGlue, on each image with the next."""

    def __init__(
        self,
        row: Row,
        spec: Spec,
        images: dict[str, np.ndarray],
        reference: dict[str, Expected],
        expected: list[Matches],
        matcher_weights: Path | None,
    ) -> None:
        """`expected` are the matches of each image with the next."""
        size = row.width, row.height
        runtime = create_pair_runtime(row.backend, row.graph, spec, matcher_weights, size)
        super().__init__(row, spec.device, runtime)
        self.names = [" - ".join(pair) for pair in itertools.pairwise(images)]
        self.expected, self.period = expected, len(self.names)
        self.features = [
            tuple(reference[name].features for name in pair) for pair in itertools.pairwise(images)
        ]
        self.pairs = [
            self._inputs(*pair)
            for pair in zip(itertools.pairwise(images.values()), self.features, strict=True)
        ]
        self.returned: dict[str, tuple[int, Arrays]] = {}  # by label: number of the pair, outputs

    def _inputs(self, images: tuple, features: tuple[Features, Features]) -> Arrays:
        if self.row.graph == "pair":
            return {f"image{side}": image[None] for side, image in enumerate(images)}
        size = self.row.width, self.row.height
        return matcher_inputs(features, (size, size), self.row.top_k)

    def inputs(self, index: int) -> Arrays:
        """Pair `index`."""
        return self.pairs[index % self.period]

    def checked_compute(self, index: int) -> Sample:
        """Time one run like `compute`, and keep what it returned."""
        sample, outputs = self._compute(index)
        self._keep("compute", index, {name: _to_host(rows) for name, rows in outputs.items()})
        return sample

    def end_to_end(self, index: int) -> Sample:
        """Time one run from images, or features, to matches in host memory."""
        inputs = self.inputs(index)
        sample, outputs = wall_clock(lambda: self.runtime(inputs), self.runtime.synchronize)
        if index < self.period:
            self._keep("end to end", index, outputs)
        return sample

    def _keep(self, clock: str, index: int, outputs: Arrays) -> None:
        self.returned[f"{self.names[index]} ({clock})"] = index, outputs

    def _matches(self, index: int, outputs: Arrays) -> Matches:
        """The matches of pair `index`, in terms of the reference's keypoints."""
        matches = matches_of_rows(outputs["matches0"][0], outputs["scores0"][0])
        if self.row.graph == "matcher":
            return matches
        theirs = tuple(features.keypoints for features in self.features[index])
        ours = outputs["keypoints0"][0], outputs["keypoints1"][0]
        return in_terms_of(theirs, ours, matches)

    def parity(self) -> dict:
        """The verdict on what was timed, and its figures for all pairs together."""
        parities = {
            label: compare_matches(self.expected[index], self._matches(index, outputs))
            for label, (index, outputs) in self.returned.items()
        }
        tolerance = MATCH_TOLERANCES[self.row.graph, self.row.precision]
        common = sum(p.common for p in parities.values())
        total = sum(max(p.reference, p.other) for p in parities.values())
        difference = max(p.max_score_difference for p in parities.values())
        return judged(judge_matches(parities, tolerance), tolerance.name) | {
            "compared": len(parities),
            "keypoints_in_common": None,
            "mean_cosine": None,
            "min_cosine": None,
            "max_shift_px": None,
            "matches_in_common": common / total if total else 1.0,
            "max_score_difference": difference if math.isfinite(difference) else None,
        }

    def per_image(self, compute: dict, end_to_end: dict) -> None:
        """None: a run is of two."""

    def matches(self, min_similarity: float | None) -> float:
        """The mean number of matches."""
        counts = [(outputs["matches0"] >= 0).sum() for _, outputs in self.returned.values()]
        return float(statistics.mean(counts))


def _to_host(values: Any) -> np.ndarray:
    """A device array of any backend as a NumPy array in host memory."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values.numpy())


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
        """Measure."""
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
    row, period = subject.row, subject.period

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
    if row.top_k > 0:  # in threshold mode a single call of PyTorch's does less than a batch's
        for clock in (compute, end_to_end):
            clock["unstable"] += contradiction(compute["p50"], end_to_end["p50"])

    parity = subject.parity()
    return {
        "clock": subject.clock_name,
        "compute_ms": compute,
        "end_to_end_ms": end_to_end,
        "images_per_second": {
            "compute": 1000 * row.images_per_run / compute["mean"],
            "end_to_end": 1000 * row.images_per_run / end_to_end["mean"],
        },
        "load_s": load_s,  # of a process with `process.imported_once` imported
        "first_run_s": first_run_s,
        "memory": memory,
        "clocks_seen": monitor.clocks_seen(),
        "parity": parity,
        "problems": problems,
        "ranked": parity["passed"] and not problems,
        "per_image": subject.per_image(compute, end_to_end),
        "matches": subject.matches(min_similarity),
        "settings": {
            "tf32": environment.tf32_of(subject.runtime),
            "garbage_collector": monitor.collects_garbage,
            "get_patches": form_in_use(),
            **inside,
        },
        "model_file": describe_file(spec.model_path),
    }


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


def judged(verdict: Verdict, tolerance: str) -> dict:
    """Return what a record says of a verdict."""
    return {
        "tolerance": tolerance,
        "passed": verdict.passed,
        "reasons": verdict.reasons[:5],
    }


def overall(parities: list[Parity]) -> dict:
    """Return the figures of all images together; None for a NaN, which JSON does not have."""
    common = sum(p.common for p in parities)
    total = sum(max(p.reference, p.other) for p in parities)
    figures = {
        "compared": len(parities),
        "keypoints_in_common": common / total if total else 1.0,
        "undecided": sum(p.undecided for p in parities),
        "mean_cosine": sum(p.common * p.mean_cosine for p in parities) / max(common, 1),
        "min_cosine": min(p.min_cosine for p in parities),
        "max_shift_px": max(p.max_shift_px for p in parities),
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of those that are known; None of none."""
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None


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
