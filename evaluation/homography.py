"""Homographies: how well features find the known one between two images."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from aliked.cli import whole
from aliked.errors import InputError
from aliked.features import Features
from aliked.hpatches import LARGE
from aliked.matching import mutual_nearest_keypoints
from evaluation.estimators import HOMOGRAPHY_PX, homography_estimators
from evaluation.homography_datasets import load_dataset
from evaluation.pairs import Dataset, Pair, Resize
from evaluation.task import Count, Error, Row, Score, Task, auc_score

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

    def caption(self, row: dict) -> str:
        """How many matches there are, and how many are correct."""
        return f"{row['matches']} matches, {row['correct'][CORRECT_PX - 1]} within {CORRECT_PX} px"

    def right(
        self, pair: Pair, first: Features, second: Features, matches: np.ndarray
    ) -> np.ndarray:
        """Which matches are within 3 px of where the homography puts them, [P] bool."""
        return match_distances(pair, first, second, matches) <= CORRECT_PX
