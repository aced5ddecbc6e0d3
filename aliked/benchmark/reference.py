"""What every row is compared with: PyTorch in float32 on the CPU, on the same images."""

from pathlib import Path

import numpy as np

from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.features import Features
from aliked.files import whole_file
from aliked.ties import Expected

PARTS = ("keypoints", "scores", "descriptors")


def make_reference(spec: Spec, images: dict[str, np.ndarray], path: Path) -> None:
    """Extract the features of uint8 images, by name, as `spec` on the CPU, and write them."""
    extractor, arrays = PyTorchExtractor(spec), {}
    for name, image in images.items():
        expected = extractor.expect(image)
        arrays |= {f"{name}/{part}": getattr(expected.features, part) for part in PARTS}
        arrays[f"{name}/ties"] = expected.ties
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
