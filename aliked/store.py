"""Features of many images in one HDF5 file, laid out as hloc reads it, whole even after a kill.

A group for each image, of its name, has `keypoints` [N, 2], `scores` [N], `descriptors` [D, N],
float32 (descriptors perhaps float16), and `image_size` [2], int64 (width, height). The file's
attribute `key` says, as JSON, what the features depend on besides the image.
"""

import contextlib
import functools
import json
import math
import mmap
import os
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np

from aliked.errors import InputError
from aliked.features import Features
from aliked.files import scratch_file, whole_file

FORMAT = "aliked features 1"  # raised when the layout changes
PART_BYTES = 64 * 2**20  # features held in memory before they go into a file: what a kill can lose
FLUSH_SECONDS = 10  # likewise
PART_SUFFIX = ".part"
MAX_OPEN = 64  # files
SMALL_BYTES = 2**16  # of an array that is copied at once
COPIED_BYTES = 2**23  # that a thread copies into the file at a time
MOST_COPIES = 4  # times that, under way
MAX_BYTES = 2**31  # of an array: a damaged file may claim anything
FIELDS, SIZE = ("keypoints", "scores", "descriptors"), "image_size"


Size = tuple[int, int]  # width and height


class FeatureStore:
    """The features of many images, by image name.

    While it grows, features go into files of their own beside it (`FILE.parts/`), each written
    whole or not at all: a kill loses the last `PART_BYTES`, and the next run goes on from there.
    `close`, or the end of a `with` block without an error, joins them to the one file. The same
    features give the same bytes, however often the run was interrupted. Several processes may
    `write` and `flush` into one store at a time; one of them closes it when the others are done.

        with FeatureStore.open("features.h5", {"model": "aliked-n16", "top_k": 1000}) as store:
            if "day/1.jpg" not in store:
                store.write("day/1.jpg", extractor(image), (width, height))
            features = store.read("day/1.jpg")
    """

    def __init__(self, path: Path, key: dict, compression: str | None = None) -> None:
        """See `open`."""
        self.path, self.key, self.compression = Path(path), _canonical(key), compression
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self.flushed: list[Path] = []  # parts, by this process
        self._pending: dict[str, tuple[Features, Size]] = {}
        self._pending_bytes, self._pending_since = 0, time.monotonic()
        self._where: dict[str, Path] = {}
        self._order: list[str] = []
        self._arranged: set[str] = set()
        self._joined: _Joined | None = None
        if self.path.exists():
            self._find(self.path)
        self.adopt(self._part_files())

    @classmethod
    def open(cls, path: Path, key: dict, compression: str | None = None) -> "FeatureStore":
        """Return the store in the file `path`, with what earlier runs left there.

        `key` is everything that the features depend on besides the image. `compression` ("lzf",
        "gzip") is that of the files written. `InputError` where a file that is there is damaged, no
        store of features, or one of another key.
        """
        return cls(path, key, compression)

    def __contains__(self, name: str) -> bool:
        return name in self._pending or name in self._where

    def __len__(self) -> int:
        return len(self.names())

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""
        return sorted(self._where.keys() | self._pending.keys())

    def write(self, name: str, features: Features, size: Size) -> None:
        """Put in the features of an image of this `size` (width, height), replacing older ones.

        `name` is a relative path with forward slashes, as hloc and COLMAP name images. Descriptors
        of float16 are kept as such.
        """
        _check_name(name)
        if not self._pending:
            self._pending_since = time.monotonic()
        old = self._pending.pop(name, None)
        self._pending_bytes += _bytes(features) - (_bytes(old[0]) if old else 0)
        self._pending[name] = features, (int(size[0]), int(size[1]))
        if self._pending_bytes >= PART_BYTES:
            self.flush()

    def read(self, name: str) -> Features:
        """Return an image's features. `InputError` where they are damaged, KeyError if missing."""
        return self._read(name)[0]

    def size(self, name: str) -> Size:
        """Return (width, height) of an image; errors as those of `read`."""
        return self._read(name)[1]

    def flush(self) -> None:
        """Put what was written on the disk."""
        if self._pending:
            part = self.parts / f"{os.getpid()}-{uuid.uuid4().hex}{PART_SUFFIX}"
            with whole_file(part) as partial:
                _write_part(partial, self.key, self._pending)
            self._where |= dict.fromkeys(self._pending, part)
            self._pending, self._pending_bytes = {}, 0
            self.flushed.append(part)

    def checkpoint(self) -> bool:
        """Flush if that is worth a file, or time; whether all that was written is on the disk."""
        age = time.monotonic() - self._pending_since
        if self._pending_bytes >= PART_BYTES // 2 or age > FLUSH_SECONDS:
            self.flush()
        return not self._pending

    def adopt(self, parts: Iterable[Path]) -> None:
        """Take in parts that another process has flushed."""
        for part in parts:
            with _sentence(part):
                index = _index(part)
                kind, key, names = index["format"], index["key"], index["images"].keys()
            _check_key(part, kind, key, self.key)
            self._where |= dict.fromkeys(names, part)

    def arrange(self, names: Iterable[str]) -> None:
        """Let these images, those that the store will have, follow in the file in this order."""
        new = [name for name in names if name not in self._arranged]
        self._order += new
        self._arranged.update(new)

    def join(self) -> None:
        """Put what was arranged into the file to be; an image that is missing stays out of it."""
        if self._joined is None:
            self._remove_left()
            scratch = self.parts / f"{os.getpid()}-{self.path.name}"
            self._joined = _Joined(scratch, self.key, self.compression)
        for name in self._order[self._joined.passed :]:
            self._joined.add(name, self._where.get(name))

    def close(self) -> None:
        """Join everything that was written to the one file: as arranged, then by name."""
        self.flush()
        parts = self._part_files()
        if not parts:
            return
        self.adopt(parts)  # other processes' too
        self.arrange(self.names())
        try:
            self.join()
            self._joined.finish(self.path)
        finally:
            self.discard()
        self._where = dict.fromkeys(self._where, self.path)
        for part in parts:
            part.unlink()
        with contextlib.suppress(OSError):  # another process has begun to write
            self.parts.rmdir()

    def discard(self) -> None:
        """Drop the file to be, where there is one; the parts stay."""
        if self._joined is not None:
            self._joined.close()
            self._joined = None

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the store, or after an error keep what was written for the next run."""
        if kind is None:
            self.close()
        else:
            self.discard()
            self.flush()

    def _remove_left(self) -> None:
        for scratch in filter(_is_left, self.parts.glob(".*")):
            scratch.unlink(missing_ok=True)

    def _part_files(self) -> list[Path]:
        # A kill can leave the scratch file of a part, which is hidden and not whole.
        return sorted(p for p in self.parts.glob(f"*{PART_SUFFIX}") if not p.name.startswith("."))

    def _find(self, path: Path) -> None:
        """Take in what is in the one file."""
        self._where |= dict.fromkeys(_names(path, self.key), path)

    def _read(self, name: str) -> tuple[Features, Size]:
        if name in self._pending:
            features, size = self._pending[name]
            return _in_float32(features), size
        path = self._where[name]
        with _sentence(path):
            keypoints, scores, descriptors, size = _checked(name, _Sources().arrays(path, name))
        descriptors = np.ascontiguousarray(descriptors.T)
        return _in_float32(Features(keypoints, scores, descriptors)), (int(size[0]), int(size[1]))


def _in_float32(features: Features) -> Features:
    return Features(*(np.array(values, np.float32) for values in vars(features).values()))


def _arrays(features: Features, size: Size) -> list[np.ndarray]:
    """An image's arrays as they lie in a file, in the order of `FIELDS` and SIZE."""
    kind = np.float16 if features.descriptors.dtype == np.float16 else np.float32
    return [
        np.ascontiguousarray(features.keypoints, np.float32),
        np.ascontiguousarray(features.scores, np.float32),
        np.ascontiguousarray(features.descriptors.T, kind),
        np.array(size, np.int64),
    ]


FLOAT = np.dtype("f4")


class Place(NamedTuple):
    """Where the arrays of an image begin in a part, and what they are."""

    start: int
    keypoints: int
    dimensions: int  # of a descriptor
    kind: str  # of the descriptors: "f4" or "f2"

    def arrays(self) -> list[tuple[int, tuple[int, ...], np.dtype]]:
        """First byte, shape and type of each, in the order of `_arrays`."""
        shapes = (self.keypoints, 2), (self.keypoints,), (self.dimensions, self.keypoints), (2,)
        kinds = FLOAT, FLOAT, np.dtype(self.kind), np.dtype("i8")
        found, at = [], self.start
        for shape, kind in zip(shapes, kinds, strict=True):
            found.append((at, shape, kind))
            at += math.prod(shape) * kind.itemsize
        return found


TAIL = 8  # bytes at the end of a part: how long the index before them is


def _write_part(path: Path, key: str, images: dict[str, tuple[Features, Size]]) -> None:
    """A part: the arrays of each image, one after the other, and an index as JSON behind them."""
    places: dict[str, Place] = {}
    with open(path, "wb", buffering=0) as file:
        at = 0
        for name, (features, size) in images.items():
            arrays = _arrays(features, size)
            descriptors = arrays[2]
            places[name] = Place(
                at, len(features), len(descriptors), descriptors.dtype.str.strip("<")
            )
            for array in arrays:
                at += _write_all(file, array)
        index = json.dumps({"format": FORMAT, "key": key, "images": places}).encode()
        _write_all(file, np.frombuffer(index, np.uint8))
        _write_all(file, np.array([len(index)], np.int64))


def _write_all(file: BinaryIO, array: np.ndarray) -> int:
    left = memoryview(array.reshape(-1).view(np.uint8))
    while left:
        left = left[file.write(left) :]
    return array.nbytes


def _index(part: Path) -> dict[str, Any]:
    """What the end of a part says: its format, its key, and the `Place` of each image."""
    with open(part, "rb") as file:
        end = file.seek(-TAIL, os.SEEK_END)
        length = int.from_bytes(file.read(TAIL), "little")
        if not 0 < length <= end:
            raise ValueError("its end is damaged")
        file.seek(end - length)
        return json.loads(file.read(length))


class _Joined:
    """The one file while it is written, among the parts.

    HDF5 gives each array its bytes in the file and keeps the books; a thread copies the bytes
    meanwhile, past HDF5, which takes longer for them and lets no other thread run.
    """

    def __init__(self, path: Path, key: str, compression: str | None):
        self.passed = 0  # images, of all that were arranged
        self._compression = compression
        self._scratch, self._files = contextlib.ExitStack(), contextlib.ExitStack()
        self._partial = self._scratch.enter_context(scratch_file(path))
        self._file, raw = self._files.enter_context(_hdf5(self._partial))
        self._file.attrs["format"], self._file.attrs["key"] = FORMAT, key
        self._copier = self._files.enter_context(ThreadPoolExecutor(1, "aliked-join"))
        self._descriptor = raw.fileno()
        self._sources = _Sources()
        self._placed: list[tuple[int, np.ndarray]] = []
        self._placed_bytes = 0
        self._copies: deque[Future] = deque()

    def add(self, name: str, path: Path | None) -> None:
        """Put in the next image from the file in which it is, if it is in any."""
        self.passed += 1
        if path is None:
            return
        with _sentence(path):
            arrays = self._sources.arrays(path, name)
        fields = dict(zip((*FIELDS, SIZE), arrays, strict=True))
        if self._compression and len(arrays[0]):  # what is compressed has to have rows
            group = self._file.create_group(name)
            for field, values in fields.items():
                compression = None if field == SIZE else self._compression
                group.create_dataset(field, data=values, compression=compression)
            return
        self._place(name, fields)
        if self._placed_bytes >= COPIED_BYTES:
            self._start_copy()
        if len(self._copies) > MOST_COPIES:
            self._copies.popleft().result()

    def _place(self, name: str, fields: dict[str, np.ndarray]) -> None:
        """Give each array its place in the file."""
        group = h5py.h5g.create(self._file.id, name.encode(), lcpl=_links())
        for field, values in fields.items():
            space = h5py.h5s.create_simple(values.shape)
            dataset = h5py.h5d.create(group, field.encode(), _kind(values.dtype), space, _plain())
            if values.nbytes < SMALL_BYTES:
                self._copy([(dataset.get_offset(), values)] if values.size else [])
            else:
                self._placed.append((dataset.get_offset(), values))
                self._placed_bytes += values.nbytes

    def _start_copy(self) -> None:
        self._copies.append(self._copier.submit(self._copy, self._placed))
        self._placed, self._placed_bytes = [], 0

    def _copy(self, placed: list[tuple[int, np.ndarray]]) -> None:
        for offset, values in placed:
            left = memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
            while left:
                written = os.pwrite(self._descriptor, left, offset)
                left, offset = left[written:], offset + written

    def finish(self, path: Path) -> None:
        """Put the file in its place."""
        self._start_copy()
        while self._copies:
            self._copies.popleft().result()
        self._files.close()
        os.replace(self._partial, path)
        self._scratch.close()

    def close(self) -> None:
        """Leave nothing behind."""
        with self._scratch, self._files:
            pass


@functools.cache
def _links() -> h5py.h5p.PropLCID:
    """A link with a name in UTF-8, below groups that are made with it."""
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


@functools.cache
def _plain() -> h5py.h5p.PropDCID:
    """A dataset that has its place at once, and not the time at which it was made."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return properties


@functools.cache
def _kind(dtype: np.dtype) -> h5py.h5t.TypeID:
    return h5py.h5t.py_create(dtype)


class _Sources:
    """Files that images are read from, the last ones kept open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Part | _Whole] = OrderedDict()

    def arrays(self, path: Path, name: str) -> list[np.ndarray]:
        """An image's arrays, in the order of `FIELDS` and SIZE; they outlast the file."""
        if path not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            self._open[path] = _Part(path) if path.suffix == PART_SUFFIX else _Whole(path)
        self._open.move_to_end(path)
        return self._open[path].arrays(name)


class _Part:
    """A part, its arrays not in memory before they are looked at."""

    def __init__(self, path: Path):
        self._places = _index(path)["images"]
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def arrays(self, name: str) -> list[np.ndarray]:
        """See `_Sources`."""
        found = []
        for start, shape, kind in Place(*self._places[name]).arrays():
            values = np.frombuffer(self._bytes, kind, math.prod(shape), start)
            found.append(values.reshape(shape))
        return found


class _Whole:
    """A file that was closed."""

    def __init__(self, path: Path):
        self._file = h5py.File(path, "r")

    def arrays(self, name: str) -> list[np.ndarray]:
        """See `_Sources`; after a look at what the file claims."""
        group = self._file[name]
        return [*(_array(group[field], "f") for field in FIELDS), _array(group[SIZE], "iu")]


class _Disk:
    """A file that HDF5 can write to and close whatever happens.

    HDF5 crashes the process where the disk is full: objects that it cannot write cannot be closed.
    So the first error is kept, nothing is written from then on, and the caller raises it.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None
        self.seek, self.tell = file.seek, file.tell
        self.read, self.readinto = file.read, file.readinto

    def write(self, data: memoryview) -> int:
        """Write all of it, or after an error do as if."""
        left = data
        try:
            while self.error is None and left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int) -> int:
        """Truncate, or after an error do as if."""
        try:
            if self.error is None:
                self._file.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[tuple[h5py.File, BinaryIO]]:
    """A new HDF5 file and the file below it; `OSError` where it cannot be written."""
    with open(path, "w+b", buffering=0) as raw:  # HDF5 has buffers of its own
        disk = _Disk(raw)
        with h5py.File(disk, "w") as file:
            yield file, raw
            if disk.error is not None:
                raise disk.error
        if disk.error is not None:
            raise disk.error


def _names(path: Path, key: str) -> list[str]:
    """The images in a file of features; `InputError` where it has another key."""
    found: list[str] = []
    with _sentence(path), h5py.File(path, "r") as file:
        kind, own_key = file.attrs.get("format"), file.attrs.get("key")
        file.visit(found.append)  # which follows no link to another file
    _check_key(path, kind, own_key, key)
    everything = set(found)
    names = (name.removesuffix(f"/{SIZE}") for name in found if name.endswith(f"/{SIZE}"))
    return [name for name in names if everything.issuperset(f"{name}/{f}" for f in FIELDS)]


def _check_key(path: Path, kind: object, found: object, wanted: str) -> None:
    if not isinstance(kind, str) or kind != FORMAT or not isinstance(found, str):
        raise InputError(f"{path} is no file of ALIKED features; move it, or name another file")
    if found != wanted:
        raise InputError(
            f"{path} has features of another {_difference(found, wanted)}; name another file, or "
            "remove this one"
        )


def _array(dataset: h5py.Dataset, kinds: str) -> np.ndarray:
    """The values of a dataset, after a look at what it claims to be."""
    if dataset.dtype.kind not in kinds or dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is of another type")
    if dataset.size * dataset.dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{dataset.name} claims {dataset.size} values")
    return dataset[()]


def _checked(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """An image's arrays, which ValueError says are none."""
    keypoints, scores, descriptors, size = arrays
    count = len(scores)
    if (keypoints.shape, scores.shape, size.shape) != ((count, 2), (count,), (2,)):
        raise ValueError(f"the arrays of {name} have other shapes")
    if descriptors.ndim != 2 or descriptors.shape[1] != count:
        raise ValueError(f"{name} has {count} keypoints and other descriptors")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"there is NaN or infinity in {name}")
    return arrays


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turn what h5py raises about a file into an `InputError`."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"cannot read the features in {path} ({error}); remove it, and extract them again"
        ) from error


def _check_name(name: str) -> None:
    odd = "\0" in name or any(part in ("", ".", "..") for part in name.split("/"))
    if odd or name.encode(errors="replace").decode() != name:
        raise InputError(
            f"{name!r} cannot name an image in a file of features; give a relative path in UTF-8"
        )


def _canonical(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def _difference(found: str, wanted: str) -> str:
    """The fields of two keys that differ, with their values."""
    try:
        own, other = json.loads(found), json.loads(wanted)
        names = [name for name in sorted({*own, *other}) if own.get(name) != other.get(name)]
        return ", ".join(f"{n} ({own.get(n)}, not {other.get(n)})"[:200] for n in names[:3])
    except (ValueError, TypeError, AttributeError):
        return "key"


def _bytes(features: Features) -> int:
    return features.descriptors.nbytes + features.keypoints.nbytes + features.scores.nbytes


def _is_left(scratch: Path) -> bool:
    """Whether the process that wrote this scratch file, whose name begins so, is gone."""
    pid = scratch.name[1:].partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):  # no number, or somebody else's process
        pass
    return False
