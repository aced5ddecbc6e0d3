"""Backends without a network, for tests of what measures them: right, and wrong in known ways."""

import time
from dataclasses import dataclass, replace

import numpy as np

from aliked.backends import Spec
from aliked.features import Features, drop_fill_ins


def features_of(image: np.ndarray, k: int) -> Features:
    """Some features that depend on the image, best first."""
    random = np.random.default_rng(int(image.astype(np.int64).sum()))
    height, width = image.shape[:2]
    descriptors = random.normal(size=(k, 64)).astype(np.float32)
    return Features(
        (random.random((k, 2)) * (width - 1, height - 1)).astype(np.float32),
        np.linspace(0.9, 0.3, k, dtype=np.float32),
        descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True),
    )


@dataclass
class Tensor:
    """What a runtime returns."""

    values: np.ndarray

    def numpy(self) -> np.ndarray:
        """In host memory."""
        return self.values


class FakeExtractor:
    """Features without a network; `shift_px` moves the keypoints."""

    def __init__(self, spec: Spec, shift_px: float = 0.0, device: str = "cpu"):
        self.spec, self.shift_px, self.device, self.name = spec, shift_px, device, "fake"

    def to_device(self, images: np.ndarray) -> np.ndarray:
        """The images themselves."""
        return images

    def infer(self, batch: np.ndarray) -> dict[str, Tensor]:
        """The features of every image."""
        time.sleep(1e-4)
        found = [features_of(image, self.spec.top_k) for image in batch]
        return {
            "keypoints": Tensor(np.stack([f.keypoints + self.shift_px for f in found])),
            "descriptors": Tensor(np.stack([f.descriptors for f in found])),
            "scores": Tensor(np.stack([f.scores for f in found])),
        }

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """The features of every image."""
        outputs = self.infer(images)
        names = ("keypoints", "descriptors", "scores")
        return [
            drop_fill_ins(*rows) for rows in zip(*(outputs[n].values for n in names), strict=True)
        ]

    def __call__(self, image: np.ndarray) -> Features:
        """The features of one image."""
        return self.extract_batch(image[None])[0]

    def synchronize(self) -> None:
        """Nothing runs."""


class FakeBackend:
    """A backend module that makes these extractors."""

    def __init__(self, **options):
        self.options = options

    def unavailable(self) -> None:
        """It always runs."""

    def create(self, spec: Spec) -> FakeExtractor:
        """An extractor of the keypoints asked for, or of `keypoints`."""
        options = dict(self.options)
        keypoints = options.pop("keypoints", spec.top_k)
        return FakeExtractor(replace(spec, top_k=keypoints), **options)
