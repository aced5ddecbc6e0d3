"""Tracks: keypoints followed from image to image."""

import argparse
import functools
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import cv2
import numpy as np

from aliked.download import offer_download
from aliked.drawing import draw_matches
from aliked.errors import InputError
from aliked.features import Features
from aliked.images import list_images, load_image
from evaluation.estimators import magsac, pose_by_opencv
from evaluation.pose import add_repeats_option, check_repeats, seeds_of
from evaluation.pose_datasets import read_intrinsics
from evaluation.runner import Rows, Task, add_shared_options, run
from evaluation.scores import Kind, Score
from evaluation.store import FeatureStore, Image, Pair, match, measure_pairs


def track_starts(links: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """How many tracks start with each image but the last, and how many images they span together.

    `links` has, for every pair of consecutive images, indices [P, 2] of the keypoints that are the
    same; none occurs twice. A track spans at least two images. One (number, images) per pair.
    """
    starts = []
    spans: dict[int, int] = {}  # images from a keypoint of the pair's second image on
    for pair, following in _backwards(links):
        spans = {int(i): 1 + spans.get(int(j), 1) for i, j in pair}
        continued = set(following[:, 1].tolist())
        lengths = [span for keypoint, span in spans.items() if keypoint not in continued]
        starts.append((len(lengths), sum(lengths)))
    return starts[::-1]


def _backwards(links: Sequence[np.ndarray]):
    """Every pair from the last on, with the pair before it."""
    before = [np.empty((0, 2), int), *links[:-1]]
    return zip(reversed(links), reversed(before), strict=True)


INLIER_PX = 1.0  # largest distance of an inlier from its epipolar line
MIN_MATCHES = 8  # of a fundamental matrix, with one to spare that can disagree


def inlier_share(row: dict) -> float:
    """Of a pair's matches; 0 where there are none."""
    return row["inliers"] / max(row["matches"], 1)


def mean_track(starts: np.ndarray) -> float:
    """Images per track, from [P, 2] numbers of tracks and of the images that they span."""
    tracks, images = starts.sum(axis=0)
    return images / max(tracks, 1)


KIND = Kind(
    scores=(
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("inliers", lambda row: row["inliers"], percent=False, digits=0),
        Score("inlier ratio", inlier_share),
        Score("track length", lambda row: row["tracks"], mean_track, percent=False, digits=2),
    ),
    compared=("matches", "inliers", "inlier ratio", "track length"),
    headline="inlier ratio",
    badness=lambda row: -inlier_share(row),
    notes=(
        "Consecutive images, mutual nearest neighbours, no limit of similarity. inliers: matches "
        f"within {INLIER_PX:g} px of the epipolar lines that most of them agree on, by OpenCV's "
        "MAGSAC++ (the fundamental matrix, or the essential one where intrinsics are given), "
        "estimated several times with other random numbers. "
        "inlier ratio: their share, in %, mean over the pairs. track length: images that a "
        "keypoint is followed through by inliers, mean over the tracks, at least 2."
    ),
)


def add_sequences_options(parser: argparse.ArgumentParser) -> None:
    """The data, and how it is used."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="images of a sequence, in order"
    )
    parser.add_argument(
        "--intrinsics",
        nargs="+",
        metavar="NUMBER",
        help="FX FY CX CY in pixels, of all images, or a file with these four: inliers of an "
        "essential matrix instead of a fundamental one",
    )
    add_repeats_option(parser)
    add_shared_options(parser)


def run_sequences(args: argparse.Namespace) -> int:
    """Evaluate on all folders together."""
    check_repeats(args.repeats)
    intrinsics = None if args.intrinsics is None else read_intrinsics(args.intrinsics)
    return run(args, task_of(args.folders, intrinsics, args.seed, args.repeats))


def task_of(folders: list[Path], intrinsics: np.ndarray | None, seed: int, repeats: int) -> Task:
    """What the runner needs to know; `InputError` where a folder is no sequence."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders have one name ({', '.join(names)}); rename one")
    sequences = [sequence(folder) for folder in folders]
    pairs = [pair for images in sequences for pair in consecutive(images)]
    by_name = {pair.name: pair for pair in pairs}
    measure_pair = functools.partial(measure, intrinsics=intrinsics, seed=seed, repeats=repeats)
    return Task(
        name="sequences",
        dataset=", ".join(names),
        images=[image for images in sequences for image in images],
        rows=lambda store: with_tracks(measure_pairs(pairs, store, measure_pair)),
        draw=lambda row, store: draw(by_name[row["name"]], row, store),
        parameters={
            "inlier_px": INLIER_PX,
            "repeats": repeats,
            "intrinsics": None if intrinsics is None else intrinsics.tolist(),
        },
    )


def sequence(folder: Path) -> list[Image]:
    """The images of a folder, in natural order; `InputError` where there are not two."""
    offer_download(folder)
    paths = list_images(folder)
    if len(paths) < 2:
        raise InputError(f"{folder} has one image; give a folder with at least two")
    place = folder.resolve().name
    return [Image(f"{place}/{path.name}", functools.partial(load_image, path)) for path in paths]


def consecutive(images: list[Image]) -> list[Pair]:
    """Each image with the next, in the group of their folder."""
    return [
        Pair(f"{a.name} - {Path(b.name).name}", str(Path(a.name).parent), a, b, None)
        for a, b in pairwise(images)
    ]


def measure(
    pair: Pair,
    first: Features,
    second: Features,
    intrinsics: np.ndarray | None,
    seed: int,
    repeats: int,
) -> dict:
    """Matches of a pair, and inliers, mean of the repeats.

    As `links` the keypoints that are the same: matches that are inliers in most repeats.
    """
    matches = match(first, second)
    points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
    seeds = seeds_of(pair.name, seed, repeats)
    inliers = np.array([inliers_of(points, intrinsics, own_seed) for own_seed in seeds])
    return {
        "keypoints": [len(first), len(second)],
        "matches": len(matches),
        "inliers": float(inliers.sum(axis=1).mean()),
        "links": matches[inliers.mean(axis=0) > 0.5],
    }


def inliers_of(
    points: tuple[np.ndarray, np.ndarray], intrinsics: np.ndarray | None, seed: int
) -> np.ndarray:
    """Which matches agree on an epipolar geometry, [P] bool; none where there is none."""
    nothing = np.zeros(len(points[0]), bool)
    if intrinsics is not None:
        pose = pose_by_opencv(*points, intrinsics, intrinsics, seed)
        return nothing if pose is None else pose.inliers
    if len(points[0]) < MIN_MATCHES:
        return nothing
    matrix, inliers = cv2.findFundamentalMat(*points, magsac(INLIER_PX, seed))
    return nothing if matrix is None else inliers[:, 0] > 0


def with_tracks(rows: Rows) -> Rows:
    """The rows with `tracks` in place of `links`: how many start there, images that they span."""
    for _, group in groupby(rows, lambda row: row["group"]):
        own = list(group)
        for row, starts in zip(own, track_starts([row.pop("links") for row in own]), strict=True):
            row["tracks"] = list(starts)
    return rows


def draw(pair: Pair, row: dict, store: FeatureStore) -> np.ndarray:
    """A pair's matches."""
    first, second = store.read(pair.first), store.read(pair.second)
    return draw_matches(
        pair.first.load(),
        first,
        pair.second.load(),
        second,
        match(first, second),
        f"{pair.name}: {row['inliers']:.0f} inliers of {row['matches']} matches",
    )
