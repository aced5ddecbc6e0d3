"""Homographies from matches with wrong ones among them: OpenCV's USAC, and PoseLib's RANSAC."""

import importlib.util
from collections.abc import Callable

import cv2
import numpy as np

INLIER_PX = 3.0  # reprojection error of an inlier
ITERATIONS = 10000  # at most
CONFIDENCE = 0.9999
MIN_MATCHES = 4

Estimate = Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]


def by_opencv(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """USAC: MSAC scores, local optimisation. Points [P, 2]; the 3x3 matrix, or None."""
    if len(points0) < MIN_MATCHES:
        return None
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence = INLIER_PX, CONFIDENCE
    settings.maxIterations = ITERATIONS
    settings.sampler = cv2.SAMPLING_UNIFORM
    settings.score = cv2.SCORE_METHOD_MSAC
    settings.loMethod = cv2.LOCAL_OPTIM_INNER_AND_ITER_LO
    settings.isParallel = False  # else the answer depends on the threads
    settings.randomGeneratorState = seed
    found, _ = cv2.findHomography(points0, points1, settings)
    return found


def by_poselib(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """LO-RANSAC. Points [P, 2]; the 3x3 matrix, or None."""
    import poselib

    if len(points0) < MIN_MATCHES:
        return None
    settings = {
        "max_reproj_error": INLIER_PX,
        "max_iterations": ITERATIONS,
        "success_prob": CONFIDENCE,
        "seed": seed,
    }
    found, facts = poselib.estimate_homography(
        points0.astype(np.float64), points1.astype(np.float64), settings, {}
    )
    return found if facts["num_inliers"] >= MIN_MATCHES else None


def estimators() -> dict[str, Estimate]:
    """Those that are installed, by name."""
    found: dict[str, Estimate] = {"opencv": by_opencv}
    if importlib.util.find_spec("poselib"):
        found["poselib"] = by_poselib
    return found
