"""What a row measures: a runtime with its inputs, and what it returned, judged."""

import abc
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aliked.backends import Spec, create_extractor, create_pair_runtime
from aliked.errors import InputError
from aliked.features import OUTPUTS, Extractor, Features, features_of_batch
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
    MatchParity,
    Parity,
    Verdict,
    compare_features,
    compare_matches,
    compare_pair,
    judge,
    judge_matches,
)
from aliked.ties import Expected
from benchmark.rows import Row
from benchmark.timing import CudaClock, Sample, wall_clock


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
        return judged_features(parities, self.row.precision)

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

    def _compare(self, index: int, outputs: Arrays) -> MatchParity:
        """What was found of pair `index` beside what is expected."""
        expected = self.expected[index]
        found = matches_of_rows(outputs["matches0"][0], outputs["scores0"][0])
        if self.row.graph == "matcher":
            return compare_matches(expected, found)
        keypoints = outputs["keypoints0"][0], outputs["keypoints1"][0]
        return compare_pair(self.features[index], expected, keypoints, found)

    def parity(self) -> dict:
        """The verdict on what was timed, and its figures for all pairs together."""
        parities = {
            label: self._compare(index, outputs)
            for label, (index, outputs) in self.returned.items()
        }
        tolerance = MATCH_TOLERANCES[self.row.graph, self.row.precision]
        figures = overall_matches(list(parities.values()))
        return judged(judge_matches(parities, tolerance), tolerance.name) | figures

    def per_image(self, compute: dict, end_to_end: dict) -> None:
        """None: a run is of two."""

    def matches(self, min_similarity: float | None) -> float:
        """The mean number of matches."""
        counts = [(outputs["matches0"] >= 0).sum() for _, outputs in self.returned.values()]
        return float(statistics.mean(counts))


def _to_host(values: Any) -> np.ndarray:
    """A device array of any backend as a NumPy array in host memory."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values.numpy())


def judged(verdict: Verdict, tolerance: str) -> dict:
    """Return what a record says of a verdict."""
    return {
        "tolerance": tolerance,
        "passed": verdict.passed,
        "reasons": verdict.reasons[:5],
    }


def judged_features(parities: dict[str, Parity], precision: str) -> dict:
    """Return the verdict on features of a precision, by label, and the figures of all together."""
    tolerance = TOLERANCES[precision]
    verdict = judge(parities, tolerance)
    return judged(verdict, tolerance.name) | overall(list(parities.values()))


def overall(parities: list[Parity]) -> dict:
    """Return the figures of all images together."""
    common = sum(p.common for p in parities)
    return {
        "compared": len(parities),
        "keypoints_in_common": _share_in_common(parities),
        "undecided": sum(p.undecided for p in parities),
        "mean_cosine": _known(sum(p.common * p.mean_cosine for p in parities) / max(common, 1)),
        "min_cosine": _known(min(p.min_cosine for p in parities)),
        "max_shift_px": _known(max(p.max_shift_px for p in parities)),
    }


def overall_matches(parities: list[MatchParity]) -> dict:
    """Return the figures of all pairs together; those of features are None."""
    return {
        "compared": len(parities),
        **dict.fromkeys(("keypoints_in_common", "mean_cosine", "min_cosine", "max_shift_px")),
        "matches_in_common": _share_in_common(parities),
        "max_score_difference": _known(max(p.max_score_difference for p in parities)),
    }


def _share_in_common(parities: list[Parity] | list[MatchParity]) -> float:
    total = sum(max(p.reference, p.other) for p in parities)
    return sum(p.common for p in parities) / total if total else 1.0


def _known(value: float) -> float | None:
    """The number; None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def median_of(values: Iterable[float | None]) -> float | None:
    """Return the median of those that are known; None of none."""
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None
