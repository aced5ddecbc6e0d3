"""Are two matchers the same? Matches of one compared with those of another, and judged."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aliked.matches import Matches
from aliked.matching import mutual_nearest_keypoints
from aliked.parity import Verdict

SAME_KEYPOINT_PX = 0.5  # farthest that one keypoint lies apart in two runtimes


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
        theirs, ours, _ = mutual_nearest_keypoints(
            reference[side], keypoints[side], SAME_KEYPOINT_PX
        )
        index = np.full(len(keypoints[side]), -1)
        index[ours] = theirs
        columns.append(index[found.indices[:, side]])
    return Matches(np.stack(columns, axis=1).astype(np.int64), found.scores)


def judge_matches(parities: Mapping[str, MatchParity], tolerance: MatchTolerance) -> Verdict:
    """Judge the parities of several pairs of images, given by name, each by itself."""
    reasons = [
        f"{name}: {reason}"
        for name, parity in parities.items()
        for reason in _violations(parity, tolerance)
    ]
    if not sum(parity.reference for parity in parities.values()):
        reasons.append("no pair has a match in the reference")
    lines = _summary(list(parities.values())) if parities else []
    lines.append(f"{'outside' if reasons else 'within'} the {tolerance.name} tolerance")
    return Verdict(reasons, "\n".join(lines + [f"  {reason}" for reason in reasons]))


def _violations(parity: MatchParity, limit: MatchTolerance) -> list[str]:
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


def _summary(parities: list[MatchParity]) -> list[str]:
    """The sums of the counts, and the worst pair of everything else."""
    return [
        f"pairs                {len(parities)}",
        f"matches              {sum(p.reference for p in parities)} in the reference, "
        f"{sum(p.common for p in parities)} kept, {sum(p.lost for p in parities)} lost, "
        f"{sum(p.gained for p in parities)} gained",
        f"|dscore|             max {max(p.max_score_difference for p in parities):.2g}, "
        f"mean {max(p.mean_score_difference for p in parities):.2g}",
    ]
