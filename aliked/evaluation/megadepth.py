"""MegaDepth-1500: 1500 pairs of tourist photographs, in either of the layouts it is published in.

LoFTR's (arXiv 2104.00680): five `.npz` files of image pairs, and photographs in `Undistorted_SfM`.
Glue Factory's: `pairs_calibrated.txt` and photographs in `images`. Intrinsics come from COLMAP,
where the corner of the top-left pixel is (0, 0).
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np

from aliked.errors import InputError
from aliked.evaluation.images import Image, Resize
from aliked.evaluation.megadepth_npz import read_arrays
from aliked.evaluation.pairs import Pair
from aliked.evaluation.pose_data import Motion, PoseData, View, posed_pair
from aliked.evaluation.pose_text import read_lines, read_numbers
from aliked.images import load_image

Photographs = Callable[[str], Image]

NAME = "MegaDepth-1500"
RESIZE = Resize("long", 1600)
PAIRS = 1500
LISTS = ("0015_0.1_0.3", "0015_0.3_0.5", "0022_0.1_0.3", "0022_0.3_0.5", "0022_0.5_0.7")
LIST_FOLDERS = (".", "scene_info", "index", "megadepth_test_1500_scene_info")
PHOTOGRAPHS = "Undistorted_SfM"
TEXT_LIST = "pairs_calibrated.txt"
PAIR_LINE = (
    "two names, two intrinsics of 9 numbers, then a rotation of 9 and a translation of 3, or a 4x4 "
    "matrix"
)
CURE = (
    "MegaDepth-1500 is either megadepth1500.zip of https://cvg-data.inf.ethz.ch/megadepth, or "
    "megadepth_test_1500.tar of https://github.com/zju3dv/LoFTR (see its README) with the .npz "
    "files of its assets/megadepth_test_1500_scene_info beside Undistorted_SfM"
)


def is_megadepth(folder: Path) -> bool:
    """Whether a folder has any part of the data set."""
    folder = Path(folder)
    known = (PHOTOGRAPHS, TEXT_LIST, *(f"{place}/{LISTS[0]}.npz" for place in LIST_FOLDERS))
    return any((folder / name).exists() for name in known)


def megadepth_data(folder: Path) -> PoseData:
    """The pairs of the data set in `folder`; `InputError` where a part of it is missing."""
    folder = Path(folder)

    @cache  # one object per photograph, so that it is decoded and hashed once
    def photograph(name: str) -> Image:
        return Image(name, partial(load_image, folder / name), RESIZE)

    read = _pairs_of_text if (folder / TEXT_LIST).is_file() else _pairs_of_arrays
    pairs = read(folder, photograph)
    if len(pairs) != PAIRS:
        raise InputError(f"{folder} lists {len(pairs)} pairs, not {PAIRS}; fetch it again: {CURE}")
    data = PoseData(NAME, pairs, {"resize": str(RESIZE)})
    missing = [image.name for image in data.images if not (folder / image.name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {len(data.images)} photographs, such as "
            f"{missing[0]}; fetch it again: {CURE}"
        )
    return data


def from_colmap(intrinsics: np.ndarray) -> np.ndarray:
    """Intrinsics [3, 3] with (0, 0) at the image's corner, moved to its first pixel's centre."""
    shift = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    return intrinsics - shift


def _view(image: Image, intrinsics: np.ndarray, pose: np.ndarray) -> View:
    return View(image, from_colmap(np.asarray(intrinsics, float)), np.asarray(pose, float))


def _pairs_of_arrays(folder: Path, photograph: Photographs) -> list[Pair]:
    """LoFTR's layout."""
    pairs = []
    for name in LISTS:
        path = _list_file(folder, f"{name}.npz")
        arrays = read_arrays(path, ("image_paths", "intrinsics", "poses", "pair_infos"))
        scene, *overlap = name.split("_")
        try:
            pairs += _pairs_of_scene(photograph, arrays, f"{scene}, overlap {' to '.join(overlap)}")
        except (ValueError, TypeError, IndexError) as error:
            raise InputError(f"{path} is not a list of image pairs ({error}); {CURE}") from error
    return pairs


def _list_file(folder: Path, name: str) -> Path:
    for place in LIST_FOLDERS:
        if (folder / place / name).is_file():
            return folder / place / name
    raise InputError(f"{folder} has no {name}; {CURE}")


def _pairs_of_scene(
    photograph: Photographs, arrays: dict[str, np.ndarray], group: str
) -> list[Pair]:
    paths, intrinsics, poses = arrays["image_paths"], arrays["intrinsics"], arrays["poses"]
    views: dict[int, View] = {}
    pairs = []
    for (first, second), *_ in arrays["pair_infos"]:
        for index in {first, second} - views.keys():
            views[index] = _view(photograph(str(paths[index])), intrinsics[index], poses[index])
        a, b = views[first], views[second]
        pairs.append(posed_pair(f"{_short(a)} - {_short(b)}", group, Motion(a, b)))
    return pairs


def _short(view: View) -> str:
    """The name of a photograph without the folders that all have."""
    return view.image.name.removeprefix(f"{PHOTOGRAPHS}/").replace("/images/", "/")


def _pairs_of_text(folder: Path, photograph: Photographs) -> list[Pair]:
    """Glue Factory's layout."""
    path = folder / TEXT_LIST
    pairs = []
    for number, words in read_lines(path):
        matrix = len(words) == 2 + 18 + 16
        values = read_numbers(path, number, words[2:], 34 if matrix else 30, PAIR_LINE)
        intrinsics, pose = values[:18].reshape(2, 3, 3), np.eye(4)
        if matrix:
            pose = values[18:].reshape(4, 4)
        else:
            pose[:3, :3], pose[:3, 3] = values[18:27].reshape(3, 3), values[27:]
        first, second = (photograph(f"images/{name}") for name in words[:2])
        motion = Motion(_view(first, intrinsics[0], np.eye(4)), _view(second, intrinsics[1], pose))
        pairs.append(posed_pair(" - ".join(words[:2]), words[0].split("/")[0], motion))
    return pairs
