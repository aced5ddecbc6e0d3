"""Relative poses: how far an estimated one is from the true one, and what matches are worth."""

import argparse
import zlib
from pathlib import Path
from typing import Annotated, Required, TypedDict

import msgspec
import numpy as np

from aliked.cli import number, positive, whole
from aliked.errors import InputError
from aliked.features import Features
from evaluation import pose_datasets, scene
from evaluation.estimators import EPIPOLAR_PX, RelativePose, pose_estimators
from evaluation.pairs import Dataset, Pair
from evaluation.pose_datasets import (
    Choice,
    Motion,
    is_megadepth,
    megadepth_data,
    read_intrinsics,
    scene_data,
    tum_data,
)
from evaluation.task import Count, Error, Row, Score, Task, auc_score


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


SEED_LIMIT = 2**31  # what both libraries take


def add_repeats_option(parser: argparse.ArgumentParser) -> None:
    """Add how often to estimate."""
    parser.add_argument(
        "--repeats",
        type=whole(1),
        default=5,
        metavar="N",
        help="robust estimations of each pair, all of them counted: their random numbers change "
        "more than precision does (default: %(default)s)",
    )


def seeds_of(name: str, seed: int, repeats: int) -> list[int]:
    """A seed for every repeat of a pair.

    Every pair has its own: with the same random numbers for all of them a lucky seed is lucky in
    many pairs at once, which no interval over the pairs accounts for.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return random.integers(0, SEED_LIMIT, repeats).tolist()


DEGREES = (5, 10, 20)
CORRECT_PX = (1, 3, 5)  # of a match that is correct, where depth is known
RIGHT_PX = 3  # of a match that is drawn as a right one
MMA_PX = 3
MMA_INDEX = CORRECT_PX.index(MMA_PX)
CURVE_DEGREES = (1, 2, 3, 5, 7, 10, 15, 20)


def fraction(row: dict, part: float | None) -> float:
    """A part of a pair's matches; 0 where there are none, NaN where the part is not known."""
    return np.nan if part is None else part / max(row["matches"], 1)


def infinite_if_none(error: float | None) -> float:
    """An error of a record; a failure is None there."""
    return np.inf if error is None else error


def errors_of(row: dict, estimator: str = "opencv") -> tuple[float, ...]:
    """A pair's error in every repeat, degrees: infinite without a pose, NaN without estimator."""
    repeats = len(row["errors"]["opencv"])
    return tuple(map(infinite_if_none, row["errors"].get(estimator, [np.nan] * repeats)))


def median_of(name: str) -> Score:
    """The column of one part of the error, degrees."""
    return Score(name, lambda row: infinite_if_none(row[name]), np.median, percent=False, digits=2)


def accuracy_at(threshold: float) -> Score:
    """The column of pairs whose angular error is at most this."""
    return Score(
        f"accuracy@{threshold}", lambda row: np.mean(np.less_equal(errors_of(row), threshold))
    )


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


class PoseErrors(TypedDict, total=False):
    """The errors of every repeat, degrees."""

    opencv: Required[Annotated[list[Error], msgspec.Meta(min_length=1)]]
    poselib: Annotated[list[Error], msgspec.Meta(min_length=1)]


class PoseRow(Row):
    """What `Pose.measure` finds of a pair."""

    epipolar: Count
    correct: (
        Annotated[list[Count], msgspec.Meta(min_length=len(CORRECT_PX), max_length=len(CORRECT_PX))]
        | None
    )
    inliers: Annotated[float, msgspec.Meta(ge=0)]
    rotation: Error
    direction: Error
    errors: PoseErrors


class Pose(Task):
    """Pairs whose truth is a `Motion`."""

    name = "pose"
    row = PoseRow
    help = "pairs with known relative pose"
    scores = (
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("inliers", lambda row: fraction(row, row["inliers"])),
        Score(f"epipolar@{EPIPOLAR_PX:g}", lambda row: fraction(row, row["epipolar"])),
        Score(
            f"MMA@{MMA_PX}", lambda row: fraction(row, row["correct"] and row["correct"][MMA_INDEX])
        ),
        median_of("rotation"),
        median_of("direction"),
        *(auc_score(t, errors_of) for t in DEGREES),
        auc_score(10, lambda row: errors_of(row, "poselib"), " PoseLib"),
    )
    compared = ("epipolar@1", "MMA@3", "AUC@5", "AUC@10", "AUC@20", "AUC@10 PoseLib")
    headline = "AUC@10"
    curve = tuple(map(accuracy_at, CURVE_DEGREES))
    curve_unit = "degrees"
    notes = (
        "Mutual nearest neighbours, no limit of similarity, unless another matcher is named. "
        "Error of a pose: the larger of the "
        "angles by which rotation and direction of translation are off; AUC@t: area under the "
        "share of pairs over that error, up to t degrees. Poses by OpenCV's MAGSAC++ and by "
        f"PoseLib, {EPIPOLAR_PX:g} px, several times each with other random numbers. inliers: "
        f"share of the matches that OpenCV's pose agrees with. epipolar@{EPIPOLAR_PX:g}: share "
        f"within {EPIPOLAR_PX:g} px of the true epipolar line. MMA@{MMA_PX}: share within {MMA_PX} "
        "px of where the second image shows the point, where depth is known. rotation, direction: "
        "median errors of OpenCV's poses in degrees. All else but the matches in %; a pair without "
        "a pose counts as a failure."
    )

    def __init__(self, data: Dataset, seed: int, repeats: int) -> None:
        """`seed` decides the random numbers of all `repeats` estimations of a pair."""
        self.seed, self.repeats = seed, repeats
        parameters = {
            "pairs": len(data.pairs),
            "inlier_px": EPIPOLAR_PX,
            "repeats": repeats,
            "pose_estimators": list(pose_estimators()),
        }
        super().__init__(data, parameters)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the data, and how it is used."""
        parser.add_argument(
            "dataset",
            type=Path,
            metavar="DATASET",
            help="folder: assets/scene_640x480 (or any other with scene.json), MegaDepth-1500, or "
            "a sequence with groundtruth.txt in TUM format",
        )
        add_repeats_option(parser)
        group = parser.add_argument_group("sequences in TUM format")
        group.add_argument(
            "--intrinsics",
            nargs="+",
            metavar="NUMBER",
            help="FX FY CX CY in pixels, of undistorted images, or a file with these four",
        )
        group.add_argument(
            "--stride",
            type=whole(1),
            metavar="N",
            help=f"frames between the images of a pair (default: {Choice.stride})",
        )
        group.add_argument(
            "--tolerance",
            type=number(0),
            metavar="S",
            help=f"seconds between an image and its pose (default: {Choice.tolerance})",
        )
        group.add_argument(
            "--min_baseline",
            type=positive,
            metavar="M",
            help="metres between the images of a pair; below, the direction of the motion is not "
            f"known well (default: {Choice.min_baseline})",
        )

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Pose":
        """Return the task that the options ask for; `InputError` where the data is none."""
        return cls(load_data(args), args.seed, args.repeats)

    @staticmethod
    def badness(row: dict) -> float:
        """Return the median error, degrees."""
        return float(np.median(errors_of(row)))

    def measure(self, pair: Pair, first: Features, second: Features, matches: np.ndarray) -> dict:
        """Return what the features of both images are worth.

        `matches`, how many of them are `epipolar`, within 1 px of their true epipolar lines, and,
        where depth is known, how many are `correct` within 1, 3 and 5 px in the second image.
        Poses are estimated several times, with other random numbers: `errors` of each estimator,
        degrees, None where there is no pose; of OpenCV's the mean number of `inliers` and the
        median errors of `rotation` and of `direction` of translation.
        """
        motion: Motion = pair.truth
        points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
        seeds = seeds_of(pair.name, self.seed, self.repeats)
        poses = {
            name: [estimate(*points, *motion.intrinsics, own_seed) for own_seed in seeds]
            for name, estimate in pose_estimators().items()
        }
        off = {
            name: np.array([angles(pose, motion) for pose in own]) for name, own in poses.items()
        }
        off_line = epipolar_distance(points, motion.intrinsics, motion.relative_pose)
        rotation, direction = map(degrees, np.median(off["opencv"], axis=0))
        inliers = [pose.inliers.sum() if pose else 0 for pose in poses["opencv"]]
        return {
            "keypoints": [len(first), len(second)],
            "matches": len(matches),
            "epipolar": int((off_line <= EPIPOLAR_PX).sum()),
            "correct": correct(motion, points),
            "inliers": float(np.mean(inliers)),
            "rotation": rotation,
            "direction": direction,
            "errors": {name: [degrees(max(both)) for both in own] for name, own in off.items()},
        }

    def caption(self, row: dict) -> str:
        """The pair, how many matches its pose agrees with, and how far that is off."""
        return (
            f"{row['name']}: {row['inliers']:.0f} inliers of {row['matches']} matches, pose "
            f"{np.median(errors_of(row)):.1f} degrees off"
        )

    def right(
        self, pair: Pair, first: Features, second: Features, matches: np.ndarray
    ) -> np.ndarray:
        """Which matches agree with what is known, depth or else the pose, [P] bool."""
        return agree(pair.truth, (first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]))


def load_data(args: argparse.Namespace) -> Dataset:
    """The data set in a folder, whichever it is; `InputError` where it is none."""
    folder = args.dataset
    names = ("intrinsics", "stride", "tolerance", "min_baseline")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    of_scene = (folder / scene.FILE).is_file()
    if of_scene or is_megadepth(folder):
        if chosen:
            raise InputError(
                f"--{next(iter(chosen))} is for sequences in TUM's format, and {folder} is none; "
                "leave it out"
            )
        return scene_data(folder) if of_scene else megadepth_data(folder)
    if not (folder / pose_datasets.TRAJECTORY).is_file():
        raise InputError(
            f"{folder} has no {scene.FILE}, no {pose_datasets.TRAJECTORY} and no part of "
            f"MegaDepth-1500; give one of these. {pose_datasets.CURE}"
        )
    if "intrinsics" not in chosen:
        raise InputError(f"{folder} has no intrinsics; pass --intrinsics FX FY CX CY, in pixels")
    return tum_data(folder, read_intrinsics(chosen.pop("intrinsics")), Choice(**chosen))
