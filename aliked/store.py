"""Features of many images in one HDF5 file, laid out as hloc reads it, whole even after a kill.

A group for each image, of its name, has `keypoints` [N, 2], `scores` [N], `descriptors` [D, N],
float32, and `image_size` [2], int64 (width, height). The file's attribute `key` says, as JSON, what
the features depend on besides the image.
"""

import contextlib
import functools
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import h5py
import numpy as np

from aliked.errors import InputError, shown
from aliked.features import Features, check_features_type
from aliked.files import as_path, open_regular, whole_file

FORMAT = "aliked features 1"  # raised when the layout changes
PART_BYTES = 64 * 2**20  # features held in memory before they go into a file: what a kill can lose
MAX_OPEN = 64  # files
MAX_BYTES = 2**31  # of an array: a damaged file may claim anything
FIELDS, SIZE = ("keypoints", "scores", "descriptors"), "image_size"


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
        self.path, self.key, self.compression = as_path(path), _canonical(key), compression
        if not self.path.name:
            raise InputError(f"{self.path} is a folder; give a file of features")
        self.parts = self.path.with_name(f"{self.path.name}.parts")
        self._pending: dict[str, tuple[Features, tuple[int, int]]] = {}
        self._pending_bytes = 0
        self._where: dict[str, Path] = {}
        if self.path.exists():
            self._find(self.path)
        self._find(*self._part_files())

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

    def write(self, name: str, features: Features, size: tuple[int, int]) -> None:
        """Put in the features of an image of this `size` (width, height), replacing older ones.

        `name` is a relative path with forward slashes, as hloc and COLMAP name images.
        """
        _check_name(name)
        _check_entry(features, size)
        old = self._pending.pop(name, None)
        self._pending_bytes += _bytes(features) - (_bytes(old[0]) if old else 0)
        self._pending[name] = features, (int(size[0]), int(size[1]))
        if self._pending_bytes >= PART_BYTES:
            self.flush()

    def read(self, name: str) -> Features:
        """Return an image's features. `InputError` where they are damaged, KeyError if missing."""
        return self._read(name)[0]

    def size(self, name: str) -> tuple[int, int]:
        """Return (width, height) of an image; errors as those of `read`."""
        return self._read(name)[1]

    def flush(self) -> None:
        """Put what was written on the disk."""
        if self._pending:
            part = self.parts / f"{os.getpid()}-{uuid.uuid4().hex}.h5"
            with self._new_file(part) as file:
                for name, (features, size) in self._pending.items():
                    self._write(file, name, features, size)
            self._where |= dict.fromkeys(self._pending, part)
            self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Join everything that was written to the one file."""
        self.flush()
        parts = self._part_files()
        if not parts:
            return
        self._find(*parts)  # other processes' too
        with self._new_file(self.path) as file, _Sources() as sources:
            for name in self.names():
                path = self._where[name]
                with _sentence(path):  # as it is stored: to read and write it takes far longer
                    sources[path].copy(name, file, name)
        self._where = dict.fromkeys(self._where, self.path)
        for part in (*parts, *filter(_is_left, self.parts.glob(".*"))):
            part.unlink()
        with contextlib.suppress(OSError):  # another process has begun to write
            self.parts.rmdir()

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
        return sorted(p for p in self.parts.glob("*.h5") if not p.name.startswith("."))

    def _find(self, *paths: Path) -> None:
        """Take in what is in files of this store."""
        for path in paths:
            self._where |= dict.fromkeys(_names(path, self.key), path)

    @contextlib.contextmanager
    def _new_file(self, path: Path) -> Iterator[h5py.File]:
        with whole_file(path) as partial, _hdf5(partial) as file:
            file.attrs["format"], file.attrs["key"] = FORMAT, self.key
            yield file

    def _write(self, file: h5py.File, name: str, features: Features, size: tuple[int, int]) -> None:
        arrays = features.keypoints, features.scores, features.descriptors.T
        arrays = [np.ascontiguousarray(values, np.float32) for values in arrays]
        fields = dict(zip(FIELDS, arrays, strict=True)) | {SIZE: np.array(size, np.int64)}
        if self.compression and len(features):  # what is compressed has to have rows
            group = file.create_group(name)
            for field, values in fields.items():
                compression = None if field == SIZE else self.compression
                group.create_dataset(field, data=values, compression=compression)
            return
        # By HDF5's own functions: h5py's take as long again as all the rest.
        group = h5py.h5g.create(file.id, name.encode(), lcpl=_links())
        for field, values in fields.items():
            space = h5py.h5s.create_simple(values.shape)
            kind = h5py.h5t.py_create(values.dtype)
            dataset = h5py.h5d.create(group, field.encode(), kind, space, _plain())
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, values)

    def _read(self, name: str) -> tuple[Features, tuple[int, int]]:
        if name in self._pending:
            return self._pending[name]
        path = self._where[name]
        with _sentence(path), h5py.File(path, "r") as file:
            keypoints, scores, descriptors = (
                _array(file[name][field], "f", np.float32) for field in FIELDS
            )
            size = _array(file[name][SIZE], "iu", np.int64)
            count = len(scores)
            if (keypoints.shape, scores.shape, size.shape) != ((count, 2), (count,), (2,)):
                raise ValueError(f"the arrays of {name} have other shapes")
            if descriptors.ndim != 2 or descriptors.shape[1] != count:
                raise ValueError(f"{name} has {count} keypoints and other descriptors")
            if not all(np.isfinite(array).all() for array in (keypoints, scores, descriptors)):
                raise ValueError(f"there is NaN or infinity in {name}")
        features = Features(keypoints, scores, np.ascontiguousarray(descriptors.T))
        return features, (int(size[0]), int(size[1]))


@functools.cache
def _links() -> h5py.h5p.PropLCID:
    """A link with a name in UTF-8, below groups that are made with it."""
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


@functools.cache
def _plain() -> h5py.h5p.PropDCID:
    """A dataset without the time at which it was made."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_obj_track_times(False)
    return properties


class _Sources:
    """Files to be copied from, the last ones kept open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, h5py.File] = OrderedDict()

    def __getitem__(self, path: Path) -> h5py.File:
        if path not in self._open:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = h5py.File(path, "r")
        self._open.move_to_end(path)
        return self._open[path]

    def __enter__(self) -> "_Sources":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()


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
        left = memoryview(data)
        with self._keep_error():
            while self.error is None and left:
                left = left[self._file.write(left) :]
        return len(data)

    def truncate(self, size: int) -> int:
        """Truncate, or after an error do as if."""
        with self._keep_error():
            if self.error is None:
                self._file.truncate(size)
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""

    @contextlib.contextmanager
    def _keep_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file; `OSError` where it cannot be written."""
    with open(path, "w+b", buffering=0) as raw:  # HDF5 has buffers of its own
        disk = _Disk(raw)
        with h5py.File(disk, "w") as file:
            yield file
            if disk.error is not None:
                raise disk.error
        if disk.error is not None:
            raise disk.error


def _names(path: Path, key: str) -> list[str]:
    """The images in a file of features; `InputError` where it has another key."""
    found: list[str] = []
    # First as a file: FIFOs and devices never end.
    with _sentence(path), open_regular(path, most_bytes=None), h5py.File(path, "r") as file:
        kind, own_key = file.attrs.get("format"), file.attrs.get("key")
        file.visit(found.append)  # which follows no link to another file
    if not isinstance(kind, str) or kind != FORMAT or not isinstance(own_key, str):
        raise InputError(f"{path} is no file of ALIKED features; move it, or name another file")
    if own_key != key:
        raise InputError(
            f"{path} has features of another {_difference(own_key, key)}; name another file, or "
            "remove this one"
        )
    everything = set(found)
    names = (name.removesuffix(f"/{SIZE}") for name in found if name.endswith(f"/{SIZE}"))
    return [name for name in names if everything.issuperset(f"{name}/{f}" for f in FIELDS)]


def _array(dataset: h5py.Dataset, kinds: str, dtype: type) -> np.ndarray:
    """The values of a dataset, after a look at what it claims to be."""
    if dataset.dtype.kind not in kinds or dataset.external or dataset.is_virtual:
        raise ValueError(f"{dataset.name} is of another type")
    if dataset.size * dataset.dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{dataset.name} claims {dataset.size} values")
    return dataset[()].astype(dtype, copy=False)


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turn what h5py raises about a file into an `InputError`."""
    try:
        yield
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"cannot read the features in {path} ({error}); remove it, and extract them again"
        ) from error


def _check_entry(features: Features, size: tuple[int, int]) -> None:
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
        return ", ".join(f"{n} ({own.get(n)}, not {other.get(n)})"[:200] for n in names[:3])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "key"


def _bytes(features: Features) -> int:
    return features.descriptors.nbytes + features.keypoints.nbytes + features.scores.nbytes


def _is_left(scratch: Path) -> bool:
    """Whether the process that wrote this scratch file of a part, whose name begins so, is gone."""
    pid = scratch.name[1:].partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):  # no number, or somebody else's process
        pass
    return False
