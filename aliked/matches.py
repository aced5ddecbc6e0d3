"""What a matcher takes and returns, without PyTorch."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aliked.configs import CONFIGS, OFFICIAL
from aliked.errors import InputError
from aliked.features import Features

Size = Sequence[float]  # width and height of an image, pixels


@dataclass(frozen=True)
class Matches:
    """Matches of one pair of images, ascending in the first image's index."""

    indices: np.ndarray  # [P, 2] int64: into the keypoints of each image
    scores: np.ndarray  # [P] float32, above the filter threshold, at most 1
    layers: int | None = None  # how many ran, where the matcher may stop early

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class PairMatches:
    """Keypoints of two images, as found and matched in one go. Rows beyond them are fill-ins."""

    keypoints0: np.ndarray  # [K, 2] float32, pixels, (x, y), centre of the top-left pixel = (0, 0)
    keypoints1: np.ndarray  # [K, 2] the same of the second image
    matches: Matches


NO_MATCHES = Matches(np.empty((0, 2), np.int64), np.empty(0, np.float32))


class Matcher(abc.ABC):
    """One runtime holding one matcher; `LightGlue`, a PyTorch module, counts as one."""

    @abc.abstractmethod
    def match(self, features0: Features, features1: Features, size0: Size, size1: Size) -> Matches:
        """Matches of two images' `Features`, given each image's (width, height) in pixels."""


def matches_of_rows(matches0: np.ndarray, scores0: np.ndarray) -> Matches:
    """`Matches` of one pair's rows: partners [K], -1 for none, and scores [K]."""
    matched = np.flatnonzero(matches0 >= 0)
    partners = matches0[matched].astype(np.int64)
    return Matches(np.stack([matched, partners], axis=1), scores0[matched].astype(np.float32))


def check_matchable(features: Features, size: Size, dim: int) -> None:
    """Raise `InputError` unless a matcher of `dim`-long descriptors can take these features.

    Keypoints and descriptors must be finite, and `size` the image's width and height.
    """
    length = features.descriptors.shape[1]
    if length != dim:
        names = [name for name in OFFICIAL if CONFIGS[name].dim == dim]
        raise InputError(
            f"the descriptors are {length} long, but these LightGlue weights match descriptors "
            f"of length {dim}; extract with {' or '.join(names) or 'another model'}"
        )
    if not (np.isfinite(features.keypoints).all() and np.isfinite(features.descriptors).all()):
        raise InputError("the features hold NaN or infinity; extract them again")
    check_size(size)


def check_size(size: Size) -> None:
    """Raise `InputError` unless `size` is two finite, positive numbers."""
    numbers = np.asarray(size, dtype=object).ravel()
    try:
        right = len(numbers) == 2 and all(0 < float(number) < np.inf for number in numbers)
    except TypeError:  # None, for example
        right = False
    if not right:
        raise InputError(f"the image size is {size}; give (width, height) in pixels")
