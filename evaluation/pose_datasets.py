"""Pairs with known relative pose: rendered scenes, sequences in TUM's format, MegaDepth-1500."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from aliked.errors import InputError
from aliked.files import read_file
from aliked.images import list_images, load_image
from evaluation.pairs import Dataset, Image, Pair, Resize
from evaluation.scene import Scene, check_relative, checked_intrinsics, checked_pose, read_scene


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers, from 1, and words of a text file; empty lines and `#` comments left out."""
    try:
        lines = read_file(Path(path)).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path} ({error}); give a text file") from error
    split = ((number, line.split("#")[0].split()) for number, line in enumerate(lines, 1))
    found = [(number, words) for number, words in split if words]
    if not found:
        raise InputError(f"{path} has no line that is not a comment; replace it")
    return found


def read_numbers(
    path: Path | str, number: int, words: list[str], count: int, meaning: str
) -> np.ndarray:
    """The `count` finite numbers of a line; `InputError` says what the line should be."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        values = np.array([np.nan])
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"line {number} of {path} is not {meaning}: {' '.join(words)[:60]!r}")
    return values


@dataclass(frozen=True, eq=False)
class View:
    """An image with its camera."""

    image: Image
    intrinsics: np.ndarray  # [3, 3] pixels before resizing, centre of the top-left one = (0, 0)
    pose: np.ndarray  # [4, 4] world to camera

    @property
    def loaded_intrinsics(self) -> np.ndarray:
        """[3, 3] in pixels of the image as features are extracted from it."""
        return self.image.to_loaded @ self.intrinsics


@dataclass(frozen=True, eq=False)
class Motion:
    """What is known of a pair."""

    first: View
    second: View
    # From pixels [N, 2] of the first view to where they are in the second, NaN where they are
    # hidden there. Known where depth is.
    project: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def relative_pose(self) -> np.ndarray:
        """[4, 4] first camera to second camera."""
        return self.second.pose @ np.linalg.inv(self.first.pose)

    @property
    def intrinsics(self) -> tuple[np.ndarray, np.ndarray]:
        """[3, 3] of both images as features are extracted from them."""
        return self.first.loaded_intrinsics, self.second.loaded_intrinsics


def posed_pair(name: str, group: str, motion: Motion) -> Pair:
    """A pair of views."""
    return Pair(name, group, motion.first.image, motion.second.image, motion)


OVERLAPS = (0.2, 0.4, 0.6, 0.95)  # limits of the groups


def scene_data(folder: Path) -> Dataset:
    """The pairs of the scene in `folder`, in groups of similar overlap."""
    scene = read_scene(folder)
    if not scene.pairs:
        raise InputError(f"{scene.folder} has no pair of views; render a scene with more of them")
    views = [
        View(Image(name, partial(load_image, scene.folder / name)), scene.intrinsics, pose)
        for name, pose in zip(scene.names, scene.poses, strict=True)
    ]
    return Dataset(
        scene.folder.name,
        [
            posed_pair(
                f"{Path(scene.names[first]).stem}-{Path(scene.names[second]).stem}",
                group(scene, first, second),
                Motion(views[first], views[second], partial(scene.project, first, second)),
            )
            for first, second in scene.pairs
        ],
    )


def group(scene: Scene, first: int, second: int) -> str:
    """How much two views overlap, in words."""
    index = int(np.searchsorted(OVERLAPS[1:-1], scene.overlap(first, second), side="right"))
    return f"overlap {OVERLAPS[index]:.0%} to {OVERLAPS[index + 1]:.0%}".replace("%", " %")


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


def tum_data(folder: Path, intrinsics: np.ndarray, choice: Choice) -> Dataset:
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
    return Dataset(folder.name, pairs, asdict(choice) | {"intrinsics": intrinsics.tolist()})


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
            name = " ".join(words[1:])
            check_relative(f"line {number} of {listing}", name)
            images.append((stamp, folder / name))
        _refuse_twice(listing, [path for _, path in images])
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
    return checked_intrinsics(str(where), np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]))


def _stamp(path: Path) -> float:
    try:
        stamp = float(path.stem)
    except ValueError:
        stamp = np.nan
    if not np.isfinite(stamp):
        raise InputError(
            f"{path} is not named by its timestamp; rename it, or list the images in "
            f"{IMAGE_LIST} as {IMAGE_LINE}"
        )
    return stamp


def _refuse_twice(listing: Path, paths: list[Path]) -> None:
    """`InputError` where an image is listed twice: one place of the camera would be another's."""
    twice = [path.name for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise InputError(f"{listing} lists {twice[0]} twice; remove one of the lines")


Photographs = Callable[[str], Image]

NAME = "MegaDepth-1500"
RESIZE = Resize("long", 1600)
PAIRS = 1500
PAIR_LIST = "pairs_calibrated.txt"
PICKLED = ("Undistorted_SfM", "scene_info", "megadepth_test_1500_scene_info")  # LoFTR's layout
PAIR_LINE = (
    "two names, two intrinsics of 9 numbers, then a rotation of 9 and a translation of 3, or a 4x4 "
    "matrix"
)
CURE = (
    "MegaDepth-1500 is megadepth1500.zip of https://cvg-data.inf.ethz.ch/megadepth, with "
    f"{PAIR_LIST} and images/"
)


def is_megadepth(folder: Path) -> bool:
    """Whether a folder has any part of the data set."""
    names = (PAIR_LIST, *PICKLED)
    return any((folder / name).exists() for name in names) or any(folder.glob("00??_0.*.npz"))


def megadepth_data(folder: Path) -> Dataset:
    """The pairs of the data set in `folder`; `InputError` where a part of it is missing."""
    folder = Path(folder)
    if not (folder / PAIR_LIST).is_file():
        raise InputError(
            f"{folder} has no {PAIR_LIST}; LoFTR's lists are pickled Python objects, which are not "
            f"read here: docs/evaluation.md says how to convert them, or else {CURE}"
        )

    @cache  # one object per photograph, so that it is decoded and hashed once
    def photograph(name: str) -> Image:
        return Image(name, partial(load_image, folder / name), RESIZE)

    pairs = _listed_pairs(folder / PAIR_LIST, photograph)
    if len(pairs) != PAIRS:
        raise InputError(f"{folder} lists {len(pairs)} pairs, not {PAIRS}; fetch it again: {CURE}")
    data = Dataset(NAME, pairs, {"resize": str(RESIZE)})
    missing = [image.name for image in data.images if not (folder / image.name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(data.images)} photographs, such as "
            f"{missing[0]}; fetch it again: {CURE}"
        )
    return data


def from_colmap(intrinsics: np.ndarray) -> np.ndarray:
    """Intrinsics [3, 3] with (0, 0) at the image's corner, moved to its first pixel's centre."""
    shift = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    return intrinsics - shift


def _listed_pairs(path: Path, photograph: Photographs) -> list[Pair]:
    """The pairs of a list in Glue Factory's layout; `InputError` names a line that is none."""
    pairs = []
    for number, words in read_lines(path):
        matrix = len(words) == 2 + 18 + 16
        values = read_numbers(path, number, words[2:], 34 if matrix else 30, PAIR_LINE)
        pose = np.eye(4)
        if matrix:
            pose = values[18:].reshape(4, 4)
        else:
            pose[:3, :3], pose[:3, 3] = values[18:27].reshape(3, 3), values[27:]
        where = f"line {number} of {path}"
        for name in words[:2]:
            check_relative(where, name)
        if words[0] == words[1]:
            raise InputError(f"{where} pairs {words[0]} with itself; remove the line")
        first, second = (
            View(photograph(f"images/{name}"), from_colmap(checked_intrinsics(where, matrix)), pose)
            for name, matrix, pose in zip(
                words[:2],
                values[:18].reshape(2, 3, 3),
                (np.eye(4), checked_pose(where, pose)),
                strict=True,
            )
        )
        group = words[0].split("/")[0]
        pairs.append(posed_pair(" - ".join(words[:2]), group, Motion(first, second)))
    return pairs
