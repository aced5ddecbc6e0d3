"""What is reported of relative poses."""

import functools
from collections.abc import Callable

import numpy as np

from aliked.evaluation.auc import error_auc
from aliked.evaluation.pose_estimators import INLIER_PX
from aliked.evaluation.pose_measure import CORRECT_PX, EPIPOLAR_PX
from aliked.evaluation.scores import Kind, Score

DEGREES = (5, 10, 20)
MMA_PX = 3
MMA_INDEX = CORRECT_PX.index(MMA_PX)
CURVE_DEGREES = (1, 2, 3, 5, 7, 10, 15, 20)


def share(part: Callable[[dict], float | None]) -> Callable[[dict], float]:
    """A fraction of a pair's matches; 0 where there are none, NaN where the part is not known."""

    def fraction(row: dict) -> float:
        value = part(row)
        return np.nan if value is None else value / max(row["matches"], 1)

    return fraction


def infinite_if_none(error: float | None) -> float:
    """An error of a record; a failure is None there."""
    return np.inf if error is None else error


def errors_of(row: dict, estimator: str = "opencv") -> tuple[float, ...]:
    """A pair's error in every repeat, degrees; all infinite where the estimator is missing."""
    missing = [None] * len(row["errors"]["opencv"])
    return tuple(map(infinite_if_none, row["errors"].get(estimator, missing)))


def median_of(name: str) -> Score:
    """One part of the error, degrees."""
    return Score(name, lambda row: infinite_if_none(row[name]), np.median, percent=False, digits=2)


def auc_at(threshold: float, estimator: str = "opencv", label: str = "") -> Score:
    """Area under the share of pairs over their angular error."""
    return Score(
        f"AUC@{threshold}{label}",
        functools.partial(errors_of, estimator=estimator),
        lambda errors: error_auc(errors.ravel(), threshold),
    )


def accuracy_at(threshold: float) -> Score:
    """Pairs whose angular error is at most this."""
    return Score(
        f"accuracy@{threshold}", lambda row: np.mean(np.less_equal(errors_of(row), threshold))
    )


KIND = Kind(
    scores=(
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("inliers", share(lambda row: row["inliers"])),
        Score(f"epipolar@{EPIPOLAR_PX}", share(lambda row: row["epipolar"])),
        Score(f"MMA@{MMA_PX}", share(lambda row: row["correct"] and row["correct"][MMA_INDEX])),
        median_of("rotation"),
        median_of("direction"),
        *map(auc_at, DEGREES),
        auc_at(10, "poselib", " PoseLib"),
    ),
    compared=("epipolar@1", "MMA@3", "AUC@5", "AUC@10", "AUC@20", "AUC@10 PoseLib"),
    headline="AUC@10",
    badness=lambda row: float(np.median(errors_of(row))),
    curve=tuple(map(accuracy_at, CURVE_DEGREES)),
    notes=(
        "Mutual nearest neighbours, no limit of similarity. Error of a pose: the larger of the "
        "angles by which rotation and direction of translation are off; AUC@t: area under the "
        "share of pairs over that error, up to t degrees. Poses by OpenCV's MAGSAC++ and by "
        f"PoseLib, {INLIER_PX:g} px, several times each with other random numbers. inliers: "
        f"share of the matches that OpenCV's pose agrees with. epipolar@{EPIPOLAR_PX}: share "
        f"within {EPIPOLAR_PX} px of the true epipolar line. MMA@{MMA_PX}: share within {MMA_PX} "
        "px of where the second image shows the point, where depth is known. rotation, direction: "
        "median errors of OpenCV's poses in degrees. All else but the matches in %; a pair without "
        "a pose counts as a failure."
    ),
)
