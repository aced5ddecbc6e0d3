"""Matching quality of the trained model beside the official one, SIFT and ORB.

usage: python -m training.quality assets/tum assets/kitti --output quality.jsonl

Of each folder: images against themselves under random homographies of three strengths, where a
match is correct if the homography says so within 3 px, and consecutive images, where it is correct
if it agrees with the epipolar geometry that most matches agree with.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.features import Features
from aliked.files import whole_file
from aliked.images import list_images, load_image
from aliked.matching import match_mutual
from evaluation.systems import Baseline

TRAINED, OFFICIAL = "aliked-t16-homography", "aliked-t16"
CORRECT = 3.0  # pixels from where the homography puts the point
EPIPOLAR = 1.0  # pixels from the epipolar line
ANY_SIMILARITY = -1.0
Extract = Callable[[np.ndarray], Features]


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
class Pair:
    """Two images and, where it is known, the homography between them."""

    folder: str
    kind: str  # a strength, or "consecutive"
    name: str
    first: np.ndarray  # uint8 [H, W, 3] RGB
    second: np.ndarray
    homography: np.ndarray | None  # [3, 3], pixels of `first` to pixels of `second`


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


def spread(paths: list[Path], count: int) -> list[Path]:
    """At most `count` of the paths, evenly spread."""
    return [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, count).astype(int))]


def folder_pairs(folder: Path, images: int, seed: int) -> Iterator[Pair]:
    """The pairs of a folder: `images` of each strength, and as many of consecutive images."""
    paths = list_images(folder)
    for index, path in enumerate(spread(paths, images)):
        image = load_image(path)
        size = image.shape[:2]
        for number, (kind, strength) in enumerate(STRENGTHS.items()):
            rng = np.random.default_rng((seed, index, number))
            homography = random_homography(*size, strength, rng)
            warped = cv2.warpPerspective(
                image, homography, size[::-1], flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT
            )
            yield Pair(folder.name, kind, path.name, image, warped, homography)
    starts = spread(paths[:-1], images) if len(paths) > 1 else []
    following = dict(itertools.pairwise(paths))
    for path in starts:
        second = following[path]
        name = f"{path.name} {second.name}"
        yield Pair(folder.name, "consecutive", name, load_image(path), load_image(second), None)


def correct_by_homography(first: np.ndarray, second: np.ndarray, homography: np.ndarray) -> int:
    """How many matched keypoints, [P, 2] each, the homography brings within `CORRECT` pixels."""
    projected = cv2.perspectiveTransform(first[None].astype(np.float64), homography)[0]
    return int((np.linalg.norm(projected - second, axis=1) < CORRECT).sum())


def correct_by_epipolar_geometry(first: np.ndarray, second: np.ndarray) -> int:
    """How many matched keypoints, [P, 2] each, agree with one fundamental matrix."""
    if len(first) < 8:
        return 0
    cv2.setRNGSeed(0)
    _, inliers = cv2.findFundamentalMat(
        first, second, cv2.USAC_MAGSAC, EPIPOLAR, confidence=0.9999, maxIters=10000
    )
    return 0 if inliers is None else int(inliers.sum())


def measure(pair: Pair, system: str, extract: Extract) -> Record:
    """Match a pair by mutual nearest neighbours and count."""
    a, b = extract(pair.first), extract(pair.second)
    i, j = match_mutual(a.descriptors, b.descriptors, ANY_SIMILARITY).T
    first, second = a.keypoints[i], b.keypoints[j]
    if pair.homography is None:
        correct = correct_by_epipolar_geometry(first, second)
    else:
        correct = correct_by_homography(first, second, pair.homography)
    return Record(pair.folder, pair.kind, pair.name, system, len(i), correct)


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
    lines = ["| images | pairs | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for folder, kind in dict.fromkeys((record.folder, record.kind) for record in records):
        rows = [r for r in records if (r.folder, r.kind) == (folder, kind)]
        cells = []
        for name in names:
            own = [record for record in rows if record.system == name]
            accuracy = 100 * np.mean([record.accuracy for record in own])
            cells.append(f"{accuracy:.1f}, {np.mean([record.correct for record in own]):.0f}")
        lines.append(f"| {folder} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="image folders")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="default: the shipped ones")
    parser.add_argument("--images", type=int, default=8, help="per folder (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=1000, help="keypoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the homographies (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a JSON line per pair")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure all pairs with all systems, print the table, write the records."""
    compared = systems(args)
    records = [
        measure(pair, name, extract)
        for folder in args.folders
        for pair in folder_pairs(folder, args.images, args.seed)
        for name, extract in compared.items()
    ]
    print(table(records))
    if args.output:
        with whole_file(args.output) as partial:
            partial.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))


if __name__ == "__main__":
    cli.run(main, parser())
