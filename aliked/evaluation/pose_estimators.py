"""Relative pose of two calibrated cameras from matches with wrong ones among them, by libraries."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

MIN_MATCHES = 5  # of the minimal solver
INLIER_PX = 1.0  # largest distance of an inlier from its epipolar line
CONFIDENCE = 0.9999
ITERATIONS = 10000  # at most


@dataclass(frozen=True)
class RelativePose:
    """Second camera relative to the first: X1 = rotation @ X0 + translation."""

    rotation: np.ndarray  # [3, 3]
    translation: np.ndarray  # [3], of arbitrary length
    inliers: np.ndarray  # [N] bool


# Points [P, 2] of either image in pixels, intrinsics [3, 3] of either camera, and a seed.
Estimate = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], RelativePose | None]


def by_opencv(
    points0: np.ndarray,
    points1: np.ndarray,
    intrinsics0: np.ndarray,
    intrinsics1: np.ndarray,
    seed: int,
) -> RelativePose | None:
    """MAGSAC++ (arXiv 1912.05909) with local optimisation; None where no pose is found."""
    if len(points0) < MIN_MATCHES:
        return None
    settings = magsac(INLIER_PX, seed)
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    essential, inliers = cv2.findEssentialMat(
        points0, points1, intrinsics0, intrinsics1, None, None, settings
    )
    if essential is None or essential.shape != (3, 3) or inliers.sum() < MIN_MATCHES:
        return None
    # The one of the matrix's four poses with the most points before both cameras, however far.
    _, rotation, translation, before, _ = cv2.recoverPose(
        essential,
        normalized(points0, intrinsics0),
        normalized(points1, intrinsics1),
        np.eye(3),
        distanceThresh=np.inf,
        mask=inliers,
    )
    return RelativePose(rotation, translation[:, 0], before[:, 0] > 0)


def by_poselib(
    points0: np.ndarray,
    points1: np.ndarray,
    intrinsics0: np.ndarray,
    intrinsics1: np.ndarray,
    seed: int,
) -> RelativePose | None:
    """LO-RANSAC with a final refinement; None where no pose is found."""
    import poselib

    if len(points0) < MIN_MATCHES:
        return None
    settings = {
        "max_epipolar_error": INLIER_PX,
        "max_iterations": ITERATIONS,
        "success_prob": CONFIDENCE,
        "seed": seed,
    }
    pose, facts = poselib.estimate_relative_pose(
        points0.astype(np.float64),
        points1.astype(np.float64),
        poselib_camera(intrinsics0),
        poselib_camera(intrinsics1),
        settings,
        {},
    )
    inliers = np.array(facts["inliers"], bool)
    return RelativePose(pose.R, pose.t, inliers) if inliers.sum() >= MIN_MATCHES else None


def estimators() -> dict[str, Estimate]:
    """Those that are installed, by name."""
    found: dict[str, Estimate] = {"opencv": by_opencv}
    if importlib.util.find_spec("poselib"):
        found["poselib"] = by_poselib
    return found


def magsac(threshold: float, seed: int) -> cv2.UsacParams:
    """OpenCV's settings for MAGSAC++, `threshold` in pixels; the same seed, the same result."""
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence = threshold, CONFIDENCE
    settings.maxIterations = ITERATIONS
    settings.sampler = cv2.SAMPLING_UNIFORM
    settings.score, settings.loMethod = cv2.SCORE_METHOD_MAGSAC, cv2.LOCAL_OPTIM_SIGMA
    settings.isParallel = False  # else the answer depends on the threads
    settings.randomGeneratorState = seed
    return settings


def normalized(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels [P, 2] on the image plane at distance 1, as if the intrinsics were the identity."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return (homogeneous @ np.linalg.inv(intrinsics).T)[:, :2]


def poselib_camera(intrinsics: np.ndarray) -> dict:
    """The camera as PoseLib takes it; the size of the image does not matter to it."""
    focal_and_centre = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    return {"model": "PINHOLE", "width": 1, "height": 1, "params": focal_and_centre.tolist()}
