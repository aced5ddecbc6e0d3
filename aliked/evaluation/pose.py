"""Evaluating relative poses: the data sets, and how they are run."""

import argparse
import functools
from pathlib import Path

import numpy as np

from aliked.drawing import draw_matches
from aliked.errors import InputError
from aliked.evaluation import megadepth, scene, tum
from aliked.evaluation.megadepth import is_megadepth, megadepth_data
from aliked.evaluation.options import add_shared_options
from aliked.evaluation.pairs import Pair, match, measure_pairs
from aliked.evaluation.pose_data import PoseData
from aliked.evaluation.pose_estimators import INLIER_PX, estimators
from aliked.evaluation.pose_measure import agree, measure
from aliked.evaluation.pose_repeats import add_repeats_option, check_repeats
from aliked.evaluation.pose_scores import KIND, errors_of
from aliked.evaluation.runner import Task, run
from aliked.evaluation.scene_pairs import scene_data
from aliked.evaluation.store import FeatureStore
from aliked.evaluation.tum import Choice, read_intrinsics, tum_data

__all__ = ["KIND", "add_pose_options", "run_pose"]  # `scores.KINDS` finds `KIND` here


def add_pose_options(parser: argparse.ArgumentParser) -> None:
    """The data, and how it is used."""
    parser.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="folder: assets/scene_640x480 (or any other with scene.json), MegaDepth-1500, or a "
        "sequence with groundtruth.txt in TUM format",
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
        type=int,
        default=Choice.stride,
        metavar="N",
        help="frames between the images of a pair (default: %(default)s)",
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=Choice.tolerance,
        metavar="S",
        help="seconds between an image and its pose (default: %(default)s)",
    )
    group.add_argument(
        "--min_baseline",
        type=float,
        default=Choice.min_baseline,
        metavar="M",
        help="metres between the images of a pair; below, the direction of the motion is not "
        "known well (default: %(default)s)",
    )
    add_shared_options(parser)


def run_pose(args: argparse.Namespace) -> int:
    """Evaluate on one data set."""
    check_repeats(args.repeats)
    return run(args, task_of(load_data(args), args.seed, args.repeats))


def load_data(args: argparse.Namespace) -> PoseData:
    """The data set in a folder, whichever it is; `InputError` where it is none."""
    folder = args.dataset
    if (folder / scene.FILE).is_file():
        return scene_data(folder)
    if is_megadepth(folder):
        return megadepth_data(folder)
    if (folder / tum.TRAJECTORY).is_file():
        return tum_data(folder, *sequence_options(args))
    raise InputError(
        f"{folder} has no {scene.FILE}, no {tum.TRAJECTORY} and no part of MegaDepth-1500; give "
        f"one of these. {megadepth.CURE}"
    )


def sequence_options(args: argparse.Namespace) -> tuple[np.ndarray, Choice]:
    """Intrinsics [3, 3] and pairs of a sequence; `InputError` where the options make no sense."""
    if args.intrinsics is None:
        raise InputError(
            f"{args.dataset} has no intrinsics; pass --intrinsics FX FY CX CY, in pixels"
        )
    if args.stride < 1:
        raise InputError(f"--stride {args.stride} gives no pairs; give at least 1")
    if args.min_baseline <= 0:
        raise InputError(
            f"--min_baseline {args.min_baseline} lets pairs through whose motion has no "
            "direction; give metres above 0"
        )
    choice = Choice(args.stride, args.tolerance, args.min_baseline)
    return read_intrinsics(args.intrinsics), choice


def task_of(data: PoseData, seed: int, repeats: int) -> Task:
    """What the runner needs to know."""
    by_name = {pair.name: pair for pair in data.pairs}
    measure_pair = functools.partial(measure, seed=seed, repeats=repeats)
    return Task(
        name="pose",
        dataset=data.name,
        images=data.images,
        rows=lambda store: measure_pairs(data.pairs, store, measure_pair),
        draw=lambda row, store: draw(by_name[row["name"]], row, store),
        parameters=data.parameters
        | {
            "pairs": len(data.pairs),
            "inlier_px": INLIER_PX,
            "repeats": repeats,
            "estimators": list(estimators()),
        },
    )


def draw(pair: Pair, row: dict, store: FeatureStore) -> np.ndarray:
    """A pair's matches, those green that agree with what is known: the depth, else the pose."""
    first, second = store.read(pair.first), store.read(pair.second)
    matches = match(first, second)
    points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
    return draw_matches(
        pair.first.load(),
        first,
        pair.second.load(),
        second,
        matches,
        f"{pair.name}: {row['inliers']:.0f} inliers of {row['matches']} matches, pose "
        f"{np.median(errors_of(row)):.1f} degrees off",
        agree(pair.truth, points),
    )
