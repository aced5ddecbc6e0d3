"""Images as an evaluation sees them: a name, pixels at the size that features are made at."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
from tqdm import tqdm

from aliked.features import Features
from aliked.files import sha256, whole_file
from aliked.matching import match_mutual
from aliked.weights import find_weights
from benchmark.environment import ROOT
from evaluation.systems import Extract, Place, System, given_file


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
        """Of the pixels that `load` returns and their size."""
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


CODE = ("aliked/*.py", "aliked/backends/*.py", "aliked/export/*.py")
KERNELS = {"fused": ("aliked/fused/*.*",)}  # what a backend has elsewhere


class FeatureStore:
    """The features of one system. `extract` puts images into it, `read` takes them out.

    Files are written whole or not at all, so that an interrupted run loses one image at most.
    """

    def __init__(self, root: Path, key: dict, open_extractor: Callable[[], Extract]):
        """`key` is everything that the features depend on besides the image, as JSON has it."""
        self.key = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        names = (key["system"][name] for name in ("model", "backend", "precision"))
        self.folder = Path(root) / "-".join(filter(None, (*names, digest[:12])))
        self._open_extractor = open_extractor

    def extract(self, images: Sequence[Image]) -> int:
        """Extract the features of those images that are not there yet; how many these were."""
        missing = [image for image in images if not self._path(image).exists()]
        if not missing:
            return 0
        extractor = self._open_extractor()
        for image in tqdm(missing, desc="features", unit="image", leave=False, disable=None):
            self._write(image, extractor(image.load()))
        return len(missing)

    def read(self, image: Image) -> Features:
        """The features of an image, extracted now if it has not been through `extract`."""
        self.extract([image])
        with h5py.File(self._path(image)) as file:
            return Features(*(file[name][()] for name in ("keypoints", "scores", "descriptors")))

    def _path(self, image: Image) -> Path:
        return self.folder / f"{image.sha256}.h5"

    def _write(self, image: Image, features: Features) -> None:
        with whole_file(self._path(image)) as partial, h5py.File(partial, "w") as file:
            file.attrs["key"], file.attrs["image"] = self.key, image.name
            for name, values in vars(features).items():
                # ORB's bits shrink to a twentieth; chunks, which compression needs, have rows.
                compression = "lzf" if len(values) else None
                file.create_dataset(name, data=values, compression=compression)


def store_key(system: System, place: Place) -> dict:
    """What the features of `system` depend on besides the image."""
    key = {"system": vars(system), "versions": place.versions}
    if system.baseline:
        return key
    file = given_file(system, place)
    return key | {
        "weights": sha256(find_weights(system.model, place.weights)),
        "model_path": file and sha256(file),
        "gpu": place.machine.get("gpu") if system.device == "cuda" else None,
        "code": code_digest(CODE + KERNELS.get(system.backend, ())),
    }


@functools.cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """A hash of the project's files of these names."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


ANY_SIMILARITY = -1.0  # the lowest that a cosine can be


@dataclass(frozen=True)
class Pair:
    """Two images and what is known about them."""

    name: str  # unique within a data set
    group: str  # the table has a column for each, such as "illumination"
    first: Image
    second: Image
    truth: Any  # what the task compares with, such as a homography


Measure = Callable[[Pair, Features, Features], dict]


def match(first: Features, second: Features) -> np.ndarray:
    """Indices [P, 2] of the mutually most similar keypoints, however dissimilar they are.

    One rule for all systems: a limit would suit one kind of descriptor and not another.
    """
    return match_mutual(first.descriptors, second.descriptors, ANY_SIMILARITY)


@contextlib.contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def measure_pairs(pairs: Sequence[Pair], store: FeatureStore, measure: Measure) -> list[dict]:
    """What `measure` says of every pair, with its name and group, in the order of the pairs."""

    def one(pair: Pair) -> dict:
        found = measure(pair, store.read(pair.first), store.read(pair.second))
        return {"name": pair.name, "group": pair.group} | found

    # A pair per thread: NumPy and OpenCV let the others run.
    with one_opencv_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(one, pairs)
        return list(tqdm(rows, "pairs", len(pairs), leave=False, disable=None, unit="pair"))


# What decides the features besides weights and options: other code makes other features.
