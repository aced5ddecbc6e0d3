"""Homographies: data sets of planes, the measures of the field per pair, and the task."""

import argparse
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked.backends import Spec
from aliked.drawing import draw_matches
from aliked.errors import InputError
from aliked.features import Features
from aliked.hpatches import FOLDER, LARGE, missing_scenes
from aliked.images import SUFFIXES, list_images, load_image
from aliked.matching import mutual_nearest_keypoints
from evaluation import runner
from evaluation.changes import CHANGES, LEVELS, change
from evaluation.estimators import HOMOGRAPHY_INLIER_PX, homography_estimators
from evaluation.runner import add_shared_options
from evaluation.scores import Kind, Score
from evaluation.store import FeatureStore, Image, Pair, Resize, match, measure_pairs

TRUTH = "homographies.txt"  # of a sequence
DOWNLOAD = "python download_data.py hpatches"
GROUPS = {"i": "illumination", "v": "viewpoint"}  # by the first letter of an HPatches scene


@dataclass(frozen=True)
class Dataset:
    """Pairs whose `truth` is the homography, 3x3 float64, from the first image to the second.

    Pixels are those of the images as their files have them, before any resizing.
    """

    name: str
    pairs: Sequence[Pair]

    @property
    def images(self) -> list[Image]:
        """All images once."""
        return list(dict.fromkeys(i for pair in self.pairs for i in (pair.first, pair.second)))

    @property
    def truth_sha256(self) -> str:
        """Of all homographies, to six digits: further ones may differ between machines."""
        values = (f"{value:.6g}" for pair in self.pairs for value in pair.truth.ravel())
        return hashlib.sha256(" ".join(values).encode()).hexdigest()


def load_dataset(folder: Path, resize: Resize | None, leave_out: Sequence[str] = ()) -> Dataset:
    """The pairs of a folder: a sequence, a folder of sequences, or scenes as HPatches has them.

    A sequence has `homographies.txt` beside its frames; its first and middle frames are also used
    with changes of known homography. `leave_out` are names of scenes. `InputError` where there
    is nothing of the kind, or something is missing.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one, or fetch HPatches: {DOWNLOAD}")
    name = folder.resolve().name
    sequences = [path for path in (folder, *_subfolders(folder)) if (path / TRUTH).is_file()]
    if sequences:
        return Dataset(name, _sequence_pairs(sequences, resize))
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    scenes = [path for path in _subfolders(folder) if any(path.glob("H_1_*"))]
    if not scenes:
        raise InputError(
            f"{folder} has neither {TRUTH} nor scenes with H_1_2 and so on; give a folder that "
            f"has, or fetch HPatches: {DOWNLOAD}"
        )
    _check_complete(folder)
    kept = [scene for scene in scenes if scene.name not in leave_out]
    return Dataset(name, [pair for scene in kept for pair in _scene_pairs(scene, resize)])


def read_homographies(path: Path, count: int | None = None) -> np.ndarray:
    """Read 3x3 matrices from a text file, row by row: [count, 3, 3] float64 (None: all).

    Lines that start with # are comments. `InputError` names the line that is wrong.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
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
# Estimates with different seeds, of which the middle one counts: where two planes fit the matches
# nearly as well as each other, a single estimate is a toss of a coin.
ESTIMATES = 5


def project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [N, 2] through a 3x3 homography, [N, 2] float64; infinite where it says so."""
    mapped = np.c_[points, np.ones(len(points))] @ homography.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return mapped[:, :2] / mapped[:, 2:]


def homography_of(pair: Pair) -> np.ndarray:
    """The homography between a pair's images as features see them, after resizing."""
    return pair.second.to_loaded @ pair.truth @ np.linalg.inv(pair.first.to_loaded)


def measure(pair: Pair, first: Features, second: Features, seed: int) -> dict:
    """What the features of both images are worth.

    `covisible`: keypoints of each image that the other one shows. `repeated`: those of both that
    are each other's nearest, at most 3 px apart in the second image. `matches`, and how many of
    them are `correct` within 1 to 10 px in the second image; `recalled` are correct within 3 px
    and covisible. `corner_error`: how far the estimated homography puts the first image's corners
    from where they belong, mean of the four in pixels, median of five seeds, None where there is
    none.
    """
    truth = homography_of(pair)
    there = project(truth, first.keypoints)
    back = project(np.linalg.inv(truth), second.keypoints)
    seen = inside(there, pair.second.size), inside(back, pair.first.size)
    repeated, _, _ = mutual_nearest_keypoints(there[seen[0]], second.keypoints[seen[1]], CORRECT_PX)
    i, j = match(first, second).T
    distance = np.hypot(*(there[i] - second.keypoints[j]).T)
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
                [estimate(*points, seed + run) for run in range(ESTIMATES)], truth, pair.first.size
            )
            for name, estimate in homography_estimators().items()
        },
    }


def inside(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points [N, 2] lie in an image of this width and height."""
    return ((points >= -0.5) & (points < np.array(size) - 0.5)).all(axis=1)


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


def draw(pair: Pair, row: dict, store: FeatureStore) -> np.ndarray:
    """A pair's matches: correct ones green, wrong ones red."""
    first, second = store.read(pair.first), store.read(pair.second)
    matches = match(first, second)
    there = project(homography_of(pair), first.keypoints[matches[:, 0]])
    distance = np.hypot(*(there - second.keypoints[matches[:, 1]]).T)
    return draw_matches(
        pair.first.load(),
        first,
        pair.second.load(),
        second,
        matches,
        f"{row['matches']} matches, {row['correct'][CORRECT_PX - 1]} within {CORRECT_PX} px",
        distance <= CORRECT_PX,
    )


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
        f"curve. Homographies by OpenCV's USAC and by PoseLib, {HOMOGRAPHY_INLIER_PX:g} px; of "
        f"{ESTIMATES} seeds the median error counts. All but the matches in %; a pair without a "
        "homography is a failure."
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
            "inlier_px": HOMOGRAPHY_INLIER_PX,
            "estimates": ESTIMATES,
            "homography_estimators": list(homography_estimators()),
        },
    )
