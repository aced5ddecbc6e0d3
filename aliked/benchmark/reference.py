"""What every row is compared with: PyTorch in float32 on the CPU, on the same images."""

from pathlib import Path

import numpy as np

from aliked.backends import Spec, create_extractor
from aliked.features import Features
from aliked.files import whole_file

PARTS = ("keypoints", "scores", "descriptors")


def make_reference(spec: Spec, images: dict[str, np.ndarray], path: Path) -> None:
    """Extract the features of uint8 images, by name, as `spec` on the CPU, and write them."""
    extractor = create_extractor("pytorch", spec)
    features = {name: extractor(image) for name, image in images.items()}
    arrays = {
        f"{name}/{part}": getattr(found, part) for name, found in features.items() for part in PARTS
    }
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path, k: int | None) -> dict[str, Features]:
    """Features by image name, the best `k` of each (None: all)."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {
            name: Features(**{part: arrays[f"{name}/{part}"][:k] for part in PARTS})
            for name in names
        }
