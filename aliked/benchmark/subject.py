"""What a row measures: an extractor, the images it runs on, and what it found on them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aliked.backends import Spec, create_extractor
from aliked.benchmark.rows import Row
from aliked.benchmark.timing import CudaClock, Lap, Limits, wall_clock
from aliked.features import Extractor, Features, features_of_batch

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
