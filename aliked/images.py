"""Photographs from files to uint8 RGB arrays, one at a time."""

import contextlib
import functools
import os
import re
import struct
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from aliked.errors import InputError, shown
from aliked.features import MIN_SIDE
from aliked.files import as_path, open_regular, read_file

if TYPE_CHECKING:
    from PIL import Image

try:
    import simplejpeg
except ImportError:  # OpenCV does it
    simplejpeg = None

MOST_BYTES = 2**31  # of an image file
# Formats of images that are not read: files of these are named when they are passed over.
OTHERS = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".exr")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def list_images(folder: Path) -> list[Path]:
    """The image files of `folder`, in natural order: `2.png` before `10.png`.

    Hidden files and sub-folders are left out. `InputError` when there is no such folder or no
    image in it.
    """
    folder = as_path(folder)
    try:
        _, _, files = next(os.walk(folder, onerror=_raise))  # a circle of links: a file
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot list the images of {folder} ({reason}); {_cure(folder)}"
        ) from error
    names = [name for name in files if _named_as_image(name)]
    _name_others(folder, files)
    if not names:
        raise InputError(f"no image in {folder}; give a folder with {', '.join(SUFFIXES)} files")
    return [folder / name for name in sorted(names, key=natural)]


def _raise(error: OSError) -> None:
    raise error


def find_images(folder: Path) -> list[str]:
    """The image files of `folder` and all folders below, as COLMAP and hloc name them.

    Paths relative to `folder`, with forward slashes, in natural order; what is hidden is left out.
    `InputError` when there is no such folder or no image in it.
    """
    folder = as_path(folder)
    list_error: list[OSError] = []
    names = []
    for parent, folders, files in os.walk(folder, onerror=list_error.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(parent).relative_to(folder).as_posix()
        names += files if below == "." else [f"{below}/{name}" for name in files]
    if list_error:
        error = list_error[0]
        raise InputError(
            f"cannot list the images of {error.filename} ({error.strerror}); give a folder of "
            "images that can be read"
        ) from error
    _name_others(folder, names)
    names = [name for name in names if _named_as_image(name.rpartition("/")[2])]
    if not names:
        raise InputError(
            f"no image in {folder} or below; give a folder with {', '.join(SUFFIXES)} files"
        )
    return sorted(names, key=natural)


class Header(NamedTuple):
    """What a file says of its image: the size as stored, and how a viewer turns it."""

    width: int
    height: int
    orientation: int  # EXIF's, 1 to 8; 1 is upright


HEAD_BYTES = 2**16 + 2**13  # read for a header: EXIF takes up to 64 KiB of a JPEG
MOST_PIXELS = 2**30  # of an image, as OpenCV has it
PNG = b"\x89PNG\r\n\x1a\n"
JPEG, APP1 = b"\xff\xd8", 0xE1  # how a JPEG begins; its segments of EXIF and of XMP
EXIF, XMP_ORIENTATION = b"Exif\0\0", b"tiff:Orientation"
SHORT = 3  # EXIF's numbers of 16 bits


def read_header(path: Path) -> Header:
    """The size and the EXIF orientation of an image file, its pixels not decoded where possible.

    `InputError` names a file that cannot be read as an image.
    """
    header = _plain_header(read_file(path, MOST_BYTES, HEAD_BYTES)) or _full_header(path)
    if header is None or not 0 < header.width * header.height <= MOST_PIXELS:
        height, width = load_image(path).shape[:2]  # it says what is wrong with a file
        header = Header(width, height, 1)
    return header


def _plain_header(head: bytes) -> Header | None:
    """The header of a JPEG, or of a PNG without EXIF, as Pillow reads it but in far less time.

    One process reads those of all images: by Pillow 3,000 a second, for which GPUs would wait.
    None where Pillow has to look: at what is unusual, or comes after these bytes.
    """
    if head.startswith(PNG) and b"eXIf" not in head:
        return Header(*(int.from_bytes(head[at : at + 4], "big") for at in (16, 20)), 1)
    if not head.startswith(JPEG):
        return None
    at, exif = 2, None
    while at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker == APP1:
            segment = head[at + 4 : at + 2 + length]
            if XMP_ORIENTATION in segment or (exif is not None and segment.startswith(EXIF)):
                return None
            exif = segment.removeprefix(EXIF) if segment.startswith(EXIF) else exif
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame's header
            orientation = 1 if exif is None else _orientation(exif)
            height, width = (int.from_bytes(head[i : i + 2], "big") for i in (at + 5, at + 7))
            return None if orientation is None else Header(width, height, orientation)
        at += 2 + length
    return None


def _orientation(exif: bytes) -> int | None:
    """The orientation in EXIF's first list of tags, or 1; None where these are not as usual."""
    entries = [] if exif[:4] in BIG_TIFF else _tiff_entries(exif)
    tags = [tag for tag, *_ in entries]
    if not tags or tags != sorted(set(tags)):
        return None
    given = [entry[1:] for entry in entries if entry[0] == ORIENTATION] or [(SHORT, 1, 1)]
    kind, count, value = given[0]
    if (kind, count) != (SHORT, 1):
        return None
    return value if value in range(1, 9) else 1


WIDTH, HEIGHT, ORIENTATION = 0x100, 0x101, 0x112  # tags of TIFF and EXIF


def _full_header(path: Path) -> Header | None:
    try:
        with open_header(path) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            # Pillow gives the size of a TIFF as it is turned.
            tags = getattr(image, "tag_v2", {})
            width, height = tags.get(WIDTH, image.width), tags.get(HEIGHT, image.height)
    except Exception:  # Pillow reads fewer kinds of pixels than OpenCV, and raises what it likes
        return None
    return Header(width, height, orientation if orientation in range(1, 9) else 1)


_pillow_limit = threading.Lock()  # held while it is lifted: Pillow has one for all threads


@contextlib.contextmanager
def open_header(path: Path) -> Iterator["Image.Image"]:
    """A file as Pillow opens it, for what its header says: no pixel of it is decoded.

    So an image may be larger than the 179 million pixels that Pillow takes for an attack, as those
    of some telephones are.
    """
    from PIL import Image  # here: photographs are decoded without it

    with (
        _pillow_limit,
        warnings.catch_warnings(),
        open_regular(path, MOST_BYTES) as file,
    ):
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(file) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def load_image(
    path: Path,
    stored: int | None = None,
    max_size: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode one file to uint8 [H, W, 3], RGB.

    The image is turned as its EXIF orientation says, as `cv2.imread` does; with that orientation
    given as `stored`, it is left as it is stored, as COLMAP and hloc read it. Palettes are looked
    up, grey is repeated in all three channels, alpha is dropped (the colours under it stay),
    16 bits are scaled to 8. `InputError` names a file that is not a whole, readable image, has
    floating-point or other pixels, colours that are easily mistaken, or is smaller than 5x5. An
    image whose longer side is above `max_size` is reduced to it. `out` is returned with the pixels
    in it where it has their shape; otherwise they are in an array of their own.
    """
    for name, value, least in (("stored", stored, 1), ("max_size", max_size, MIN_SIDE)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and (not whole or value < least):
            raise InputError(f"{name} is {shown(value)}; give a whole number from {least} on")
    data = np.frombuffer(read_file(path, MOST_BYTES), np.uint8)
    return reduced(decode_image(data, str(path), stored, out), max_size)


def reduced(image: np.ndarray, max_size: int | None) -> np.ndarray:
    """An image whose longer side is at most `max_size`, where that is given."""
    if not max_size or max(image.shape[:2]) <= max_size:
        return image
    scale = max_size / max(image.shape[:2])
    size = [max(MIN_SIDE, round(side * scale)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def load_readable(
    paths: Iterable[Path], max_size: int | None = None
) -> Iterator[tuple[Path, np.ndarray]]:
    """Load images one at a time; those that `load_image` refuses are named, counted, passed over.

    `InputError` at the end where there was none that it takes.
    """
    bad: list[InputError] = []
    good = 0
    for path in paths:
        try:
            image = load_image(path, max_size=max_size)
        except InputError as error:
            bad.append(error)
            print(f"skipped: {error}", file=sys.stderr)
            continue
        good += 1
        yield path, image
    if bad and not good:
        raise InputError(f"no image could be read, of {len(bad)}: {bad[0]}") from bad[0]
    if bad:
        print(f"{len(bad)} of {len(bad) + good} images skipped", file=sys.stderr)


def decode_image(
    data: np.ndarray, path: str, stored: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """`load_image` of a file's bytes, uint8 [N]; `path` is what errors call it."""
    if stored is not None and (image := _decode_jpeg(data, out)) is not None:
        return image
    _check_colours(path, data)
    image = _decode(data, 0 if stored is None else cv2.IMREAD_IGNORE_ORIENTATION)
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
    if stored is not None and data[:4].tobytes() in TIFF:
        image = _turned_back(image, stored)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, out)


def _decode_jpeg(data: np.ndarray, out: np.ndarray | None) -> np.ndarray | None:
    """A whole JPEG as stored, with the pixels that OpenCV gives it, in less time; or None.

    Both have libjpeg-turbo, but OpenCV first writes BGR elsewhere. It is to read what is None here,
    or to say what is wrong with it.
    """
    if simplejpeg is None or data[:2].tobytes() != JPEG:
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if min(height, width) < MIN_SIDE or height * width > MOST_PIXELS:
            return None
        fits = out is not None and (out.shape, out.dtype) == ((height, width, 3), np.uint8)
        if not fits or not out.flags.c_contiguous:
            return simplejpeg.decode_jpeg(data, "RGB")
        simplejpeg.decode_jpeg(data, "RGB", buffer=out)
    except ValueError:  # also what OpenCV puts up with
        return None
    return out


BIG_TIFF = (b"II+\0", b"MM\0+")  # with addresses of 64 bits
TIFF = (b"II*\0", b"MM\0*", *BIG_TIFF)


def _turned_back(image: np.ndarray, orientation: int) -> np.ndarray:
    """An upright image as it is stored: OpenCV turns a TIFF whatever it is asked for."""
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    return image[::rows, ::columns]


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
                "fixed input size needs images of one size; export it with --dynamic for any"
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


def _name_others(folder: Path, files: list[str]) -> None:
    """Say which files are images that are not read."""
    visible = (name for name in files if not name.rpartition("/")[2].startswith("."))
    others = sorted(name for name in visible if name.lower().endswith(OTHERS))
    if others:
        count = f"{len(others)} files" if len(others) > 1 else "a file"
        _say_once(
            f"{folder}: {count} passed over ({', '.join(others[:3])}{', ...' * (len(others) > 3)}):"
            f" only {', '.join(SUFFIXES)} are read"
        )


@functools.cache
def _say_once(sentence: str) -> None:
    """Print to stderr what a program that goes through a folder twice would say twice."""
    print(sentence, file=sys.stderr)


COMPRESSION, PHOTOMETRIC, SAMPLES = 0x103, 0x106, 0x115  # tags of TIFF
JPEG_IN_TIFF = (6, 7)
MOST_TAGS = 2**16  # of an image: a damaged file may claim any number
COLOUR_SPACES = (0, 1, 2, 3, 5)  # grey twice, RGB, a palette, CMYK


def _check_colours(path: str, data: np.ndarray) -> None:
    """Raise `InputError` for a TIFF whose colours may be others than OpenCV takes them for."""
    tags = _tiff_tags(data)
    jpeg = tags.get(COMPRESSION) in JPEG_IN_TIFF and tags.get(SAMPLES, 1) > 1
    if jpeg or tags.get(PHOTOMETRIC, 2) not in COLOUR_SPACES:
        what = "is a TIFF with a JPEG inside" if jpeg else "is a TIFF in another space than RGB"
        raise InputError(f"{path} {what}, whose colours are not read; save it as PNG or JPEG")


def _tiff_tags(data: np.ndarray) -> dict[int, int]:
    """The short numbers among the first image's tags; none for another kind of file."""
    entries = _tiff_entries(data)
    return {tag: value for tag, kind, count, value in entries if (kind, count) == (SHORT, 1)}


def _tiff_entries(data: bytes | np.ndarray) -> list[tuple[int, int, int, int]]:
    """Number, type, count and first 16 bits of the first image's tags, as far as there are any."""
    head = bytes(data[:16])
    if len(head) < 16 or head[:4] not in TIFF:
        return []
    order = "<" if head[:2] == b"II" else ">"
    big = head[:4] in BIG_TIFF
    first, number, entry = ("8xQ", "Q", "HHQH6x") if big else ("4xI8x", "H", "HHIH2x")
    (start,) = struct.unpack(order + first, head)
    after = start + struct.calcsize(number)
    counted = bytes(data[start:after])
    (count,) = struct.unpack(order + number, counted.ljust(after - start, b"\0"))
    length = struct.calcsize(order + entry)
    entries = bytes(data[after : after + length * min(count, MOST_TAGS)])
    return list(struct.iter_unpack(order + entry, entries[: len(entries) // length * length]))


def _named_as_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: runs of digits compare as numbers; the name itself decides between 01 and 1."""
    parts: list[str | int] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def _decode(data: np.ndarray, flags: int = 0) -> np.ndarray | None:
    """Bytes of an image file to [H, W, 3] BGR of any depth; None where that cannot be done.

    From memory rather than from the file: of a truncated JPEG `cv2.imread` returns what it could
    read and fills up with grey, `cv2.imdecode` refuses it. BGR, because with IMREAD_COLOR_RGB
    OpenCV 5.0 returns wrong pixels for 16-bit TIFF.
    """
    with quiet_opencv():
        try:
            return cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | flags)
        except cv2.error:  # an empty file, or more pixels than OpenCV's limit
            return None


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's own log lines off the terminal: the caller says what is wrong, once.

    The level is one for all threads: a program that decodes in several keeps them all inside.
    """
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


@contextlib.contextmanager
def one_opencv_thread() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own: every image has one already."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
