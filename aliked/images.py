"""Photographs from files to uint8 RGB arrays, one at a time."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from aliked.errors import InputError
from aliked.features import MIN_SIDE

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def list_images(folder: Path) -> list[Path]:
    """The image files of `folder`, in natural order: `2.png` before `10.png`.

    Hidden files and sub-folders are left out. `InputError` when there is no such folder or no
    image in it.
    """
    folder = Path(folder)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _is_image(entry)]
    except OSError as error:
        raise InputError(
            f"cannot list the images of {folder} ({error.strerror}); {_cure(folder)}"
        ) from error
    if not names:
        raise InputError(f"no image in {folder}; give a folder with {', '.join(SUFFIXES)} files")
    return [folder / name for name in sorted(names, key=_natural)]


def load_image(path: Path) -> np.ndarray:
    """Decode one file to uint8 [H, W, 3], RGB.

    The image is turned as its EXIF orientation says, as `cv2.imread` does. Palettes are looked
    up, grey is repeated in all three channels, alpha is dropped (the colours under it stay),
    16 bits are scaled to 8. `InputError` names a file that is not a whole, readable image, has
    floating-point or other pixels, or is smaller than 5x5.
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); replace or remove it") from error
    image = _decode(data)
    if image is None:
        raise InputError(
            f"{path} is truncated, damaged, too large or not an image; replace or remove it"
        )
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255
    if image.dtype != np.uint8:
        raise InputError(f"{path} has {image.dtype} pixels; save it with 8 or 16 bits per channel")
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{path} has {width}x{height} pixels but detection, which drops a border of 2, needs "
            f"{MIN_SIDE}x{MIN_SIDE}; remove it"
        )
    return np.ascontiguousarray(image[..., ::-1])


def require_same_size(
    images: Iterable[tuple[Path, np.ndarray]],
) -> Iterator[tuple[Path, np.ndarray]]:
    """Pass images on; raise `InputError` at the first whose size is not that of the first one."""
    first_path, first_size = None, None
    for path, image in images:
        size = f"{image.shape[1]}x{image.shape[0]}"
        if first_path is None:
            first_path, first_size = path, size
        if size != first_size:
            raise InputError(
                f"{path} has {size} pixels but {first_path} has {first_size}; a model with a "
                "fixed input size needs images of one size"
            )
        yield path, image


def _cure(folder: Path) -> str:
    """What to do where there is no such folder."""
    checkout = Path(__file__).resolve().parents[1]
    if folder.parts[:1] != ("assets",) or (checkout / "assets").is_dir():
        return "give a folder of images"
    return (
        "assets/ is part of the project's source and not of the installed package: give a folder "
        "of images of your own, or get some with `python download_data.py tum`"
    )


def _is_image(entry: os.DirEntry) -> bool:
    named = not entry.name.startswith(".") and entry.name.lower().endswith(SUFFIXES)
    return named and not entry.is_dir()


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: runs of digits compare as numbers; the name itself decides between 01 and 1."""
    parts: list[str | int] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def _decode(data: np.ndarray) -> np.ndarray | None:
    """Bytes of an image file to [H, W, 3] BGR of any depth; None where that cannot be done.

    From memory rather than from the file: of a truncated JPEG `cv2.imread` returns what it could
    read and fills up with grey, `cv2.imdecode` refuses it. BGR, because with IMREAD_COLOR_RGB
    OpenCV 5.0 returns wrong pixels for 16-bit TIFF.
    """
    with _quiet_opencv():
        try:
            return cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
        except cv2.error:  # an empty file, or more pixels than OpenCV's limit
            return None


@contextlib.contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's own log lines off the terminal: the caller says what is wrong, once."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
