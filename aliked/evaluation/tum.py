"""Image sequences with poses in the format of the TUM RGB-D benchmark.

A trajectory has a line `timestamp tx ty tz qx qy qz qw` per pose, camera to world, seconds and
metres. Images are named by their timestamps, or listed in `rgb.txt` as `timestamp file`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from aliked.errors import InputError
from aliked.evaluation.images import Image
from aliked.evaluation.pose_data import Motion, PoseData, View, posed_pair
from aliked.evaluation.pose_text import read_lines, read_numbers
from aliked.images import list_images, load_image

TRAJECTORY, IMAGE_LIST, IMAGE_FOLDER = "groundtruth.txt", "rgb.txt", "rgb"
POSE_LINE = "`timestamp tx ty tz qx qy qz qw`"
IMAGE_LINE = "`timestamp file`"
INTRINSICS = "`fx fy cx cy`"


@dataclass(frozen=True)
class Choice:
    """Which pairs of a sequence are evaluated."""

    stride: int = 10  # frames between the images of a pair
    tolerance: float = 0.02  # seconds between an image and its pose
    min_baseline: float = 0.05  # metres: below, the direction of the motion is not known well


def tum_data(folder: Path, intrinsics: np.ndarray, choice: Choice) -> PoseData:
    """The pairs of a sequence; `intrinsics` [3, 3] hold for all images, which are undistorted.

    `InputError` where a file is missing or damaged, or no pair is left.
    """
    folder = Path(folder)
    stamps, poses = read_trajectory(folder / TRAJECTORY)
    images = timed_images(folder)
    nearest = associate(np.array([stamp for stamp, _ in images]), stamps, choice.tolerance)
    views = [
        View(Image(path.name, partial(load_image, path)), intrinsics, poses[index])
        for (_, path), index in zip(images, nearest, strict=True)
        if index >= 0
    ]
    motions = [Motion(a, b) for a, b in zip(views, views[choice.stride :], strict=False)]
    pairs = [
        posed_pair(
            f"{motion.first.image.name} - {motion.second.image.name}",
            f"{choice.stride} frames apart",
            motion,
        )
        for motion in motions
        if np.linalg.norm(motion.relative_pose[:3, 3]) >= choice.min_baseline
    ]
    if not pairs:
        raise InputError(
            f"{folder}: {len(views)} of {len(images)} images have a pose within "
            f"{choice.tolerance} s, and no two of them, {choice.stride} frames apart, are "
            f"{choice.min_baseline} m apart; check the timestamps, or change --tolerance, "
            "--stride or --min_baseline"
        )
    return PoseData(folder.name, pairs, vars(choice) | {"intrinsics": intrinsics.tolist()})


def read_trajectory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Timestamps [N], ascending, and world-to-camera poses [N, 4, 4] of a trajectory file.

    `InputError` names a line that is no pose.
    """
    rows = [
        (number, read_numbers(path, number, words, 8, POSE_LINE))
        for number, words in read_lines(path)
    ]
    for number, row in rows:
        if np.linalg.norm(row[4:]) < 0.5:
            raise InputError(
                f"line {number} of {path} has a quaternion of length "
                f"{np.linalg.norm(row[4:]):.2g}, not 1; replace or remove the line"
            )
    values = np.array([row for _, row in rows])
    values = values[np.argsort(values[:, 0], kind="stable")]
    return values[:, 0], np.array([world_to_camera(row) for row in values[:, 1:]])


def world_to_camera(row: np.ndarray) -> np.ndarray:
    """[4, 4] from tx ty tz qx qy qz qw, which are camera to world."""
    x, y, z, w = row[3:] / np.linalg.norm(row[3:])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation.T, -rotation.T @ row[:3]
    return pose


def associate(wanted: np.ndarray, stamps: np.ndarray, tolerance: float) -> np.ndarray:
    """Index of the nearest of the ascending `stamps` [N] for every wanted one [M]; [M].

    -1 where the nearest is more than `tolerance` seconds away.
    """
    after = np.clip(np.searchsorted(stamps, wanted), 1, max(len(stamps) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(stamps) - 1)
    nearer = np.abs(stamps[before] - wanted) <= np.abs(stamps[after] - wanted)
    nearest = np.where(nearer, before, after)
    return np.where(np.abs(stamps[nearest] - wanted) <= tolerance, nearest, -1)


def timed_images(folder: Path) -> list[tuple[float, Path]]:
    """The images of a sequence with their timestamps in seconds, ascending."""
    listing = folder / IMAGE_LIST
    if listing.is_file():
        images = []
        for number, words in read_lines(listing):
            (stamp,) = read_numbers(listing, number, words[:1], 1, IMAGE_LINE)
            images.append((stamp, folder / " ".join(words[1:])))
        return sorted(images)
    subfolder = folder / IMAGE_FOLDER
    paths = list_images(subfolder if subfolder.is_dir() else folder)
    return sorted((_stamp(path), path) for path in paths)


def read_intrinsics(words: list[str]) -> np.ndarray:
    """Intrinsics [3, 3] from `fx fy cx cy`, or from the name of a file that has these.

    Pixels, the centre of the top-left one is (0, 0). `InputError` where they are something else.
    """
    if len(words) == 1:
        path = Path(words[0])
        lines = list(read_lines(path))
        if len(lines) != 1:
            raise InputError(f"{path} has {len(lines)} lines; give one with {INTRINSICS}")
        (number, words), where = lines[0], path
    else:
        number, where = 1, "--intrinsics"
    fx, fy, cx, cy = read_numbers(where, number, words, 4, INTRINSICS)
    if min(fx, fy) <= 0:
        raise InputError(
            f"{where} has a focal length of {min(fx, fy)}; give {INTRINSICS} in pixels"
        )
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _stamp(path: Path) -> float:
    try:
        return float(path.stem)
    except ValueError as error:
        raise InputError(
            f"{path} is not named by its timestamp; rename it, or list the images in "
            f"{IMAGE_LIST} as {IMAGE_LINE}"
        ) from error
