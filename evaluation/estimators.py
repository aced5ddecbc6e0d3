"""Geometry from matches with wrong ones among them: OpenCV's USAC and PoseLib's LO-RANSAC.

Homographies, relative poses and fundamental matrices share one set of settings. The same seed
gives the same answer.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

ITERATIONS = 10000  # at most
CONFIDENCE = 0.9999
HOMOGRAPHY_PX = 3.0  # reprojection error of an inlier
EPIPOLAR_PX = 1.0  # distance of an inlier from its epipolar line
HOMOGRAPHY_MATCHES = 4  # of the minimal solvers
POSE_MATCHES = 5
FUNDAMENTAL_MATCHES = 8  # 7, with one to spare that can disagree


@dataclass(frozen=True)
class RelativePose:
    """Second camera relative to the first: X1 = rotation @ X0 + translation."""

    rotation: np.ndarray  # [3, 3]
    translation: np.ndarray  # [3], of arbitrary length
    inliers: np.ndarray  # [P] bool


# Points [P, 2] of either image in pixels and a seed, to the 3x3 matrix or None.
EstimateHomography = Callable[[np.ndarray, np.ndarray, int], np.ndarray | None]
# Points [P, 2] of either image in pixels, intrinsics [3, 3] of either camera, and a seed.
EstimatePose = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], RelativePose | None]


def usac(threshold: float, seed: int, score: int, local: int) -> cv2.UsacParams:
    """OpenCV's settings; `threshold` in pixels, `score` and `local` optimisation by its names."""
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence = threshold, CONFIDENCE
    settings.maxIterations = ITERATIONS
    settings.sampler = cv2.SAMPLING_UNIFORM
    settings.score, settings.loMethod = score, local
    settings.isParallel = False  # else the answer depends on the threads
    settings.randomGeneratorState = seed
    return settings


def magsac(seed: int) -> cv2.UsacParams:
    """MAGSAC++ (arXiv 1912.05909) with local optimisation, for epipolar geometry."""
    return usac(EPIPOLAR_PX, seed, cv2.SCORE_METHOD_MAGSAC, cv2.LOCAL_OPTIM_SIGMA)


def lo_ransac(seed: int, **threshold: float) -> dict:
    """PoseLib's settings; the name of the `threshold` in pixels depends on what is estimated."""
    return {"max_iterations": ITERATIONS, "success_prob": CONFIDENCE, "seed": seed} | threshold


def homography_by_opencv(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """MSAC scores with local optimisation: points [P, 2] to the 3x3 matrix, or None."""
    if len(points0) < HOMOGRAPHY_MATCHES:
        return None
    settings = usac(HOMOGRAPHY_PX, seed, cv2.SCORE_METHOD_MSAC, cv2.LOCAL_OPTIM_INNER_AND_ITER_LO)
    found, _ = cv2.findHomography(points0, points1, settings)
    return found


def homography_by_poselib(points0: np.ndarray, points1: np.ndarray, seed: int) -> np.ndarray | None:
    """LO-RANSAC: points [P, 2] to the 3x3 matrix, or None."""
    import poselib

    if len(points0) < HOMOGRAPHY_MATCHES:
        return None
    found, facts = poselib.estimate_homography(
        points0.astype(np.float64),
        points1.astype(np.float64),
        lo_ransac(seed, max_reproj_error=HOMOGRAPHY_PX),
        {},
    )
    return found if facts["num_inliers"] >= HOMOGRAPHY_MATCHES else None


def pose_by_opencv(
    points0: np.ndarray,
    points1: np.ndarray,
    intrinsics0: np.ndarray,
    intrinsics1: np.ndarray,
    seed: int,
) -> RelativePose | None:
    """MAGSAC++: points [P, 2] and intrinsics [3, 3] of both to the pose, or None."""
    if len(points0) < POSE_MATCHES:
        return None
    points0, points1 = points0.astype(np.float64), points1.astype(np.float64)
    essential, inliers = cv2.findEssentialMat(
        points0, points1, intrinsics0, intrinsics1, None, None, magsac(seed)
    )
    if essential is None or essential.shape != (3, 3) or inliers.sum() < POSE_MATCHES:
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
    """LO-RANSAC with a final refinement: as `pose_by_opencv`."""
    import poselib

    if len(points0) < POSE_MATCHES:
        return None
    pose, facts = poselib.estimate_relative_pose(
        points0.astype(np.float64),
        points1.astype(np.float64),
        poselib_camera(intrinsics0),
        poselib_camera(intrinsics1),
        lo_ransac(seed, max_epipolar_error=EPIPOLAR_PX),
        {},
    )
    inliers = np.array(facts["inliers"], bool)
    return RelativePose(pose.R, pose.t, inliers) if inliers.sum() >= POSE_MATCHES else None


def epipolar_inliers(
    points0: np.ndarray, points1: np.ndarray, intrinsics: np.ndarray | None, seed: int
) -> np.ndarray:
    """Which matches agree on an epipolar geometry, [P] bool; none where there is none.

    That of a fundamental matrix, or of an essential one where the `intrinsics` [3, 3] of both
    images are known.
    """
    nothing = np.zeros(len(points0), bool)
    if intrinsics is not None:
        pose = pose_by_opencv(points0, points1, intrinsics, intrinsics, seed)
        return nothing if pose is None else pose.inliers
    if len(points0) < FUNDAMENTAL_MATCHES:
        return nothing
    matrix, inliers = cv2.findFundamentalMat(points0, points1, magsac(seed))
    return nothing if matrix is None else inliers[:, 0] > 0


def homography_estimators() -> dict[str, EstimateHomography]:
    """The installed estimators of homographies, by name."""
    return {"opencv": homography_by_opencv} | _with_poselib(homography_by_poselib)


def pose_estimators() -> dict[str, EstimatePose]:
    """The installed estimators of relative poses, by name."""
    return {"opencv": pose_by_opencv} | _with_poselib(pose_by_poselib)


def _with_poselib(estimate: Callable) -> dict[str, Callable]:
    return {"poselib": estimate} if importlib.util.find_spec("poselib") else {}


def normalized(points: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Pixels [P, 2] on the image plane at distance 1, as if the intrinsics were the identity."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return (homogeneous @ np.linalg.inv(intrinsics).T)[:, :2]


def poselib_camera(intrinsics: np.ndarray) -> dict:
    """The camera as PoseLib takes it; the size of the image does not matter to it."""
    focal_and_centre = intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    return {"model": "PINHOLE", "width": 1, "height": 1, "params": focal_and_centre.tolist()}
