"""Are two runtimes the same model? What one finds and matches beside the other, and judged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from aliked.configs import RADIUS
from aliked.errors import InputError
from aliked.features import Features
from aliked.matching import Matches, check_lengths, mutual_nearest_keypoints

RADIUS_PX = 0.5  # keypoints further apart are not the same
EDGE_PX = 1e-3  # rounding: 8 float32 steps of a coordinate in a 1241 px wide image
# Where an image has no texture the score map is flat, at about 0.002, and rounding decides where
# its maxima are. The 1000th keypoint of a photograph scores 0.02 to 0.04.
FAINT = 0.01
NO_TIES = np.zeros((0, 2), np.float32)


@dataclass(frozen=True)
class Parity:
    """How far the features of one image agree.

    Pairs are keypoints that are each other's nearest and at most the radius apart. Over no pairs
    at all, differences are 0 and cosines 1: `common` says that there are none.
    """

    reference: int  # keypoints in the reference
    other: int  # keypoints in the other
    missing: int  # keypoints of the reference without partner, those that score below FAINT aside
    extra: int  # the same of the other
    common: int  # pairs
    undecided: int  # pairs at a tie
    max_shift_px: float  # this and the next two are of the other pairs
    median_shift_px: float
    max_score_difference: float
    mean_cosine: float  # this and the next are of pairs away from ties and pixel edges
    min_cosine: float
    at_edge: int  # pairs at a tie or a pixel edge
    min_cosine_at_edge: float
    max_length_error: float  # largest | |descriptor| - 1 | in the other
    finite: bool  # no NaN or infinity in the other

    @property
    def fraction(self) -> float:
        """Keypoints in common, of the larger of both numbers; 1 where both are empty."""
        return self.common / self.total if self.total else 1.0

    @property
    def total(self) -> int:
        """The larger number of keypoints, faint ones without partner not counted."""
        return self.common + max(self.missing, self.extra)


@dataclass(frozen=True)
class Tolerance:
    """Limits within which two runtimes count as the same model."""

    name: str
    min_fraction: float  # of keypoints in common; one keypoint without partner is always allowed
    max_shift_px: float
    mean_cosine: float
    min_cosine: float
    min_cosine_at_edge: float
    max_score_difference: float
    max_length_error: float = 1e-3


# Measured with the official network, four models on five photographs: float32 on one thread or two,
# with other convolution kernels, with the batch normalisation folded, and float64. Every keypoint
# was in common, shifts were at most 1.2e-4 px, cosines at least 1 - 1.1e-9 (0.9969 at pixel edges),
# scores within 4.4e-5. The limits leave room for other hardware and still tell float32 from TF32,
# whose rounding of the weights alone moves keypoints by up to 6.7e-3 px.
FP32 = Tolerance(
    name="FP32",
    min_fraction=0.998,
    max_shift_px=1e-3,
    mean_cosine=0.999999,
    min_cosine=0.99999,
    min_cosine_at_edge=0.95,
    max_score_difference=5e-4,
)

# Half-precision convolutions with coordinates and sampling kept in float32 keep 99.3 to 99.6 % of
# the best 1000 keypoints within 0.5 px, at a mean cosine of 0.99996. A single keypoint may move to
# a neighbouring maximum, so nothing is asked of the worst pair.
FP16 = Tolerance(
    name="FP16",
    min_fraction=0.985,
    max_shift_px=0.5,
    mean_cosine=0.9995,
    min_cosine=-1.0,
    min_cosine_at_edge=-1.0,
    max_score_difference=1.0,
)

# TF32 multiplies with the 11 significant bits of FP16, so what may use it cannot be held to the
# tolerance of float32.
TF32 = replace(FP16, name="TF32")

TOLERANCES = {"fp32": FP32, "tf32": TF32, "fp16": FP16}  # by precision


@dataclass(frozen=True)
class Verdict:
    """What `judge` found: no reasons means that it passed."""

    reasons: list[str]
    text: str  # the numbers and the outcome, several lines, to print

    @property
    def passed(self) -> bool:
        """Whether nothing is outside the tolerance."""
        return not self.reasons


@dataclass(frozen=True)
class FeaturePairs:
    """The keypoints of an image that two runtimes both found, P pairs, and how far they differ."""

    reference: np.ndarray  # [P] int64, ascending: indices into the reference's features
    other: np.ndarray  # [P] int64: into the other's
    shift: np.ndarray  # [P] float64, |dxy| in pixels
    score_difference: np.ndarray  # [P] float64, |dscore|
    dot: np.ndarray  # [P] float64, dot product of the descriptors
    cosine: np.ndarray  # [P] float64, the same of descriptors brought to unit length
    # [P] bool: the descriptors may come from neighbouring patches. The patch that predicts a
    # descriptor's sample positions is centred at the keypoint truncated to whole pixels, so a
    # rounding error across an integer moves the patch by a pixel.
    at_edge: np.ndarray


def pair_features(reference: Features, other: Features, radius_px: float) -> FeaturePairs:
    """Pair the keypoints of one image that are each other's nearest, at most `radius_px` apart.

    `InputError` when the descriptors differ in length: these are two models, not two runtimes.
    """
    check_lengths(
        reference.descriptors, other.descriptors, "compare two runtimes of the same model"
    )
    i, j, shift = mutual_nearest_keypoints(reference.keypoints, other.keypoints, radius_px)
    # In float64: float32 rounding would hide 1 - 1e-8.
    a, b = (rows.astype(np.float64) for rows in (reference.descriptors[i], other.descriptors[j]))
    dot = (a * b).sum(axis=1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return FeaturePairs(
        reference=i,
        other=j,
        shift=shift,
        score_difference=np.abs(reference.scores[i].astype(np.float64) - other.scores[j]),
        dot=dot,
        cosine=dot / np.maximum(lengths, 1e-12),
        at_edge=_at_pixel_edge(reference.keypoints[i], other.keypoints[j]),
    )


def compare_features(
    reference: Features, other: Features, radius_px: float = RADIUS_PX, ties: np.ndarray = NO_TIES
) -> Parity:
    """Pair the features of one image, as `pair_features` does, and measure how far they agree.

    `ties` [T, 2] are those of the reference's score map (`aliked.ties.expect`).
    """
    pairs = pair_features(reference, other, radius_px)
    undecided = _at_tie(reference.keypoints[pairs.reference], ties)
    at_edge = pairs.at_edge | undecided
    shift, score_difference = pairs.shift[~undecided], pairs.score_difference[~undecided]
    lengths = np.linalg.norm(other.descriptors.astype(np.float64), axis=1)
    return Parity(
        reference=len(reference),
        other=len(other),
        missing=int((np.delete(reference.scores, pairs.reference) >= FAINT).sum()),
        extra=int((np.delete(other.scores, pairs.other) >= FAINT).sum()),
        common=len(pairs.shift),
        undecided=int(undecided.sum()),
        max_shift_px=float(shift.max(initial=0)),
        median_shift_px=float(np.median(shift)) if len(shift) else 0.0,
        max_score_difference=float(score_difference.max(initial=0)),
        mean_cosine=float(pairs.cosine[~at_edge].mean()) if not at_edge.all() else 1.0,
        min_cosine=float(pairs.cosine[~at_edge].min(initial=1)),
        at_edge=int(at_edge.sum()),
        min_cosine_at_edge=float(pairs.cosine[at_edge].min(initial=1)),
        max_length_error=float(np.abs(lengths - 1).max(initial=0)),
        finite=not count_not_finite(other),
    )


def count_not_finite(features: Features) -> int:
    """How many keypoints have NaN or infinity in place, score or descriptor."""
    values = np.hstack([features.keypoints, features.scores[:, None], features.descriptors])
    return int((~np.isfinite(values)).any(axis=1).sum())


def judge(parities: Mapping[str, Parity], tolerance: Tolerance) -> Verdict:
    """Judge the parities of several images, given by image name, each by itself."""
    reasons = [
        f"{name}: {reason}"
        for name, parity in parities.items()
        for reason in _violations(parity, tolerance)
    ]
    if not parities:
        reasons = ["no image was compared"]
    lines = _summary(list(parities.values())) if parities else []
    return _verdict(reasons, lines, tolerance)


def _verdict(
    reasons: list[str], lines: list[str], tolerance: "Tolerance | MatchTolerance"
) -> Verdict:
    """The verdict of these reasons; its text is the `lines` of numbers and then the outcome."""
    outcome = f"{'outside' if reasons else 'within'} the {tolerance.name} tolerance"
    return Verdict(reasons, "\n".join([*lines, outcome, *(f"  {reason}" for reason in reasons)]))


def _at_pixel_edge(keypoints0: np.ndarray, keypoints1: np.ndarray) -> np.ndarray:
    """[P] bool: within rounding of a whole coordinate, or in different pixels."""
    near = np.abs(keypoints0 - np.rint(keypoints0)) <= EDGE_PX
    crossed = np.floor(keypoints0) != np.floor(keypoints1)
    return (near | crossed).any(axis=1)


def _at_tie(keypoints: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """[P] bool: keypoints that may have been refined from one of the maxima `ties` [T, 2].

    These are in the 5x5 pixels around the keypoint, rounded. The patch that predicts a descriptor's
    sample positions can move there, as at a pixel edge.
    """
    reach = np.arange(-RADIUS, RADIUS + 1)  # no keypoint is farther from its maximum
    window = np.stack(np.meshgrid(reach, reach), axis=-1).reshape(-1, 2)
    around = np.rint(keypoints[:, None]).astype(np.int64) + window  # [P, 25, 2]
    return np.isin(_number(around), _number(ties.astype(np.int64))).any(axis=1)


def _number(pixels: np.ndarray) -> np.ndarray:
    """Pixels [..., 2] as one number each."""
    return (pixels[..., 1] << 32) + pixels[..., 0]


def _violations(parity: Parity, limit: Tolerance) -> list[str]:
    one_missing = 1 - 1 / max(parity.total, 1)
    at_least = {
        "keypoints in common": (parity.fraction, min(limit.min_fraction, one_missing)),
        "mean descriptor cosine": (parity.mean_cosine, limit.mean_cosine),
        "min descriptor cosine": (parity.min_cosine, limit.min_cosine),
        "min descriptor cosine at pixel edges and ties": (
            parity.min_cosine_at_edge,
            limit.min_cosine_at_edge,
        ),
    }
    at_most = {
        "max |dxy| in px": (parity.max_shift_px, limit.max_shift_px),
        "max |dscore|": (parity.max_score_difference, limit.max_score_difference),
        "max |descriptor length - 1|": (parity.max_length_error, limit.max_length_error),
    }
    # "not": a NaN compares as false and is a violation.
    return (
        ([] if parity.finite else ["NaN or infinity in the outputs"])
        + [f"{what} {v:.7g} < {least:g}" for what, (v, least) in at_least.items() if not v >= least]
        + [f"{what} {v:.3g} > {most:g}" for what, (v, most) in at_most.items() if not v <= most]
    )


def _summary(parities: list[Parity]) -> list[str]:
    """The sum of the counts, and the worst image of everything else."""
    common, total = sum(p.common for p in parities), sum(p.total for p in parities)
    undecided = sum(p.undecided for p in parities)
    return [
        f"images               {len(parities)}",
        f"keypoints            {sum(p.reference for p in parities)} in the reference, "
        f"{sum(p.other for p in parities)} in the other",
        f"keypoints in common  {common / total if total else 1:.3%}, "
        f"worst image {min(p.fraction for p in parities):.3%}",
        f"|dxy|                max {max(p.max_shift_px for p in parities):.2g} px, "
        f"median {max(p.median_shift_px for p in parities):.2g} px",
        f"descriptor cosine    min {min(p.min_cosine for p in parities):.7f}, "
        f"mean {min(p.mean_cosine for p in parities):.7f}; "
        f"min {min(p.min_cosine_at_edge for p in parities):.5f} of the "
        f"{sum(p.at_edge for p in parities)} at pixel edges and ties",
        f"|dscore|             max {max(p.max_score_difference for p in parities):.2g}",
        *([f"at ties              {undecided}, which may shift"] if undecided else []),
    ]


@dataclass(frozen=True)
class MatchParity:
    """How far the matches of one pair of images agree."""

    reference: int  # matches in the reference
    other: int  # matches in the other
    common: int  # of the same two keypoints
    max_score_difference: float  # of common matches
    mean_score_difference: float
    finite: bool  # no NaN or infinity in the other's scores

    @property
    def lost(self) -> int:
        """Matches of the reference that the other does not have."""
        return self.reference - self.common

    @property
    def gained(self) -> int:
        """Matches of the other that the reference does not have."""
        return self.other - self.common


@dataclass(frozen=True)
class MatchTolerance:
    """Limits within which two matchers count as the same."""

    name: str
    max_changed: int  # keypoints of a pair that are matched otherwise: scores at the threshold
    max_changed_share: float  # and this share of the reference's matches
    max_score_difference: float
    mean_score_difference: float


# Measured beside the official code on four pairs of photographs: no keypoint of 4512 is matched
# otherwise, with scores within 5.4e-5, in the mean 4e-6.
MATCH_FP32 = MatchTolerance(
    name="FP32",
    max_changed=2,
    max_changed_share=0.0,
    max_score_difference=5e-4,
    mean_score_difference=5e-5,
)

# From images on: features that agree within `parity.FP32` move the scores, too, on photographs by
# at most 3.2e-5. A keypoint at a tie is found elsewhere, and its match is lost.
PAIR_FP32 = MatchTolerance(
    name="FP32 pair",
    max_changed=2,
    max_changed_share=0.005,
    max_score_difference=0.02,
    mean_score_difference=1e-4,
)

# The same pairs in half precision: at most 3 keypoints of a pair change, of 473 matches, scores of
# the others by at most 0.04, in the mean 0.003.
MATCH_FP16 = MatchTolerance(
    name="FP16",
    max_changed=2,
    max_changed_share=0.02,
    max_score_difference=0.3,
    mean_score_difference=0.01,
)


# From images on, as in `FP16`: a keypoint may move to a neighbouring maximum, and its match then
# scores otherwise, so nothing is asked of the worst. On an H100, K = 1000 and 2048, 99.5 to 99.9 %
# of the matches of 11 pairs were in common, and single scores moved by up to 0.5.
PAIR_FP16 = MatchTolerance(
    name="FP16 pair",
    max_changed=2,
    max_changed_share=0.02,
    max_score_difference=1.0,
    mean_score_difference=0.01,
)

MATCH_TOLERANCES = {  # by graph and precision
    ("matcher", "fp32"): MATCH_FP32,
    ("matcher", "tf32"): replace(MATCH_FP16, name="TF32"),
    ("matcher", "fp16"): MATCH_FP16,
    ("pair", "fp32"): PAIR_FP32,
    ("pair", "tf32"): replace(PAIR_FP16, name="TF32 pair"),
    ("pair", "fp16"): PAIR_FP16,
}


def compare_matches(reference: Matches, other: Matches) -> MatchParity:
    """Compare two matchers' results for the same features."""
    scores = dict(zip(map(tuple, reference.indices.tolist()), reference.scores, strict=True))
    differences = [
        abs(float(score) - float(scores[pair]))
        for pair, score in zip(map(tuple, other.indices.tolist()), other.scores, strict=True)
        if pair in scores
    ]
    return MatchParity(
        reference=len(reference),
        other=len(other),
        common=len(differences),
        max_score_difference=max(differences, default=0.0),
        mean_score_difference=float(np.mean(differences)) if differences else 0.0,
        finite=bool(np.isfinite(other.scores).all()),
    )


def in_terms_of(
    reference: tuple[np.ndarray, np.ndarray],
    keypoints: tuple[np.ndarray, np.ndarray],
    found: Matches,
) -> Matches:
    """`found` with the reference's indices, for two runtimes that found the keypoints themselves.

    Both hold each image's keypoints [N, 2]. A match of a keypoint that the reference does not have
    keeps its place with the index -1, so that it counts as gained.
    """
    columns = []
    for side in (0, 1):
        theirs, ours, _ = mutual_nearest_keypoints(reference[side], keypoints[side], RADIUS_PX)
        index = np.full(len(keypoints[side]), -1)
        index[ours] = theirs
        columns.append(index[found.indices[:, side]])
    return Matches(np.stack(columns, axis=1).astype(np.int64), found.scores)


def compare_pair(
    features: tuple[Features, Features],
    expected: Matches,
    keypoints: tuple[np.ndarray, np.ndarray],
    found: Matches,
) -> MatchParity:
    """Compare what two runtimes made of two images from their pixels on.

    `features` and the `expected` matches are the reference's, `keypoints` [N, 2] and what was
    `found` the other's. Where the reference's keypoints score below `FAINT`, rounding decides which
    there are, and the scores of all their matches follow from that: these are not counted.
    """
    reference = tuple(own.keypoints for own in features)
    both = expected, in_terms_of(reference, keypoints, found)
    return compare_matches(*(_without_faint(matches, features) for matches in both))


def _without_faint(matches: Matches, features: tuple[Features, Features]) -> Matches:
    """The matches of which no keypoint is faint; -1 is as the reference's faintest one."""
    kept = np.ones(len(matches), bool)
    for own, indices in zip(features, matches.indices.T, strict=True):
        clear = own.scores >= FAINT
        kept &= np.append(clear, clear.all())[indices]
    return Matches(matches.indices[kept], matches.scores[kept])


def judge_matches(parities: Mapping[str, MatchParity], tolerance: MatchTolerance) -> Verdict:
    """Judge the parities of several pairs of images, given by name, each by itself.

    `InputError` where nothing is wrong and no pair has a match that could be.
    """
    reasons = [
        f"{name}: {reason}"
        for name, parity in parities.items()
        for reason in _match_violations(parity, tolerance)
    ]
    if not reasons and not any(parity.reference for parity in parities.values()):
        raise InputError(
            "no pair of the images has a match to judge by, so that they prove nothing; give "
            "photographs of which neighbours show the same place"
        )
    lines = _match_summary(list(parities.values())) if parities else []
    return _verdict(reasons, lines, tolerance)


def _match_violations(parity: MatchParity, limit: MatchTolerance) -> list[str]:
    allowed = limit.max_changed + limit.max_changed_share * parity.reference
    reasons = [] if parity.finite else ["NaN or infinity in the scores"]
    for what, count in (("lost", parity.lost), ("gained", parity.gained)):
        if count > allowed:
            reasons.append(f"{count} matches {what} > {allowed:g}")
    for what in ("max_score_difference", "mean_score_difference"):
        found, most = getattr(parity, what), getattr(limit, what)
        if not found <= most:  # NaN is a violation
            reasons.append(f"{what.replace('_', ' ')} {found:.3g} > {most:g}")
    return reasons


def _match_summary(parities: list[MatchParity]) -> list[str]:
    """The sums of the counts, and the worst pair of everything else."""
    return [
        f"pairs                {len(parities)}",
        f"matches              {sum(p.reference for p in parities)} in the reference, "
        f"{sum(p.common for p in parities)} kept, {sum(p.lost for p in parities)} lost, "
        f"{sum(p.gained for p in parities)} gained",
        f"|dscore|             max {max(p.max_score_difference for p in parities):.2g}, "
        f"mean {max(p.mean_score_difference for p in parities):.2g}",
    ]
