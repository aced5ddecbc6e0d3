"""Features of many images in one HDF5 file, laid out as hloc reads it, whole even after a kill.

A group for each image, of its name, has `keypoints` [N, 2], `scores` [N], `descriptors` [D, N],
float32 (descriptors perhaps float16), and `image_size` [2], int64 (width, height). The file's
attribute `key` says, as JSON, what the features depend on besides the image.
"""

import contextlib
import errno
import json
import math
import mmap
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np

from aliked.errors import InputError, shown
from aliked.features import Features, check_features_type
from aliked.files import (
    allocate,
    as_path,
    open_regular,
    whole_file,
    writable_folder,
    write_at,
)
from aliked.hdf5 import START, Folders, Member, Plan, plan

FORMAT = "aliked features 1"  # raised when the layout changes
PART_BYTES = 64 * 2**20  # features held in memory before they go into a file: what a kill can lose
FLUSH_SECONDS = 10  # likewise
PART_SUFFIX, FILE_SUFFIX, JOURNAL_SUFFIX = ".part", ".growing", ".journal"
MAX_OPEN = 64  # files
MOST_AHEAD = 2**28  # bytes of a file that has as many: allocated before they are written
MAX_BYTES = 2**31  # of an array: a damaged file may claim anything
FIELDS, SIZE = ("keypoints", "scores", "descriptors"), "image_size"
ARRAYS = (*FIELDS, SIZE)


Size = tuple[int, int]  # width and height


class FeatureStore:
    """The features of many images, by image name.

    While it grows, features go into files of their own beside it (`FILE.parts/`), each written
    whole or not at all: a kill loses the last `PART_BYTES`, and the next run goes on from there.
    `close`, or the end of a `with` block without an error, joins them to the one file. The same
    features give the same bytes, however often the run was interrupted. Several processes may
    `write` and `flush` into one store at a time; one of them closes it when the others are done.
    Or one process has it `grow`, and others write into that.

        with FeatureStore.open("features.h5", {"model": "aliked-n16", "top_k": 1000}) as store:
            if "day/1.jpg" not in store:
                store.write("day/1.jpg", extractor(image), (width, height))
            features = store.read("day/1.jpg")
    """

    def __init__(self, path: Path, key: dict, compression: str | None = None) -> None:
        """See `open`."""
        self.path, self.key, self.compression = as_path(path), _canonical(key), compression
        if not self.path.name:
            raise InputError(f"{self.path} is a folder; give a file of features")
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self._pending: dict[str, tuple[Features, Size]] = {}
        self._pending_bytes, self._pending_since = 0, time.monotonic()
        self._where: dict[str, Path] = {}
        self._order: list[str] = []
        self._arranged: set[str] = set()
        if self.path.exists():
            self._where |= dict.fromkeys(_names(self.path, self.key), self.path)
        self._find(self._part_files())

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
        _check_entry(features, size)
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

    def checkpoint(self) -> None:
        """Flush where the last time is long ago."""
        if time.monotonic() - self._pending_since > FLUSH_SECONDS:
            self.flush()

    def arrange(self, names: Iterable[str]) -> None:
        """Let these images, those that the store will have, follow in the file in this order."""
        new = [name for name in names if name not in self._arranged]
        self._order += new
        self._arranged.update(new)

    def is_closed(self) -> bool:
        """Whether all that it has is in the one file."""
        return self.path.exists() and not self._pending and not self._part_files()

    def grow(self) -> "GrowingFile":
        """Begin to write the one file anew, among the parts."""
        for scratch in filter(_is_left, self.parts.glob("*")):
            scratch.unlink(missing_ok=True)
        return GrowingFile(self)

    def close(self) -> None:
        """Join everything that was written to the one file: as arranged, then by name."""
        self.flush()
        self._find(self._part_files())  # other processes' too
        if self._part_files():
            with self.grow() as growing:
                growing.take(self._order)
                growing.finish()

    def replaced(self) -> None:
        """Read from the one file from now on, and remove the parts, which are all in it."""
        for path in self._part_files():
            _scratch_of(path).unlink(missing_ok=True)
            path.unlink()
        self._where = dict.fromkeys(self._where, self.path)
        with contextlib.suppress(OSError):  # another process has begun to write
            self.parts.rmdir()

    def arrays(self, name: str, sources: "_Sources") -> list[np.ndarray]:
        """An image's arrays as they lie in a file. `InputError` where they are damaged."""
        with _sentence(self._where[name]):
            return sources.arrays(self._where[name], name)

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
            self.flush()

    def _part_files(self) -> list[Path]:
        # A kill can leave the scratch file of a part, which is hidden and not whole.
        found = (p for p in self.parts.glob("*") if p.suffix in (PART_SUFFIX, JOURNAL_SUFFIX))
        return sorted(path for path in found if not path.name.startswith("."))

    def _find(self, parts: Iterable[Path]) -> None:
        """Index parts, and the unfinished files of runs that were killed."""
        for part in parts:
            if part.suffix == JOURNAL_SUFFIX and not _scratch_of(part).exists():
                continue  # killed after the file was in its place
            with _sentence(part):
                index = _journal(part) if part.suffix == JOURNAL_SUFFIX else _index(part)
                if not index:
                    continue
                kind, key, names = index["format"], index["key"], index["images"].keys()
            _check_key(part, kind, key, self.key)
            self._where |= dict.fromkeys(names, part)

    def _read(self, name: str) -> tuple[Features, Size]:
        if name in self._pending:
            features, size = self._pending[name]
            return _in_float32(features), size
        with _sentence(self._where[name]):
            keypoints, scores, descriptors, size = _checked(name, self.arrays(name, _Sources()))
        descriptors = np.ascontiguousarray(descriptors.T)
        return _in_float32(Features(keypoints, scores, descriptors)), (int(size[0]), int(size[1]))


def _in_float32(features: Features) -> Features:
    return Features(*(np.array(values, np.float32) for values in vars(features).values()))


def arrays_of(features: Features, size: Size) -> list[np.ndarray]:
    """An image's arrays as they lie in a file, in the order of `ARRAYS`."""
    kind = np.float16 if features.descriptors.dtype == np.float16 else np.float32
    return [
        np.ascontiguousarray(features.keypoints, np.float32),
        np.ascontiguousarray(features.scores, np.float32),
        np.ascontiguousarray(features.descriptors.T, kind),
        np.array(size, np.int64),
    ]


class Spot(NamedTuple):
    """Where an array lies in a file, and what it is."""

    offset: int
    shape: list[int]
    kind: str  # of its numbers, as NumPy writes it

    @classmethod
    def of(cls, array: np.ndarray, offset: int) -> "Spot":
        """That of an array."""
        return cls(offset, list(array.shape), array.dtype.str)


TAIL = 8  # bytes at the end of a part: how long the index before them is


def _write_part(path: Path, key: str, images: dict[str, tuple[Features, Size]]) -> None:
    """A part: the arrays of each image, one after the other, and an index as JSON behind them."""
    spots: dict[str, list[Spot]] = {}
    with open(path, "wb", buffering=0) as file:
        at = 0
        for name, entry in images.items():
            spots[name] = []
            for array in arrays_of(*entry):
                spots[name].append(Spot.of(array, at))
                write_at(file.fileno(), at, array)
                at += array.nbytes
        index = json.dumps({"format": FORMAT, "key": key, "images": spots}).encode()
        tail = index + len(index).to_bytes(TAIL, "little")
        write_at(file.fileno(), at, tail)


def _index(part: Path) -> dict[str, Any]:
    """What the end of a part says: its format, its key, and the `Spot`s of each image."""
    with open(part, "rb") as file:
        end = file.seek(-TAIL, os.SEEK_END)
        length = int.from_bytes(file.read(TAIL), "little")
        if not 0 < length <= end:
            raise ValueError("its end is damaged")
        file.seek(end - length)
        return json.loads(file.read(length))


def _journal(path: Path) -> dict[str, Any]:
    """What a journal says: a line about the file, and a line for images whose arrays are in it.

    Nothing where not even the first is whole.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # a kill or a full disk may cut off the last
    if not lines:
        return {}
    index = json.loads(lines[0]) | {"images": {}}
    for line in lines[1:]:
        index["images"] |= json.loads(line)
    return index


class GrowingFile:
    """The one file while it is written, among the parts. It is closed by a `with` block.

    It gives each image its place; the image itself may be put there by another process. What has
    been put is kept in a journal, so that a kill loses nothing: from it and the unfinished file
    the next run has the features.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._stack = contextlib.ExitStack()
        self.path = writable_folder(store.parts) / f"{os.getpid()}-{uuid.uuid4().hex}{FILE_SUFFIX}"
        self._descriptor, self._journal = self._new(self.path), None
        self._placed, self._end, self._allocated = Folders(), START, 0
        self._compressed: list[str] = []  # that come last, in this order
        self._sources = _Sources()

    def _new(self, path: Path) -> int:
        """A descriptor of a new file, closed with this one."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing behind but what is in the journal."""
        with contextlib.ExitStack() as stack:
            if self._journal is None:
                stack.callback(self.path.unlink, missing_ok=True)
            stack.push(self._stack)

    def take(self, names: Iterable[str]) -> None:
        """Put in images that the store has, next and in this order; others stay out."""
        for name in names:
            if name in self.store and name not in self._placed:
                arrays = self.store.arrays(name, self._sources)
                if self.store.compression and len(arrays[0]):  # what is compressed has to have rows
                    self._placed.add(name, None)
                    self._compressed.append(name)
                else:
                    at = self.place(name, image_bytes(arrays))
                    put_images(self._descriptor, at, {name: arrays})

    def place(self, name: str, nbytes: int) -> int:
        """Where the next image is to be put, which takes so many bytes."""
        _check_name(name)
        self._placed.add(name, self._end)
        at, self._end = self._end, self._end + nbytes
        if self._end > self._allocated:  # HDF5 gives back what is left of it
            more = nbytes + min(at, MOST_AHEAD)
            allocate(self._descriptor, at, more)
            self._allocated = at + more
        return at

    def note(self, line: bytes) -> None:
        """Keep in the journal that images have been put into the file: see `journal_line`."""
        if self._journal is None:
            self._journal = self._new(self.path.with_suffix(JOURNAL_SUFFIX))
            line = json.dumps({"format": FORMAT, "key": self.store.key}).encode() + b"\n" + line
        if os.write(self._journal, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def finish(self) -> None:
        """Put in what else the store has, and put the file in its place, where it has an image."""
        self.take(self.store.names())
        if not self._compressed and self._end == START:
            self._stack.close()
            self.path.unlink()
        else:
            self._placed.write(self._descriptor, self._end)
            with _hdf5(self.path) as file:
                file.attrs["format"], file.attrs["key"] = FORMAT, self.store.key
                self._compress(file)
            self._stack.close()
            os.replace(self.path, self.store.path)
        self.store.replaced()

    def _compress(self, file: h5py.File) -> None:
        for name in self._compressed:
            group, arrays = file.create_group(name), self.store.arrays(name, self._sources)
            for field, values in zip(ARRAYS, arrays, strict=True):
                compression = None if field == SIZE else self.store.compression
                group.create_dataset(field, data=values, compression=compression)


def image_bytes(arrays: list[np.ndarray]) -> int:
    """What an image takes in the file, given what `arrays_of` it returns."""
    return _plan(arrays).nbytes


def put_images(
    descriptor: int, at: int, images: dict[str, list[np.ndarray]]
) -> dict[str, list[Spot]]:
    """Write images into the file, the first at its place; where the arrays of each are."""
    spots, pieces, end = {}, [], at
    for name, arrays in images.items():
        where = _plan(arrays)
        starts = zip(arrays, where.arrays, strict=True)
        spots[name] = [Spot.of(array, end + start) for array, start in starts]
        pieces += where.pieces_at(end, arrays)
        end += where.nbytes
    # One call for all: after each a thread of Python waits for its turn again, and with it would
    # every process that waits for the file.
    write_at(descriptor, at, *pieces, alone=True)
    return spots


def _plan(arrays: list[np.ndarray]) -> Plan:
    pairs = zip(ARRAYS, arrays, strict=True)
    return plan(tuple(Member(field, array.shape, array.dtype.str) for field, array in pairs))


def journal_line(images: dict[str, list[Spot]]) -> bytes:
    """What a journal says of images that have been put into the file."""
    return json.dumps(images).encode() + b"\n"


def _scratch_of(journal: Path) -> Path:
    """The file that a journal is about."""
    return journal.with_suffix(FILE_SUFFIX)


class _Sources:
    """Files that images are read from, the last ones kept open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, _Mapped | _Whole] = OrderedDict()

    def arrays(self, path: Path, name: str) -> list[np.ndarray]:
        """An image's arrays, in the order of `ARRAYS`; they outlast the file."""
        if path not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)
            kinds = {PART_SUFFIX: _Mapped.part, JOURNAL_SUFFIX: _Mapped.unfinished}
            self._open[path] = kinds.get(path.suffix, _Whole)(path)
        self._open.move_to_end(path)
        return self._open[path].arrays(name)


class _Mapped:
    """A file of arrays one after the other, none in memory before it is looked at."""

    def __init__(self, path: Path, images: dict[str, list[Spot]]):
        self._images = images
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def part(cls, path: Path) -> "_Mapped":
        """A part."""
        return cls(path, _index(path)["images"])

    @classmethod
    def unfinished(cls, journal: Path) -> "_Mapped":
        """A file that grew until its run was killed, as its journal tells."""
        return cls(_scratch_of(journal), _journal(journal)["images"])

    def arrays(self, name: str) -> list[np.ndarray]:
        """See `_Sources`."""
        return [
            np.frombuffer(self._bytes, kind, math.prod(shape), offset).reshape(shape)
            for offset, shape, kind in self._images[name]
        ]


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
def _hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to be changed; `OSError` where it cannot be written."""
    with open(path, "r+b", buffering=0) as raw:  # HDF5 has buffers of its own
        disk = _Disk(raw)
        with h5py.File(disk, "r+") as file:
            yield file
            if disk.error is not None:
                raise disk.error
        if disk.error is not None:
            raise disk.error


def _names(path: Path, key: str) -> list[str]:
    """The images in a file of features; `InputError` where it has another key."""
    found: list[str] = []
    with _sentence(path):
        with open_regular(path, most_bytes=None):  # first as a file: FIFOs and devices never end
            pass
        with h5py.File(path, "r") as file:
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
            f"{path} has other features ({_difference(found, wanted)}); name another file, or "
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
    """An image's arrays; ValueError where they do not go together."""
    keypoints, scores, descriptors, size = arrays
    count = len(scores)
    if (keypoints.shape, scores.shape, size.shape) != ((count, 2), (count,), (2,)):
        raise ValueError(f"the arrays of {name} have other shapes")
    if descriptors.ndim != 2 or descriptors.shape[1] != count:
        raise ValueError(f"{name} has {count} keypoints and other descriptors")
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(f"there is NaN or infinity in {name}")
    return arrays


# What h5py, NumPy and JSON raise about a file that is not what it claims to be.
DAMAGED = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
)


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turn what is raised about a file into an `InputError`."""
    try:
        yield
    except DAMAGED as error:
        raise InputError(
            f"cannot read the features in {path} ({str(error)[:300]}); name another file, or "
            "remove this one"
        ) from error


def _check_entry(features: Features, size: Size) -> None:
    check_features_type(features)
    whole = isinstance(size, tuple | list) and all(isinstance(side, Integral) for side in size)
    if not whole or len(size) != 2:
        raise InputError(f"the image size is {shown(size)}; give (width, height) in pixels")


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise InputError(f"{shown(name)} is no name of an image; give a relative path as text")
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
        return ", ".join(f"{n} {own.get(n)}, not {other.get(n)}"[:200] for n in names[:3])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "its key is damaged"


def _bytes(features: Features) -> int:
    return features.descriptors.nbytes + features.keypoints.nbytes + features.scores.nbytes


def _is_left(path: Path) -> bool:
    """Whether this was half written by a process that is gone: its number begins the name."""
    unfinished = path.suffix == FILE_SUFFIX and not path.with_suffix(JOURNAL_SUFFIX).exists()
    if not path.name.startswith(".") and not unfinished:
        return False
    pid = path.name.lstrip(".").partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):  # no number, or somebody else's process
        pass
    return False
