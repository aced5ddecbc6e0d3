"""Pairs of images with known homographies: sequences with a file of them, and HPatches' scenes."""

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked.errors import InputError
from aliked.files import read_file, real_path
from aliked.hpatches import FOLDER, missing_scenes
from aliked.images import SUFFIXES, list_images, load_image
from evaluation.changes import CHANGES, LEVELS, change
from evaluation.pairs import Dataset, Image, Pair, Resize

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
    name = real_path(folder).name
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
