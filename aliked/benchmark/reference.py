"""What every row is compared with: PyTorch in float32 on the CPU, on the same images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.features import Features
from aliked.files import whole_file

PARTS = ("keypoints", "scores", "descriptors")


class Expected(NamedTuple):
    """What one image gives, and where rounding decides about it (`aliked.ties`)."""

    features: Features
    ties: np.ndarray  # [T, 2] pixels


def make_reference(spec: Spec, images: dict[str, np.ndarray], path: Path) -> None:
    """Extract the features of uint8 images, by name, as `spec` on the CPU, and write them."""
    extractor, arrays = PyTorchExtractor(spec), {}
    for name, image in images.items():
        features = extractor(image)
        arrays |= {f"{name}/{part}": getattr(features, part) for part in PARTS}
        arrays[f"{name}/ties"] = extractor.ties(image)
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path, k: int | None) -> dict[str, Expected]:
    """What is expected by image name, the best `k` of each (None: all)."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {
            name: Expected(
                Features(**{part: arrays[f"{name}/{part}"][:k] for part in PARTS}),
                arrays[f"{name}/ties"],
            )
            for name in names
        }
