"""How well features tell the relative pose of two images: the measures of the field, per pair."""

import numpy as np

from aliked.evaluation.pairs import Pair, match
from aliked.evaluation.pose_data import Motion
from aliked.evaluation.pose_errors import direction_error, epipolar_distance, rotation_error
from aliked.evaluation.pose_estimators import RelativePose, estimators
from aliked.evaluation.pose_repeats import seeds_of
from aliked.features import Features

EPIPOLAR_PX = 1  # of a match that agrees with the true pose
CORRECT_PX = (1, 3, 5)  # of a match that is correct, where depth is known
RIGHT_PX = 3  # of a match that is drawn as a right one


def measure(pair: Pair, first: Features, second: Features, seed: int, repeats: int) -> dict:
    """What the features of both images are worth.

    `matches`, how many of them are `epipolar`, within 1 px of their true epipolar lines, and, where
    depth is known, how many are `correct` within 1, 3 and 5 px in the second image. Poses are
    estimated `repeats` times, with other random numbers: `errors` of each estimator, degrees, None
    where there is no pose; of OpenCV's the mean number of `inliers` and the median errors of
    `rotation` and of `direction` of translation.
    """
    motion: Motion = pair.truth
    matches = match(first, second)
    points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
    seeds = seeds_of(pair.name, seed, repeats)
    poses = {
        name: [estimate(*points, *motion.intrinsics, own_seed) for own_seed in seeds]
        for name, estimate in estimators().items()
    }
    off = {name: np.array([angles(pose, motion) for pose in own]) for name, own in poses.items()}
    off_line = epipolar_distance(points, motion.intrinsics, motion.relative_pose)
    rotation, direction = map(degrees, np.median(off["opencv"], axis=0))
    return {
        "keypoints": [len(first), len(second)],
        "matches": len(matches),
        "epipolar": int((off_line <= EPIPOLAR_PX).sum()),
        "correct": correct(motion, points),
        "inliers": float(np.mean([pose.inliers.sum() if pose else 0 for pose in poses["opencv"]])),
        "rotation": rotation,
        "direction": direction,
        "errors": {name: [degrees(max(both)) for both in own] for name, own in off.items()},
    }


def correct(motion: Motion, points: tuple[np.ndarray, np.ndarray]) -> list[int] | None:
    """How many matches are within each of `CORRECT_PX`; None where depth is not known."""
    distance = match_distance(motion, points)
    if distance is None:
        return None
    return [int((distance <= threshold).sum()) for threshold in CORRECT_PX]


def match_distance(motion: Motion, points: tuple[np.ndarray, np.ndarray]) -> np.ndarray | None:
    """Pixels from where the second image shows the points to their matches, [P]; None: no depth.

    Infinite where the second image does not show them.
    """
    if motion.project is None:
        return None
    return np.nan_to_num(np.hypot(*(motion.project(points[0]) - points[1]).T), nan=np.inf)


def agree(motion: Motion, points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Which matches are right, as far as that is known, [P] bool."""
    off_point = match_distance(motion, points)
    if off_point is not None:
        return off_point <= RIGHT_PX
    return epipolar_distance(points, motion.intrinsics, motion.relative_pose) <= RIGHT_PX


def angles(pose: RelativePose | None, motion: Motion) -> tuple[float, float]:
    """Errors of rotation and of direction of translation, degrees; infinite without a pose."""
    if pose is None:
        return np.inf, np.inf
    true = motion.relative_pose
    return (
        rotation_error(pose.rotation, true[:3, :3]),
        direction_error(pose.translation, true[:3, 3]),
    )


def degrees(error: float) -> float | None:
    """An error as a record has it, to the third decimal; None for an infinite one."""
    return round(float(error), 3) if np.isfinite(error) else None
