"""Sequences without ground truth: matches that agree with each other, keypoints followed."""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from aliked.download import offer_download
from aliked.errors import InputError
from aliked.features import Features
from aliked.files import real_path
from aliked.images import list_images, load_image
from aliked.matching import Matcher
from evaluation.estimators import EPIPOLAR_PX, epipolar_inliers
from evaluation.pairs import MUTUAL, Dataset, Image, Pair
from evaluation.pose import add_repeats_option, seeds_of
from evaluation.pose_datasets import read_intrinsics
from evaluation.task import Count, Row, Score, Task


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


def _backwards(links: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair from the last on, with the pair before it."""
    before = [np.empty((0, 2), int), *links[:-1]]
    return zip(reversed(links), reversed(before), strict=True)


def inlier_ratio(row: dict) -> float:
    """The share of a pair's matches; 0 where there are none."""
    return row["inliers"] / max(row["matches"], 1)


def mean_track(starts: np.ndarray) -> float:
    """Images per track, from [P, 2] numbers of tracks and of the images that they span."""
    tracks, images = starts.sum(axis=0)
    return images / max(tracks, 1)


def sequence(folder: Path) -> list[Image]:
    """The images of a folder, in natural order; `InputError` where there are not two."""
    offer_download(folder)
    paths = list_images(folder)
    if len(paths) < 2:
        raise InputError(f"{folder} has one image; give a folder with at least two")
    place = real_path(folder).name
    return [Image(f"{place}/{path.name}", functools.partial(load_image, path)) for path in paths]


def consecutive(images: list[Image]) -> list[Pair]:
    """Each image with the next, in the group of their folder."""
    return [
        Pair(f"{a.name} - {Path(b.name).name}", str(Path(a.name).parent), a, b, None)
        for a, b in pairwise(images)
    ]


class SequencesRow(Row):
    """What `Sequences.rows` finds of a pair."""

    inliers: Annotated[float, msgspec.Meta(ge=0)]
    tracks: Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]


class Sequences(Task):
    """Pairs of consecutive images, nothing known about them."""

    name = "sequences"
    row = SequencesRow
    help = "image sequences without ground truth"
    scores = (
        Score("matches", lambda row: row["matches"], percent=False, digits=0),
        Score("inliers", lambda row: row["inliers"], percent=False, digits=0),
        Score("inlier ratio", inlier_ratio),
        Score("track length", lambda row: row["tracks"], mean_track, percent=False, digits=2),
    )
    compared = ("matches", "inliers", "inlier ratio", "track length")
    headline = "inlier ratio"
    notes = (
        "Consecutive images, mutual nearest neighbours, no limit of similarity. inliers: matches "
        f"within {EPIPOLAR_PX:g} px of the epipolar lines that most of them agree on, by OpenCV's "
        "MAGSAC++ (the fundamental matrix, or the essential one where intrinsics are given), "
        "estimated several times with other random numbers. "
        "inlier ratio: their share, in %, mean over the pairs. track length: images that a "
        "keypoint is followed through by inliers, mean over the tracks, at least 2."
    )

    def __init__(
        self, folders: Sequence[Path], intrinsics: np.ndarray | None, seed: int, repeats: int
    ) -> None:
        """`intrinsics` [3, 3] of all images, if known; `InputError` for a folder that is none."""
        names = [real_path(folder).name for folder in folders]
        if len(set(names)) < len(names):
            raise InputError(f"two of the folders have one name ({', '.join(names)}); rename one")
        self.intrinsics, self.seed, self.repeats = intrinsics, seed, repeats
        parameters = {
            "inlier_px": EPIPOLAR_PX,
            "repeats": repeats,
            "intrinsics": None if intrinsics is None else intrinsics.tolist(),
        }
        pairs = [pair for folder in folders for pair in consecutive(sequence(folder))]
        super().__init__(Dataset(", ".join(names), pairs), parameters)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the data, and how it is used."""
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

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> "Sequences":
        """Return the task that the options ask for; `InputError` where a folder is no sequence."""
        intrinsics = None if args.intrinsics is None else read_intrinsics(args.intrinsics)
        return cls(args.folders, intrinsics, args.seed, args.repeats)

    @staticmethod
    def badness(row: dict) -> float:
        """Return how few of the matches agree."""
        return -inlier_ratio(row)

    def measure(self, pair: Pair, first: Features, second: Features, matches: np.ndarray) -> dict:
        """Return the matches of a pair, and inliers, mean of the repeats.

        As `links` the keypoints that are the same: matches that are inliers in most repeats.
        """
        points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
        inliers = np.array(
            [
                epipolar_inliers(*points, self.intrinsics, seed)
                for seed in seeds_of(pair.name, self.seed, self.repeats)
            ]
        )
        return {
            "keypoints": [len(first), len(second)],
            "matches": len(matches),
            "inliers": float(inliers.sum(axis=1).mean()),
            "links": matches[inliers.mean(axis=0) > 0.5],
        }

    def rows(self, features: Callable[[Image], Features], matcher: Matcher = MUTUAL) -> list[dict]:
        """What was found of every pair, and of the tracks through all of a sequence's images."""
        return with_tracks(super().rows(features, matcher))

    def caption(self, row: dict) -> str:
        """The pair, and how many of its matches agree."""
        return f"{row['name']}: {row['inliers']:.0f} inliers of {row['matches']} matches"


def with_tracks(rows: list[dict]) -> list[dict]:
    """The rows with `tracks` in place of `links`: how many start there, images that they span."""
    for _, group in groupby(rows, lambda row: row["group"]):
        own = list(group)
        for row, starts in zip(own, track_starts([row.pop("links") for row in own]), strict=True):
            row["tracks"] = list(starts)
    return rows
