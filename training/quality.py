"""Matching quality of the trained model beside the official one, SIFT and ORB.

usage: python -m training.quality assets/tum assets/kitti --output quality.jsonl

Of each folder: images against themselves under random homographies of three strengths, where a
match is correct if the homography says so within 3 px, and consecutive images, where it is correct
if it agrees with the epipolar geometry that most matches agree with.
"""

import argparse
import functools
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.cli import markdown, seed, whole
from aliked.features import Features
from aliked.files import whole_file
from aliked.images import list_images, load_image
from evaluation.estimators import epipolar_inliers
from evaluation.homography import CORRECT_PX, match_distances
from evaluation.pairs import MUTUAL, Image, Pair
from evaluation.systems import Baseline, Extract
from evaluation.task import matched

TRAINED, OFFICIAL = "aliked-t16-homography", "aliked-t16"
CONSECUTIVE = "consecutive"  # the kind of pairs whose homography is not known


@dataclass(frozen=True)
class Strength:
    """Limits of a random homography."""

    rotation: float  # degrees
    scale: float  # octaves
    corners: float  # how far each corner moves, in image sides


STRENGTHS = {
    "mild": Strength(10, 0.2, 0.05),
    "medium": Strength(25, 0.5, 0.10),
    "strong": Strength(45, 0.8, 0.18),
}


@dataclass(frozen=True)
class Record:
    """How one system matched one pair."""

    folder: str
    kind: str
    pair: str
    system: str
    matches: int
    correct: int

    @property
    def accuracy(self) -> float:
        """The share of the matches that are correct."""
        return self.correct / max(self.matches, 1)


def random_homography(
    height: int, width: int, strength: Strength, rng: np.random.Generator
) -> np.ndarray:
    """[3, 3] between pixels of two images of one size: turned, scaled, then its corners moved."""
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    centre = np.array([width, height]) / 2
    angle = math.radians(strength.rotation) * rng.uniform(-1, 1)
    scale = 2 ** (strength.scale * rng.uniform(-1, 1))
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    moved = centre + scale * (corners - centre) @ turn
    moved += rng.uniform(-1, 1, (4, 2)) * strength.corners * (width, height)
    return cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32))


def spread(images: list[Image], count: int) -> list[Image]:
    """At most `count` of the images, evenly spread."""
    return [images[i] for i in np.unique(np.linspace(0, len(images) - 1, count).astype(int))]


def warped(image: Image, homography: np.ndarray) -> np.ndarray:
    """An image through a homography to one of its own size, mirrored beyond its edges."""
    return cv2.warpPerspective(
        image.load(),
        homography,
        image.size,
        flags=cv2.INTER_AREA,
        borderMode=cv2.BORDER_REFLECT,
    )


def folder_pairs(folder: Path, images: int, seed: int) -> list[Pair]:
    """The pairs of a folder: `images` of each strength, and as many of consecutive images."""
    sources = [
        Image(path.name, functools.partial(load_image, path)) for path in list_images(folder)
    ]
    pairs = []
    for index, image in enumerate(spread(sources, images)):
        width, height = image.size
        for number, (kind, strength) in enumerate(STRENGTHS.items()):
            rng = np.random.default_rng((seed, index, number))
            homography = random_homography(height, width, strength, rng)
            pixels = functools.partial(warped, image, homography)
            second = Image(f"{image.name} {kind}", pixels)
            pairs.append(Pair(image.name, kind, image, second, homography))
    following = dict(itertools.pairwise(sources))
    for first in spread(sources[:-1], images) if len(sources) > 1 else []:
        second = following[first]
        pairs.append(Pair(f"{first.name} {second.name}", CONSECUTIVE, first, second, None))
    return pairs


def count_correct(pair: Pair, first: Features, second: Features, matches: np.ndarray) -> int:
    """How many matches the homography, or else an epipolar geometry of most of them, agrees with.

    Within `CORRECT_PX` of where the homography puts them, or 1 px of their epipolar lines.
    """
    if pair.truth is not None:
        return int((match_distances(pair, first, second, matches) <= CORRECT_PX).sum())
    points = first.keypoints[matches[:, 0]], second.keypoints[matches[:, 1]]
    return int(epipolar_inliers(*points, intrinsics=None, seed=0).sum())


def measure(folder: str, pairs: list[Pair], system: str, extract: Extract) -> list[Record]:
    """Match all pairs by mutual nearest neighbours and count."""

    @functools.cache
    def features(image: Image) -> Features:
        return extract(image.load())

    records = []
    for pair in pairs:
        first, second, matches = matched(pair, features, MUTUAL)
        correct = count_correct(pair, first, second, matches)
        records.append(Record(folder, pair.group, pair.name, system, len(matches), correct))
    return records


def systems(args: argparse.Namespace) -> dict[str, Extract]:
    """What is compared, by name."""

    def model(name: str, weights: Path | None) -> Extract:
        spec = Spec(name, top_k=args.top_k, device=args.device, weights=weights)
        return create_extractor("pytorch", spec)

    return {
        TRAINED: model(TRAINED, args.weights),
        OFFICIAL: model(OFFICIAL, None),
        "sift": Baseline("sift", args.top_k),
        "orb": Baseline("orb", args.top_k),
    }


def table(records: list[Record]) -> str:
    """Mean matching accuracy in percent and correct matches per pair, as Markdown."""
    names = list(dict.fromkeys(record.system for record in records))
    rows = []
    for folder, kind in dict.fromkeys((record.folder, record.kind) for record in records):
        own = [r for r in records if (r.folder, r.kind) == (folder, kind)]
        cells = []
        for name in names:
            of_system = [record for record in own if record.system == name]
            accuracy = 100 * np.mean([record.accuracy for record in of_system])
            cells.append(f"{accuracy:.1f}, {np.mean([record.correct for record in of_system]):.0f}")
        rows.append([folder, kind, *cells])
    return markdown(["images", "pairs", *names], rows, left=2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
        prog="python -m training.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="image folders")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="default: the shipped ones")
    parser.add_argument(
        "--images", type=whole(1), default=8, help="per folder (default: %(default)s)"
    )
    parser.add_argument(
        "--top_k", type=whole(1), default=1000, help="keypoints (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the homographies (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON line per pair")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure all pairs with all systems, print the table, write the records."""
    pairs = {folder.name: folder_pairs(folder, args.images, args.seed) for folder in args.folders}
    compared = systems(args)
    records = [
        record
        for folder, own in pairs.items()
        for name, extract in compared.items()
        for record in measure(folder, own, name, extract)
    ]
    print(table(records))
    if args.output:
        with whole_file(args.output) as partial:
            partial.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))


if __name__ == "__main__":
    cli.run(main, parser())
