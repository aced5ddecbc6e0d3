"""Photographs in files as cameras write them, and an extractor without a network."""

from pathlib import Path

import numpy as np
from PIL import Image

from aliked.features import Features

# What a viewer does with the stored pixels, by EXIF orientation.
TURNED = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, 3),
    7: lambda image: np.rot90(image.swapaxes(0, 1), 2),
    8: lambda image: np.rot90(image, 1),
}
STORED = TURNED | {6: TURNED[8], 8: TURNED[6]}  # the way back


def noise(seed: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Random pixels, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_photo(path: Path, image: np.ndarray, **exif) -> Path:
    """Write pixels as they are, with tags of EXIF by number (`t0x112=6`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = Image.Exif()
    for name, value in exif.items():
        tags[int(name.removeprefix("t"), 16)] = value
    lossless = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
    Image.fromarray(image).save(path, exif=tags, **lossless)
    return path


class Brightest:
    """The pixels of the largest red value as keypoints: what it sees can be told from them."""

    device = "cpu"

    def __init__(self, count: int = 20):
        self.count, self.seen = count, []

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """Each image's features."""
        self.seen.append(images.shape)
        return [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> Features:
        red = image[..., 0].astype(np.int64).ravel()
        places = np.argsort(-red, kind="stable")[: self.count]
        y, x = np.unravel_index(places, image.shape[:2])
        colours = image[y, x].astype(np.float32) + 1
        return Features(
            np.stack([x, y], axis=1).astype(np.float32),
            np.linspace(1, 0.5, len(places), dtype=np.float32),
            colours / np.linalg.norm(colours, axis=1, keepdims=True),
        )
