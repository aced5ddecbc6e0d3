"""How far an estimated relative pose is from the true one."""

import numpy as np


def rotation_error(estimated: np.ndarray, true: np.ndarray) -> float:
    """Angle of the rotation between two rotation matrices [3, 3], degrees, 0 to 180."""
    # From the chord |R - R'| = sqrt(8) sin(angle / 2): exact for small angles too, where the
    # arc cosine of the trace loses half of the digits.
    chord = np.linalg.norm(estimated - true) / np.sqrt(8)
    return float(np.degrees(2 * np.arcsin(min(chord, 1.0))))


def direction_error(estimated: np.ndarray, true: np.ndarray) -> float:
    """Angle between the lines along two translations [3], degrees, 0 to 90.

    The length of a translation cannot be seen in two images. As in the published numbers its sign
    does not count either: the opposite direction is an error of 0.
    """
    a, b = estimated / np.linalg.norm(estimated), true / np.linalg.norm(true)
    angle = np.arctan2(np.linalg.norm(np.cross(a, b)), abs(a @ b))
    return float(np.degrees(angle))


def epipolar_distance(
    points: tuple[np.ndarray, np.ndarray],
    intrinsics: tuple[np.ndarray, np.ndarray],
    relative_pose: np.ndarray,
) -> np.ndarray:
    """How far matches are from each other's epipolar line, pixels, of both images the more, [P].

    `points` [P, 2] pixels, `intrinsics` [3, 3] of both, `relative_pose` [4, 4] first to second.
    """
    x, y, z = relative_pose[:3, 3]
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    from_plane = [np.linalg.inv(matrix) for matrix in intrinsics]
    fundamental = from_plane[1].T @ cross @ relative_pose[:3, :3] @ from_plane[0]
    first, second = (np.concatenate([p, np.ones((len(p), 1))], axis=1) for p in points)
    lines = second @ fundamental, first @ fundamental.T  # in the first image, in the second
    residual = np.abs((second * lines[1]).sum(axis=1))
    return np.max([residual / np.hypot(line[:, 0], line[:, 1]) for line in lines], axis=0)
