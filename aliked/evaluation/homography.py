"""How well features relate two images of a plane: columns, options, and the run."""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aliked.backends import Spec
from aliked.errors import InputError
from aliked.evaluation import runner
from aliked.evaluation.homography_data import Dataset, load_dataset
from aliked.evaluation.homography_measure import CORRECT_PX, ESTIMATES, THRESHOLDS, draw, measure
from aliked.evaluation.hpatches import LARGE
from aliked.evaluation.images import Resize
from aliked.evaluation.options import add_shared_options
from aliked.evaluation.pairs import measure_pairs
from aliked.evaluation.robust import INLIER_PX, estimators
from aliked.evaluation.scores import Kind, Score

CORNER_PX = (1, 3, 5)  # of the homography's accuracy


@dataclass(frozen=True)
class Setting:
    """How the field uses HPatches."""

    top_k: int
    scores_th: float | None
    n_limit: int
    short_side: int | None


SETTINGS = {
    "5000": Setting(top_k=0, scores_th=0.2, n_limit=5000, short_side=None),
    "1024": Setting(top_k=1024, scores_th=None, n_limit=Spec.n_limit, short_side=480),
}


def share(part: Callable[[dict], float], whole: Callable[[dict], float]) -> Callable:
    """A fraction of a pair's numbers; 0 of nothing."""
    return lambda row: part(row) / whole(row) if whole(row) else 0.0


def error_of(row: dict, estimator: str = "opencv") -> float:
    """The corner error of a pair: infinite where none was found, NaN where none was looked for."""
    error = row["corner_error"].get(estimator, np.nan)
    return np.inf if error is None else error


def shown(row: dict) -> float:
    """Keypoints that could be found again: the mean of both images."""
    return sum(row["covisible"]) / 2


def accuracy_at(threshold: float) -> Score:
    """Pairs whose corner error is at most this."""
    return Score(f"accuracy@{threshold}", lambda row: error_of(row) <= threshold)


def auc_at(threshold: float, estimator: str = "opencv", label: str = "") -> Score:
    """Area under the share of pairs over their corner error, up to a threshold, divided by it.

    A pair of error e is in the share from e on, so that it adds 1 - e / threshold. (Some draw the
    curve straight from error to error; it is then at most 1 / (2 P) higher for P pairs, and jumps
    by as much when an error crosses the threshold.)
    """
    return Score(
        f"AUC@{threshold}{label}",
        lambda row: np.maximum(1 - error_of(row, estimator) / threshold, 0),
    )


CURVE = tuple(
    Score(f"MMA@{t}", share(lambda row, i=i: row["correct"][i], lambda row: row["matches"]))
    for i, t in enumerate(THRESHOLDS)
)
KIND = Kind(
    scores=(
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("repeatability", share(lambda row: row["repeated"], shown)),
        Score("matching score", share(lambda row: row["recalled"], shown)),
        *(CURVE[t - 1] for t in CORNER_PX),
        *map(accuracy_at, CORNER_PX),
        *map(auc_at, CORNER_PX),
        auc_at(3, "poselib", " PoseLib"),
    ),
    compared=("repeatability", "MMA@3", "AUC@1", "AUC@3", "AUC@5", "AUC@3 PoseLib"),
    headline="AUC@3",
    badness=error_of,
    badness_text="corner error {:.1f} px",
    curve=CURVE,
    notes=(
        "Mutual nearest neighbours, no limit of similarity. Repeatability: keypoints found again "
        f"within {CORRECT_PX} px, of those that both images show. Matching score: correct matches "
        "of the same. MMA@t: share of the matches within t px, mean over the pairs. accuracy@t: "
        "pairs whose homography moves the image's corners by at most t px; AUC@t: area under that "
        f"curve. Homographies by OpenCV's USAC and by PoseLib, {INLIER_PX:g} px; of {ESTIMATES} "
        "seeds the median error counts. All but the matches in %; a pair without a homography is a "
        "failure."
    ),
)


def add_homography_options(parser: argparse.ArgumentParser) -> None:
    """The data, and how it is used."""
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder: assets (or any with homographies.txt beside the frames), or HPatches' scenes",
    )
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        help="of HPatches without its 8 largest scenes: 5000 (at most so many keypoints with score "
        "> 0.2) or 1024 (so many, short side 480); instead of the options on keypoints and size",
    )
    parser.add_argument(
        "--short_side",
        type=int,
        metavar="PX",
        help="resize images to this short side (default: as they are)",
    )
    add_shared_options(parser)


def run_homography(args: argparse.Namespace) -> int:
    """Evaluate on one data set."""
    if args.setting:
        vars(args).update(vars(SETTINGS[args.setting]))
    if args.short_side is not None and args.short_side < 32:
        raise InputError(f"--short_side {args.short_side} leaves no image; give at least 32 pixels")
    resize = Resize("short", args.short_side) if args.short_side else None
    dataset = load_dataset(args.dataset, resize, LARGE if args.setting else ())
    return runner.run(args, task_of(dataset, args))


def task_of(dataset: Dataset, args: argparse.Namespace) -> runner.Task:
    """What the runner needs to know."""
    measure_pair = functools.partial(measure, seed=args.seed)
    by_name = {pair.name: pair for pair in dataset.pairs}
    return runner.Task(
        name="homography",
        dataset=dataset.name,
        images=dataset.images,
        rows=lambda store: measure_pairs(dataset.pairs, store, measure_pair),
        draw=lambda row, store: draw(by_name[row["name"]], row, store),
        parameters={
            "truth_sha256": dataset.truth_sha256,
            "short_side": args.short_side,
            "correct_px": CORRECT_PX,
            "inlier_px": INLIER_PX,
            "estimates": ESTIMATES,
            "estimators": list(estimators()),
        },
    )
