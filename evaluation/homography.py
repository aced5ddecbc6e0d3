"""Homographies: pairs with a known one, HPatches' and our own, and what is measured on them."""

import argparse
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from tqdm import tqdm

from aliked.cli import whole
from aliked.drawing import draw_matches
from aliked.errors import InputError
from aliked.features import Features
from aliked.files import read_file
from aliked.hpatches import FOLDER, LARGE, missing_scenes
from aliked.images import SUFFIXES, list_images, load_image
from aliked.matching import mutual_nearest_keypoints
from evaluation.changes import CHANGES, LEVELS, change
from evaluation.estimators import HOMOGRAPHY_PX, homography_estimators
from evaluation.pairs import Dataset, Image, Pair, Resize
from evaluation.task import Count, Error, Row, Score, Task, auc_score

TRUTH = "homographies.txt"  # of a sequence
DOWNLOAD = "python download_data.py hpatches"
GROUPS = {"i": "illumination", "v": "viewpoint"}  # by the first letter of an HPatches scene


def load_dataset(folder: Path, resize: Resize | None, leave_out: Sequence[str] = ()) -> Dataset:
    """The pairs of a folder: a sequence, a folder of sequences, or scenes as HPatches has them.

    The truth of a pair is the homography, 3x3 float64, from the first image to the second, in
    pixels of their files, before any resizing.

    A sequence has `homographies.txt` beside its frames; its first and middle frames are also used
    with changes of known homography. `leave_out` are names of scenes. `InputError` where there
    is nothing of the kind, or something is missing.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one, or fetch HPatches: {DOWNLOAD}")
    name = folder.resolve().name
    sequences = [path for path in (folder, *_subfolders(folder)) if (path / TRUTH).is_file()]
    if sequences:
        return _dataset(name, _sequence_pairs(sequences, resize))
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    scenes = [path for path in _subfolders(folder) if any(path.glob("H_1_*"))]
    if not scenes:
        raise InputError(
            f"{folder} has neither {TRUTH} nor scenes with H_1_2 and so on; give a folder that "
            f"has, or fetch HPatches: {DOWNLOAD}"
        )
    _check_complete(folder)
    kept = [scene for scene in scenes if scene.name not in leave_out]
    return _dataset(name, [pair for scene in kept for pair in _scene_pairs(scene, resize)])


def _dataset(name: str, pairs: list[Pair]) -> Dataset:
    """The data set with the hash of its homographies, to six digits: others may differ."""
    values = " ".join(f"{value:.6g}" for pair in pairs for value in pair.truth.ravel())
    return Dataset(name, pairs, {"truth_sha256": hashlib.sha256(values.encode()).hexdigest()})


def read_homographies(path: Path, count: int | None = None) -> np.ndarray:
    """Read 3x3 matrices from a text file, row by row: [count, 3, 3] float64 (None: all).

    Lines that start with # are comments. `InputError` names the line that is wrong.
    """
    try:
        lines = read_file(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path} ({error}); fetch the data again") from error
    rows = [
        _row(path, number, line)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    wanted = f"{3 * count} rows" if count else "a multiple of 3 rows"
    if len(rows) % 3 or not rows or (count and len(rows) != 3 * count):
        raise InputError(
            f"{path} ends at line {len(lines)} with {len(rows)} rows of numbers, which should be "
            f"{wanted}; fetch the data again"
        )
    matrices = np.array(rows).reshape(-1, 3, 3)
    for number, matrix in enumerate(matrices, 1):
        if abs(np.linalg.det(matrix)) < 1e-12:
            raise InputError(f"matrix {number} of {path} is singular; fetch the data again")
    return matrices


def _row(path: Path, number: int, line: str) -> list[float]:
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = []
    if len(values) != 3 or not np.isfinite(values).all():
        raise InputError(
            f"line {number} of {path} is {line.strip()!r} where three numbers of a homography are "
            "expected; fetch the data again"
        )
    return values


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _image(path: Path, resize: Resize | None) -> Image:
    return Image(f"{path.parent.name}/{path.name}", functools.partial(load_image, path), resize)


def _sequence_pairs(folders: list[Path], resize: Resize | None) -> list[Pair]:
    """The first frame with every other one; the first and the middle one with all changes."""
    pairs, sources = [], []
    for folder in folders:
        frames = [_image(path, resize) for path in list_images(folder)]
        for frame, to_frame in zip(
            frames[1:], read_homographies(folder / TRUTH, len(frames))[1:], strict=True
        ):
            name = f"{frames[0].name} - {Path(frame.name).name}"
            pairs.append(Pair(name, "sequence", frames[0], frame, to_frame))
        sources += dict.fromkeys((frames[0], frames[len(frames) // 2]))
    return pairs + _changed_pairs(sources, resize)


def _changed_pairs(sources: list[Image], resize: Resize | None) -> list[Pair]:
    """Every image with every change of itself; the changed images are kept in memory."""
    orders = [(s, kind, level) for s in sources for kind in CHANGES for level in range(LEVELS)]

    def make(order: tuple[Image, str, int]) -> Pair:
        source, kind, level = order
        pixels, homography = change(source.read(), kind, level, seed=source.name)
        name = f"{source.name} - {kind} {level + 1}"
        return Pair(name, kind, source, Image(name, lambda: pixels, resize), homography)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(make, orders)
        return list(tqdm(made, "changes", len(orders), leave=False, disable=None, unit="image"))


def _scene_pairs(scene: Path, resize: Resize | None) -> Iterator[Pair]:
    """Image 1 of an HPatches scene with every other one."""
    truths = {path.name.removeprefix("H_1_"): path for path in scene.glob("H_1_*")}
    first = _image(_file(scene, "1"), resize)
    group = GROUPS.get(scene.name.partition("_")[0], "other")
    for number in sorted(truths, key=_natural):
        second = _image(_file(scene, number), resize)
        truth = read_homographies(truths[number], 1)[0]
        yield Pair(f"{scene.name} 1-{number}", group, first, second, truth)


def _file(scene: Path, stem: str) -> Path:
    """The image of this number."""
    found = [path for s in SUFFIXES if (path := scene / f"{stem}{s}").is_file()]
    if not found:
        raise InputError(
            f"{scene} has no image {stem} ({', '.join(SUFFIXES)}); fetch the data again, as "
            f"HPatches by `{DOWNLOAD}`"
        )
    return found[0]


def _natural(name: str) -> tuple[int, str]:
    return int(re.sub(r"\D", "", name) or 0), name


def _check_complete(folder: Path) -> None:
    """A folder of HPatches' own name must have all of its scenes."""
    missing = missing_scenes(folder) if folder.name == FOLDER else []
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of HPatches' scenes or parts of them, such as "
            f"{missing[0]}; run `{DOWNLOAD} --output {folder.parent}`, or rename the folder to use "
            "what is there"
        )


CORRECT_PX = 3  # of repeatability, matching score, and the picture of a pair
THRESHOLDS = range(1, 11)  # px, of the mean matching accuracy
CORNER_PX = (1, 3, 5)  # of the homography's accuracy
# Estimates with different seeds, of which the middle one counts: where two planes fit the matches
# nearly as well as each other, a single estimate is a toss of a coin.
ESTIMATES = 5
# How the field uses HPatches: the options that a setting stands for.
SETTINGS = {
    "5000": {"top_k": 0, "scores_th": 0.2, "n_limit": 5000, "short_side": None},
    "1024": {"top_k": 1024, "scores_th": None, "n_limit": None, "short_side": 480},
}


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [N, 2] through a 3x3 homography, [N, 2] float64; infinite where it says so."""
    mapped = np.c_[points, np.ones(len(points))] @ homography.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return mapped[:, :2] / mapped[:, 2:]


def homography_of(pair: Pair) -> np.ndarray:
    """The homography between a pair's images as features see them, after resizing."""
    return pair.second.to_loaded @ pair.truth @ np.linalg.inv(pair.first.to_loaded)


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points [N, 2] lie in an image of this width and height, from its corner at -0.5 on."""
    return ((points >= -0.5) & (points < np.array(size) - 0.5)).all(axis=1)


def match_distances(pair: Pair, first: Features, second: Features, matches: np.ndarray):
    """Pixels from where the homography puts the first keypoints of `matches` [P, 2] to the second.

    [P] float64.
    """
    there = project(homography_of(pair), first.keypoints[matches[:, 0]])
    return np.hypot(*(there - second.keypoints[matches[:, 1]]).T)


def median_error(
    estimates: Sequence[np.ndarray | None], truth: np.ndarray, size: tuple[int, int]
) -> float | None:
    """Median of the estimates' corner errors, pixels; None where most found no homography."""
    errors = [np.inf if h is None else corner_error(h, truth, size) for h in estimates]
    middle = float(np.median(errors))
    return middle if np.isfinite(middle) else None


def corner_error(found: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance of an image's corners through both homographies, pixels, or infinite."""
    right, bottom = size[0] - 1, size[1] - 1
    corners = np.array([[0, 0], [right, 0], [right, bottom], [0, bottom]])
    error = np.hypot(*(project(found, corners) - project(truth, corners)).T).mean()
    return float(error) if np.isfinite(error) else np.inf


def fraction(part: Callable[[dict], float], whole: Callable[[dict], float]) -> Callable:
    """The fraction of a pair's numbers that is `part`; 0 of nothing."""
    return lambda row: part(row) / whole(row) if whole(row) else 0.0


def error_of(row: dict, estimator: str = "opencv") -> float:
    """The corner error of a pair: infinite where none was found, NaN where none was looked for."""
    error = row["corner_error"].get(estimator, np.nan)
    return np.inf if error is None else error


def covisible(row: dict) -> float:
    """Keypoints that could be found again: the mean of both images."""
    return sum(row["covisible"]) / 2


def accuracy_at(threshold: float) -> Score:
    """The column of pairs whose corner error is at most this."""
    return Score(f"accuracy@{threshold}", lambda row: error_of(row) <= threshold)


CURVE = tuple(
    Score(f"MMA@{t}", fraction(lambda row, i=i: row["correct"][i], lambda row: row["matches"]))
    for i, t in enumerate(THRESHOLDS)
)


def apply_setting(args: argparse.Namespace) -> None:
    """Put what --setting stands for into the options; `InputError` where one was given as well."""
    values = SETTINGS[args.setting]
    given = [name for name in values if getattr(args, name) is not None]
    if given:
        raise InputError(
            f"--setting {args.setting} decides --{given[0]} itself; leave one of them out"
        )
    vars(args).update(values)


class HomographyRow(Row):
    """What `Homography.measure` finds of a pair."""

    covisible: Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]
    repeated: Count
    correct: Annotated[
        list[Count], msgspec.Meta(min_length=len(THRESHOLDS), max_length=len(THRESHOLDS))
    ]
    recalled: Count
    corner_error: dict[str, Error]


class Homography(Task):
    """Pairs whose truth is a 3x3 homography."""

    name = "homography"
    row = HomographyRow
    help = "images of planes with known homographies"
    scores = (
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("repeatability", fraction(lambda row: row["repeated"], covisible)),
        Score("matching score", fraction(lambda row: row["recalled"], covisible)),
        *(CURVE[t - 1] for t in CORNER_PX),
        *map(accuracy_at, CORNER_PX),
        *(auc_score(t, error_of) for t in CORNER_PX),
        auc_score(3, lambda row: error_of(row, "poselib"), " PoseLib"),
    )
    compared = ("repeatability", "MMA@3", "AUC@1", "AUC@3", "AUC@5", "AUC@3 PoseLib")
    headline = "AUC@3"
    badness_text = "corner error {:.1f} px"
    curve = CURVE
    notes = (
        "Mutual nearest neighbours, no limit of similarity, unless another matcher is named. "
        "Repeatability: keypoints found again "
        f"within {CORRECT_PX} px, of those that both images show. Matching score: correct matches "
        "of the same. MMA@t: share of the matches within t px, mean over the pairs. accuracy@t: "
        "pairs whose homography moves the image's corners by at most t px; AUC@t: area under that "
        "curve, computed as SuperGlue and glue-factory do. Homographies by OpenCV's USAC and by "
        f"PoseLib, {HOMOGRAPHY_PX:g} px; of {ESTIMATES} seeds the median error counts. All but the "
        "matches in %; a pair without a homography is a failure."
    )

    def __init__(self, dataset: Dataset, short_side: int | None, seed: int) -> None:
        """`seed` is that of the first estimate."""
        self.seed = seed
        parameters = {
            "short_side": short_side,
            "correct_px": CORRECT_PX,
            "inlier_px": HOMOGRAPHY_PX,
            "estimates": ESTIMATES,
            "homography_estimators": list(homography_estimators()),
        }
        super().__init__(dataset, parameters)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the data, and how it is used."""
        parser.add_argument(
            "dataset",
            type=Path,
            metavar="DATASET",
            help="folder: assets (or any with homographies.txt beside the frames), or HPatches' "
            "scenes",
        )
        parser.add_argument(
            "--setting",
            choices=SETTINGS,
            help="of HPatches without its 8 largest scenes: 5000 (at most this many keypoints with "
            "score > 0.2) or 1024 (this many, short side 480); in place of the options on "
            "keypoints and size",
        )
        parser.add_argument(
            "--short_side",
            type=whole(32),
            metavar="PX",
            help="resize images to this short side (default: as they are)",
        )

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Homography":
        """Return the task that the options ask for; `InputError` where the data is none."""
        if args.setting:
            apply_setting(args)
        resize = Resize("short", args.short_side) if args.short_side else None
        dataset = load_dataset(args.dataset, resize, LARGE if args.setting else ())
        return cls(dataset, args.short_side, args.seed)

    @staticmethod
    def badness(row: dict) -> float:
        """Return the corner error, pixels."""
        return error_of(row)

    def measure(self, pair: Pair, first: Features, second: Features, matches: np.ndarray) -> dict:
        """Return what the features of both images are worth.

        `covisible`: keypoints of each image that the other one shows. `repeated`: those of both
        that are each other's nearest, at most 3 px apart in the second image. `matches`, and how
        many of them are `correct` within 1 to 10 px in the second image; `recalled` are correct
        within 3 px and covisible. `corner_error`: how far the estimated homography puts the first
        image's corners from where they belong, mean of the four in pixels, median of five seeds,
        None where there is none.
        """
        truth = homography_of(pair)
        there = project(truth, first.keypoints)
        back = project(np.linalg.inv(truth), second.keypoints)
        seen = inside(there, pair.second.size), inside(back, pair.first.size)
        repeated, _, _ = mutual_nearest_keypoints(
            there[seen[0]], second.keypoints[seen[1]], CORRECT_PX
        )
        i, j = matches.T
        distance = match_distances(pair, first, second, matches)
        recalled = (distance <= CORRECT_PX) & seen[0][i] & seen[1][j]
        points = first.keypoints[i], second.keypoints[j]
        return {
            "keypoints": [len(first), len(second)],
            "covisible": [int(s.sum()) for s in seen],
            "repeated": len(repeated),
            "matches": len(i),
            "correct": [int((distance <= threshold).sum()) for threshold in THRESHOLDS],
            "recalled": int(recalled.sum()),
            "corner_error": {
                name: median_error(
                    [estimate(*points, self.seed + run) for run in range(ESTIMATES)],
                    truth,
                    pair.first.size,
                )
                for name, estimate in homography_estimators().items()
            },
        }

    def draw(
        self, pair: Pair, row: dict, first: Features, second: Features, matches: np.ndarray
    ) -> np.ndarray:
        """Return a pair's matches: correct ones green, wrong ones red."""
        distance = match_distances(pair, first, second, matches)
        return draw_matches(
            pair.first.load(),
            first,
            pair.second.load(),
            second,
            matches,
            f"{row['matches']} matches, {row['correct'][CORRECT_PX - 1]} within {CORRECT_PX} px",
            distance <= CORRECT_PX,
        )
