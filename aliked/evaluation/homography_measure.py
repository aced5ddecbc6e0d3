"""What the features of a pair with a known homography are worth: the measures of the field."""

from collections.abc import Sequence

import numpy as np

from aliked.drawing import draw_matches
from aliked.evaluation.pairs import Pair, match
from aliked.evaluation.robust import estimators
from aliked.evaluation.store import FeatureStore
from aliked.features import Features
from aliked.matching import mutual_nearest_keypoints

CORRECT_PX = 3  # of repeatability, matching score, and the picture of a pair
THRESHOLDS = range(1, 11)  # px, of the mean matching accuracy
# Estimates with different seeds, of which the middle one counts: where two planes fit the matches
# nearly as well as each other, a single estimate is a toss of a coin.
ESTIMATES = 5


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [N, 2] through a 3x3 homography, [N, 2] float64; infinite where it says so."""
    mapped = np.c_[points, np.ones(len(points))] @ homography.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return mapped[:, :2] / mapped[:, 2:]


def homography_of(pair: Pair) -> np.ndarray:
    """The homography between a pair's images as features see them, after resizing."""
    return pair.second.to_loaded @ pair.truth @ np.linalg.inv(pair.first.to_loaded)


def measure(pair: Pair, first: Features, second: Features, seed: int) -> dict:
    """What the features of both images are worth.

    `covisible`: keypoints of each image that the other one shows. `repeated`: those of both that
    are each other's nearest, at most 3 px apart in the second image. `matches`, and how many of
    them are `correct` within 1 to 10 px in the second image; `recalled` are correct within 3 px
    and covisible. `corner_error`: how far the estimated homography puts the first image's corners
    from where they belong, mean of the four in pixels, median of five seeds, None where there is
    none.
    """
    truth = homography_of(pair)
    there = project(truth, first.keypoints)
    back = project(np.linalg.inv(truth), second.keypoints)
    seen = inside(there, pair.second.size), inside(back, pair.first.size)
    repeated, _, _ = mutual_nearest_keypoints(there[seen[0]], second.keypoints[seen[1]], CORRECT_PX)
    i, j = match(first, second).T
    distance = np.hypot(*(there[i] - second.keypoints[j]).T)
    recalled = (distance <= CORRECT_PX) & seen[0][i] & seen[1][j]
    points = first.keypoints[i], second.keypoints[j]
    return {
        "keypoints": [len(first), len(second)],
        "covisible": [int(s.sum()) for s in seen],
        "repeated": len(repeated),
        "matches": len(i),
        "correct": [int((distance <= threshold).sum()) for threshold in THRESHOLDS],
        "recalled": int(recalled.sum()),
        "corner_error": {
            name: median_error(
                [estimate(*points, seed + run) for run in range(ESTIMATES)], truth, pair.first.size
            )
            for name, estimate in estimators().items()
        },
    }


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points [N, 2] lie in an image of this width and height."""
    return ((points >= -0.5) & (points < np.array(size) - 0.5)).all(axis=1)


def median_error(
    estimates: Sequence[np.ndarray | None], truth: np.ndarray, size: tuple[int, int]
) -> float | None:
    """Median of the estimates' corner errors, pixels; None where most found no homography."""
    errors = [np.inf if h is None else corner_error(h, truth, size) for h in estimates]
    middle = float(np.median(errors))
    return middle if np.isfinite(middle) else None


def corner_error(found: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance of an image's corners through both homographies, pixels, or infinite."""
    right, bottom = size[0] - 1, size[1] - 1
    corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]])
    error = np.hypot(*(project(found, corners) - project(truth, corners)).T).mean()
    return float(error) if np.isfinite(error) else np.inf


def draw(pair: Pair, row: dict, store: FeatureStore) -> np.ndarray:
    """A pair's matches: correct ones green, wrong ones red."""
    first, second = store.read(pair.first), store.read(pair.second)
    matches = match(first, second)
    there = project(homography_of(pair), first.keypoints[matches[:, 0]])
    distance = np.hypot(*(there - second.keypoints[matches[:, 1]]).T)
    return draw_matches(
        pair.first.load(),
        first,
        pair.second.load(),
        second,
        matches,
        f"{row['matches']} matches, {row['correct'][CORRECT_PX - 1]} within {CORRECT_PX} px",
        distance <= CORRECT_PX,
    )
