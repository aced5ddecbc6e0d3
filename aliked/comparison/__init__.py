"""What is lost between two runtimes or precisions: keypoints, descriptors, matches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from aliked.errors import InputError
from aliked.features import Features
from aliked.matching import match_mutual, mutual_nearest_keypoints


@dataclass(frozen=True)
class Pairs:
    """The keypoints that two runtimes both found, as P indices into the features of each."""

    reference: np.ndarray  # [P] int64, ascending
    other: np.ndarray  # [P] int64
    shift: np.ndarray  # [P] float64, |dxy| in pixels


@dataclass(frozen=True)
class Differences:
    """How far the other's half of each of P pairs is from the reference's; [P] float64 each."""

    shift: np.ndarray  # |dxy| in pixels
    score: np.ndarray  # |dscore|
    dot: np.ndarray  # dot product of the descriptors
    element_mean: np.ndarray  # mean |difference| over the descriptor's elements
    element_max: np.ndarray  # the largest of these
    # [P] bool: the two lie in different pixels. A descriptor's sample positions are predicted from
    # the patch around its keypoint's pixel, so theirs come from patches a pixel apart.
    crossed: np.ndarray


@dataclass(frozen=True)
class ImageComparison:
    """Both runtimes' features of one image, in descending order of their scores, paired."""

    name: str
    reference: Features
    other: Features
    pairs: Pairs

    @property
    def missed(self) -> np.ndarray:
        """Keypoints of the reference without partner: indices, which are ranks by score."""
        return np.delete(np.arange(len(self.reference)), self.pairs.reference)

    @property
    def extra(self) -> np.ndarray:
        """The same of the other."""
        return np.delete(np.arange(len(self.other)), self.pairs.other)


@dataclass(frozen=True)
class MatchChange:
    """Matches between two images with the reference, and what the other makes of them."""

    first: str  # names of the images
    second: str
    reference: int  # matches with the reference
    other: int  # matches with the other
    kept: int  # matches of both, between the same keypoints
    undetected: int  # of those lost: a keypoint of theirs was missed
    similarity: np.ndarray  # [reference] dot products of the reference's matches

    @property
    def lost(self) -> int:
        """Matches that only the reference makes."""
        return self.reference - self.kept

    @property
    def gained(self) -> int:
        """Matches that only the other makes."""
        return self.other - self.kept


def find_mutual_closest_keypoints(reference: Features, other: Features, radius: float) -> Pairs:
    """Pair keypoints of the same image that are each other's nearest, at most `radius` px apart."""
    return Pairs(*mutual_nearest_keypoints(reference.keypoints, other.keypoints, radius))


def compare_image(
    name: str, reference: Features, other: Features, radius: float
) -> ImageComparison:
    """Sort both runtimes' features of one image by score and pair them, see above.

    `InputError` when the descriptors differ in length: these are two models, not two runtimes.
    """
    lengths = reference.descriptors.shape[1], other.descriptors.shape[1]
    if lengths[0] != lengths[1]:
        raise InputError(
            f"descriptors have {lengths[0]} and {lengths[1]} values; compare two runtimes of the "
            "same model"
        )
    reference, other = by_score(reference), by_score(other)
    pairs = find_mutual_closest_keypoints(reference, other, radius)
    return ImageComparison(name, reference, other, pairs)


def by_score(features: Features) -> Features:
    """The same features in descending order of `scores`."""
    order = np.argsort(-features.scores, kind="stable")
    return Features(features.keypoints[order], features.scores[order], features.descriptors[order])


def measure_differences(image: ImageComparison) -> Differences:
    """The differences of every pair of one image, in float64."""
    i, j = image.pairs.reference, image.pairs.other
    pixels = (np.floor(image.reference.keypoints[i]), np.floor(image.other.keypoints[j]))
    a = image.reference.descriptors[i].astype(np.float64)
    b = image.other.descriptors[j].astype(np.float64)
    element = np.abs(a - b)
    return Differences(
        shift=image.pairs.shift,
        score=np.abs(image.reference.scores[i].astype(np.float64) - image.other.scores[j]),
        dot=(a * b).sum(axis=1),
        element_mean=element.mean(axis=1),
        element_max=element.max(axis=1),
        crossed=(pixels[0] != pixels[1]).any(axis=1),
    )


def join(differences: Sequence[Differences]) -> Differences:
    """The pairs of several images as one."""
    names = [field.name for field in fields(Differences)]
    return Differences(
        **{name: np.concatenate([getattr(d, name) for d in differences]) for name in names}
    )


def compare_matches(
    first: ImageComparison, second: ImageComparison, min_similarity: float
) -> MatchChange:
    """Match two images by descriptor with either runtime, and see which matches are the same.

    Two matches are the same when the keypoints at both their ends are pairs.
    """
    expected = match_mutual(
        first.reference.descriptors, second.reference.descriptors, min_similarity
    )
    found = match_mutual(first.other.descriptors, second.other.descriptors, min_similarity)
    ends = (first, expected[:, 0], found[:, 0]), (second, expected[:, 1], found[:, 1])
    translated = np.stack([_in_reference(image, new) for image, _, new in ends], axis=1)
    detected = [np.isin(old, image.pairs.reference) for image, old, _ in ends]
    a = first.reference.descriptors[expected[:, 0]].astype(np.float64)
    b = second.reference.descriptors[expected[:, 1]]
    return MatchChange(
        first=first.name,
        second=second.name,
        reference=len(expected),
        other=len(found),
        kept=len(set(map(tuple, expected.tolist())) & set(map(tuple, translated.tolist()))),
        undetected=int((~(detected[0] & detected[1])).sum()),
        similarity=(a * b).sum(axis=1),
    )


def _in_reference(image: ImageComparison, indices: np.ndarray) -> np.ndarray:
    """The reference's index of each of the other's keypoints, -1 where it has no partner."""
    partner = np.full(len(image.other), -1)
    partner[image.pairs.other] = image.pairs.reference
    return partner[indices]
