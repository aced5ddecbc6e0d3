"""Copies of large arrays by several threads: one core uses only a part of memory's bandwidth.

NumPy lets other threads run while it copies.
"""

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

MOST_THREADS = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**25  # the most that glibc takes for a single array
PART_BYTES = 2 << 20  # a core copies them in 0.2 ms; less is done before another thread is awake


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where it runs on glibc.

    Otherwise every large image gets new pages from the system and gives them back: a third of the
    time of decoding a JPEG of 1600x1200.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            mallopt(option, KEPT_BYTES)


def in_parts(length: int, nbytes: int) -> list[slice]:
    """Equal slices of an axis of `length`, each of at least `PART_BYTES`."""
    count = max(1, min(length, nbytes // PART_BYTES))
    edges = [length * i // count for i in range(count + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def each(task: Callable[[slice], Any], parts: list[slice]) -> Iterator[Any]:
    """What `task` returns for each part, in order, several at a time; one by itself right here."""
    return _threads().map(task, parts) if len(parts) > 1 else map(task, parts)


def copied_parts(to: np.ndarray, values: np.ndarray) -> Iterator[slice]:
    """Copy `values`, part by part of the first axis; each part once it is there, in order."""

    def copy(rows: slice) -> slice:
        np.copyto(to[rows], values[rows])
        return rows

    return each(copy, in_parts(len(values), values.nbytes))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    # Linux tells which cores are this process's own.
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return ThreadPoolExecutor(min(MOST_THREADS, len(allowed(0))), "aliked-copy")


# A fork has no threads but its own: one that waited for its parent's would wait for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)
