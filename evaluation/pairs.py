"""Pairs of images as an evaluation sees them: names, pixels at the size evaluated, the truth."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from aliked.matching import Matches, MutualMatcher

ANY_SIMILARITY = -1.0  # the lowest that a cosine can be
RATIO = 0.9  # of distances, to the nearest and to the second nearest


@dataclass(frozen=True)
class Resize:
    """Bring one side of every image to a length, the other in proportion."""

    side: str  # "short" or "long"
    pixels: int

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        known = (min if self.side == "short" else max)(width, height)
        return round(width * self.pixels / known), round(height * self.pixels / known)

    def __str__(self) -> str:
        return f"{self.side} side {self.pixels}"


def scaling(before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """The 3x3 matrix that maps pixels of an image to pixels of its resized version.

    Sizes are (width, height). The centre of the top-left pixel is (0, 0) in both, so that its
    corner is (-0.5, -0.5) in both: x' = (x + 0.5) s - 0.5.
    """
    sx, sy = after[0] / before[0], after[1] / before[1]
    return np.array([[sx, 0, (sx - 1) / 2], [0, sy, (sy - 1) / 2], [0, 0, 1]])


@dataclass(frozen=True, eq=False)
class Image:
    """One image, decoded when it is needed."""

    name: str  # unique within a data set, such as "i_ajuntament/1.ppm"
    read: Callable[[], np.ndarray]  # uint8 [H, W, 3] RGB, before resizing
    resize: Resize | None = None

    def load(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB, as features are extracted from it."""
        return self._resized(self.read())

    @property
    def sha256(self) -> str:
        """The hash of the pixels that `load` returns and of their size."""
        return self._facts[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what `load` returns."""
        return self._facts[1]

    @property
    def to_loaded(self) -> np.ndarray:
        """The 3x3 matrix that maps pixels of the original to pixels of what `load` returns."""
        return scaling(self._facts[2], self.size)

    @functools.cached_property
    def _facts(self) -> tuple[str, tuple[int, int], tuple[int, int]]:
        original = self.read()
        loaded = self._resized(original)
        digest = hashlib.sha256(repr(loaded.shape).encode() + loaded.tobytes()).hexdigest()
        return digest, loaded.shape[1::-1], original.shape[1::-1]

    def _resized(self, original: np.ndarray) -> np.ndarray:
        if self.resize is None:
            return original
        size = self.resize.size(original.shape[1], original.shape[0])
        return cv2.resize(original, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Pair:
    """Two images and what is known about them."""

    name: str  # unique within a data set
    group: str  # the table has a column for each, such as "illumination"
    first: Image
    second: Image
    truth: Any  # what the task compares with, such as a homography


@dataclass(frozen=True)
class Dataset:
    """Pairs to evaluate on."""

    name: str
    pairs: Sequence[Pair]
    parameters: dict = field(default_factory=dict)  # by which the pairs were chosen, as JSON has it

    @property
    def images(self) -> list[Image]:
        """Every image once, in the order of the pairs."""
        images = (image for pair in self.pairs for image in (pair.first, pair.second))
        return list({image.name: image for image in images}.values())


# However dissimilar two keypoints are: a limit would suit one kind of descriptor and not another.
MUTUAL = MutualMatcher(ANY_SIMILARITY)


class RatioMatcher(MutualMatcher):
    """Mutual nearest neighbours that are clearly nearer than the second nearest (Lowe's test)."""

    def __init__(self) -> None:
        super().__init__(ANY_SIMILARITY)

    def match_prepared(self, first: np.ndarray, second: np.ndarray) -> Matches:
        """Matches of two images' descriptors."""
        matches = super().match_prepared(first, second)
        others = first[matches.indices[:, 0]] @ second.T
        np.put_along_axis(others, matches.indices[:, 1:], ANY_SIMILARITY, axis=1)
        runner_up = others.max(axis=1, initial=ANY_SIMILARITY)
        # |a - b|^2 = 2 - 2 ab for vectors of unit length.
        clear = 1 - matches.scores < RATIO**2 * (1 - runner_up)
        return Matches(matches.indices[clear], matches.scores[clear])
