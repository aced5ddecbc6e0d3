"""Pairs of images, measured a few at a time."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from aliked.evaluation.images import Image
from aliked.evaluation.store import FeatureStore
from aliked.features import Features
from aliked.matching import match_mutual

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
