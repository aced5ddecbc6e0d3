"""Homographies from matches with wrong ones among them: OpenCV's USAC, and PoseLib's RANSAC."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

HOMOGRAPHY_INLIER_PX = 3.0  # reprojection error of an inlier
ITERATIONS = 10000  # at most
CONFIDENCE = 0.9999
HOMOGRAPHY_MIN_MATCHES = 4

HomographyEstimate = Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]


def homography_by_opencv(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """USAC: MSAC scores, local optimisation. Points [P, 2]; the 3x3 matrix, or None."""
    if len(points0) < HOMOGRAPHY_MIN_MATCHES:
        return None
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence = HOMOGRAPHY_INLIER_PX, CONFIDENCE
    settings.maxIterations = ITERATIONS
    settings.sampler = cv2.SAMPLING_UNIFORM
    settings.score = cv2.SCORE_METHOD_MSAC
    settings.loMethod = cv2.LOCAL_OPTIM_INNER_AND_ITER_LO
    settings.isParallel = False  # else the answer depends on the threads
    settings.randomGeneratorState = seed
    found, _ = cv2.findHomography(points0, points1, settings)
    return found


def homography_by_poselib(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """LO-RANSAC. Points [P, 2]; the 3x3 matrix, or None."""
    import poselib

    if len(points0) < HOMOGRAPHY_MIN_MATCHES:
        return None
    settings = {
        "max_reproj_error": HOMOGRAPHY_INLIER_PX,
        "max_iterations": ITERATIONS,
        "success_prob": CONFIDENCE,
        "seed": seed,
    }
    found, facts = poselib.estimate_homography(
        points0.astype(np.float64), points1.astype(np.float64), settings, {}
    )
    return found if facts["num_inliers"] >= HOMOGRAPHY_MIN_MATCHES else None


def homography_estimators() -> dict[str, HomographyEstimate]:
    """Those that are installed, by name."""
    found: dict[str, HomographyEstimate] = {"opencv": homography_by_opencv}
    if importlib.util.find_spec("poselib"):
        found["poselib"] = homography_by_poselib
    return found


POSE_MIN_MATCHES = 5  # of the minimal solver
POSE_INLIER_PX = 1.0  # largest distance of an inlier from its epipolar line


@dataclass(frozen=True)
class RelativePose:
    """Second camera relative to the first: X1 = rotation @ X0 + translation."""

    rotation: np.ndarray  # [3, 3]
    translation: np.ndarray  # [3], of arbitrary length
    inliers: np.ndarray  # [N] bool


# Points [P, 2] of either image in pixels, intrinsics [3, 3] of either camera, and a seed.
PoseEstimate = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], RelativePose | None]


def pose_by_opencv(
    points0: np.ndarray,
    points1: np.ndarray,
    intrinsics0: np.ndarray,
    intrinsics1: np.ndarray,
    seed: int,
) -> RelativePose | None:
    """MAGSAC++ (arXiv 1912.05909) with local optimisation; None where no pose is found."""
    if len(points0) < POSE_MIN_MATCHES:
        return None
    settings = magsac(POSE_INLIER_PX, seed)
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    essential, inliers = cv2.findEssentialMat(
        points0, points1, intrinsics0, intrinsics1, None, None, settings
    )
    if essential is None or essential.shape != (3, 3) or inliers.sum() < POSE_MIN_MATCHES:
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


def pose_by_poselib(
    points0: np.ndarray,
    points1: np.ndarray,
    intrinsics0: np.ndarray,
    intrinsics1: np.ndarray,
    seed: int,
) -> RelativePose | None:
    """LO-RANSAC with a final refinement; None where no pose is found."""
    import poselib

    if len(points0) < POSE_MIN_MATCHES:
        return None
    settings = {
        "max_epipolar_error": POSE_INLIER_PX,
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
    return RelativePose(pose.R, pose.t, inliers) if inliers.sum() >= POSE_MIN_MATCHES else None


def pose_estimators() -> dict[str, PoseEstimate]:
    """Those that are installed, by name."""
    found: dict[str, PoseEstimate] = {"opencv": pose_by_opencv}
    if importlib.util.find_spec("poselib"):
        found["poselib"] = pose_by_poselib
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
