"""HDF5 files of very many groups of arrays, written without the library.

A library comes before code of one's own, but here it is too slow: it takes 89 to 98 us for a group
of four arrays at best, in one process at a time, and two GPUs that are to be kept busy leave 150 us
for an image and all that is done to it. Here a group is bytes that anybody can write once they know
where: its names and the headers of its arrays, then these themselves. Only what finds the groups by
name is written at the end, in one piece. Reading and compressing are the library's.

The format is the oldest, superblock 0 with symbol tables, which h5py writes by default and every
version of the library reads and goes on with. Names in comments are those of its specification,
https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html.
"""

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import h5py
import numpy as np

from aliked.errors import InputError
from aliked.files import write_at

START = 96  # of the first group: the superblock is before it
NOWHERE = 2**64 - 1  # the address of what has no bytes
LEAF, NODE = 4, 16  # half of the names in a leaf, of the children of a node: the library's own
LEAF_BYTES, NODE_BYTES = 8 + 2 * LEAF * 40, 24 + 2 * NODE * 16 + 8
HEADER = 16  # bytes of an object's, before its messages
DATASPACE, DATATYPE, FILL, LAYOUT, SYMBOLS = 0x01, 0x03, 0x05, 0x08, 0x11  # kinds of messages


class Member(NamedTuple):
    """An array of a group."""

    name: str
    shape: tuple[int, ...]
    kind: str  # of its numbers, as NumPy writes it

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * np.dtype(self.kind).itemsize


class Plan(NamedTuple):
    """A group of arrays, wherever it is written."""

    header: np.ndarray  # uint8, what comes before the arrays, at 0
    addresses: np.ndarray  # uint64, those in it
    places: np.ndarray  # [addresses, 8], their bytes in it
    arrays: list[int]  # from its start
    nbytes: int

    def pieces_at(self, at: int, arrays: list[np.ndarray]) -> list[np.ndarray | bytes]:
        """The bytes of the group of these arrays that is written at `at`, piece by piece."""
        header = self.header.copy()
        header[self.places] = (self.addresses + np.uint64(at)).view(np.uint8).reshape(-1, 8)
        padded = ((array, bytes(_padded(array.nbytes) - array.nbytes)) for array in arrays)
        return [header, *itertools.chain.from_iterable(padded)]


@functools.lru_cache(4096)  # a plan takes 0.1 ms; images have one of so many numbers of keypoints
def plan(members: tuple[Member, ...]) -> Plan:
    """How a group of these arrays is written; it begins with the group's own header."""
    header, arrays, end = _members(members, 0)
    # Addresses are found by their highest byte, which nothing else changes.
    moved, _, _ = _members(members, 2**56)
    first = np.flatnonzero(header != moved) - 7
    places = first[:, None] + np.arange(8)
    return Plan(header, header[places].view("<u8")[:, 0], places, arrays, end)


def _members(members: tuple[Member, ...], at: int) -> tuple[np.ndarray, list[int], int]:
    """The header of a group and those of its arrays; where from `at` these are, and end."""
    end = len(_group([(member.name.encode(), 0) for member in members], at))
    entries, arrays = [], []
    for member in members:
        entries.append((member.name.encode(), at + end))
        end += len(_dataset(member, 0))
    for member in members:
        arrays.append(end)
        end += _padded(member.nbytes)
    group = _group(sorted(entries), at)
    datasets = (_dataset(m, at + array) for m, array in zip(members, arrays, strict=True))
    return np.frombuffer(b"".join((group, *datasets)), np.uint8), arrays, end


class Folders:
    """The groups that are in a file, by their paths."""

    def __init__(self) -> None:
        # Addresses, by the last name.
        self._folders: dict[str, dict[str, int | None]] = {"": {}}

    def __contains__(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        return name in self._folders.get(folder, ())

    def add(self, path: str, address: int | None) -> None:
        """Put in a group that begins at this address, or that the library is to make later."""
        folder, _, name = path.rpartition("/")
        while folder not in self._folders:
            self._folders[folder] = {}
            folder = folder.rpartition("/")[0]
        self._folders[path.rpartition("/")[0]][name] = address

    def write(self, descriptor: int, at: int) -> None:
        """End a file whose groups end at `at`: write what finds them, and the superblock."""
        for path in sorted(self._folders, key=_depth, reverse=True):
            found = self._folders[path].items()
            entries = [(name.encode(), place) for name, place in found if place is not None]
            group = _group(sorted(entries), at)
            write_at(descriptor, at, group)
            if path:
                if path in self:
                    raise InputError(f"{path} is an image and a folder of others; rename it")
                self.add(path, at)
            at += len(group)
        write_at(descriptor, 0, _superblock(group, at))


def _depth(folder: str) -> int:
    """How many folders deep it is; the root is above all."""
    return folder.count("/") + bool(folder)


def _superblock(root: bytes, end: int) -> bytes:
    """The beginning of a file that ends at `end` with its root group."""
    versions = struct.pack("<8s5B", b"\x89HDF\r\n\x1a\n", 0, 0, 0, 0, 0)
    sizes = struct.pack("<3BHHI", 8, 8, 0, LEAF, NODE, 0)
    addresses = struct.pack("<4Q", 0, NOWHERE, end, NOWHERE)
    symbols = root[HEADER + 8 : HEADER + 24]  # of the only message
    return versions + sizes + addresses + _entry(0, end - len(root), symbols)


def _entry(name: int, address: int, symbols: bytes = b"") -> bytes:
    """A symbol table entry: where its name is in the heap, its header, a group's own symbols."""
    return struct.pack("<QQI4x16s", name, address, bool(symbols), symbols)


def _group(entries: Sequence[tuple[bytes, int]], at: int) -> bytes:
    """A group that is written at `at`: of these names, in order, and their headers' addresses."""
    heap_at = at + HEADER + 24
    heap, names = _heap([name for name, _ in entries], heap_at)
    leaves_at, leaf = heap_at + len(heap), 2 * LEAF
    symbols = [_entry(name, entry[1]) for name, entry in zip(names, entries, strict=True)]
    leaves = [_leaf(symbols[i : i + leaf]) for i in range(0, len(symbols), leaf)]
    last = [names[min(i + leaf, len(names)) - 1] for i in range(0, len(names), leaf)]
    nodes = _tree(last, [leaves_at + i * LEAF_BYTES for i in range(len(leaves))])
    root_at = leaves_at + len(leaves) * LEAF_BYTES + (len(nodes) - 1) * NODE_BYTES
    header = _object(_message(SYMBOLS, struct.pack("<QQ", root_at, heap_at)))
    return b"".join((header, heap, *leaves, *nodes))


def _heap(names: Sequence[bytes], at: int) -> tuple[bytes, list[int]]:
    """A local heap of names, and where each begins in it; the empty one is at 0."""
    data, places = bytearray(8), []
    for name in names:
        places.append(len(data))
        data += name + bytes(8 - len(name) % 8)
    return struct.pack("<4sB3xQQQ", b"HEAP", 0, len(data), 1, at + 32) + data, places


def _leaf(symbols: list[bytes]) -> bytes:
    """A symbol table node."""
    head = struct.pack("<4sBxH", b"SNOD", 1, len(symbols))
    return b"".join((head, *symbols)).ljust(LEAF_BYTES, b"\0")


def _tree(last: list[int], children: list[int]) -> list[bytes]:
    """The nodes of a B-tree that are written after its leaves, the root at the end.

    `last` has the place of the last name in each leaf, `children` where the leaves are.
    """
    nodes: list[bytes] = []
    at = children[-1] + LEAF_BYTES if children else 0
    for level in itertools.count():
        starts = range(0, max(1, len(children)), 2 * NODE)
        places = [at + i * NODE_BYTES for i in range(len(starts))]
        beside = [NOWHERE, *places, NOWHERE]
        for i, start in enumerate(starts):
            below = children[start : start + 2 * NODE]
            head = struct.pack("<4sBBHQQ", b"TREE", 0, level, len(below), beside[i], beside[i + 2])
            pairs = zip(below, last[start:], strict=False)
            keys = [last[start - 1] if start else 0, *itertools.chain.from_iterable(pairs)]
            node = head + struct.pack(f"<{len(keys)}Q", *keys)
            nodes.append(node.ljust(NODE_BYTES, b"\0"))
        if len(starts) == 1:
            return nodes
        last = [last[min(start + 2 * NODE, len(last)) - 1] for start in starts]
        children, at = places, at + len(places) * NODE_BYTES


def _dataset(member: Member, at: int) -> bytes:
    """The header of an array whose numbers are at `at`."""
    # Version 3, contiguous.
    layout = struct.pack("<BBQQ", 3, 1, at if member.nbytes else NOWHERE, member.nbytes)
    return _object(_form(member.shape, member.kind) + _message(LAYOUT, layout), messages=4)


@functools.lru_cache
def _form(shape: tuple[int, ...], kind: str) -> bytes:
    """The messages about an array's shape and numbers, which have their place from the start."""
    space = struct.pack(f"<BBB5x{len(shape)}Q", 1, len(shape), 0, *shape)
    numbers = h5py.h5t.py_create(np.dtype(kind)).encode()[2:]  # after the encoding's own header
    fill = struct.pack("<4B", 2, 1, 1, 0)  # early allocation, never written, undefined
    return (
        _message(DATASPACE, space)
        + _message(DATATYPE, numbers, constant=True)
        + _message(FILL, fill, constant=True)
    )


def _object(body: bytes, messages: int = 1) -> bytes:
    """An object header, version 1."""
    return struct.pack("<BxHII4x", 1, messages, 1, len(body)) + body


def _message(kind: int, body: bytes, constant: bool = False) -> bytes:
    body = body.ljust(_padded(len(body)), b"\0")
    return struct.pack("<HHB3x", kind, len(body), constant) + body


def _padded(count: int) -> int:
    """Bytes up to the next multiple of eight."""
    return -(-count // 8) * 8
