"""Mutual nearest neighbours: of descriptors, to match images; of keypoints, to compare runtimes."""

from collections.abc import Callable

import numpy as np

from aliked.errors import InputError

BLOCK = 2**22  # affinities held at a time: all of 20000 x 20000 would be 1.6 GB or more
NEAR_BLOCK = 2**18  # distances: what fits into the processor's cache is computed twice as fast


def match_mutual(
    descriptors0: np.ndarray, descriptors1: np.ndarray, min_similarity: float = 0.75
) -> np.ndarray:
    """Match the descriptors of two images that are each other's most similar.

    `descriptors0` [N, D] and `descriptors1` [M, D] have unit length, so that the dot product is
    the cosine similarity; pairs below `min_similarity` are dropped. Returns [P, 2] int64: the
    index into each, ascending in the first. `InputError` where they are no such arrays.
    """
    check_lengths(descriptors0, descriptors1, "match features of the same model")
    if not min_similarity >= -1:  # NaN too
        raise InputError(f"min_similarity is {min_similarity}; give a cosine, -1 to 1")
    i, j, similarity = _mutual_best(
        lambda rows: descriptors0[rows] @ descriptors1.T,
        len(descriptors0),
        len(descriptors1),
        BLOCK,
    )
    kept = similarity >= min_similarity
    return np.stack([i[kept], j[kept]], axis=1)


def check_lengths(descriptors0: np.ndarray, descriptors1: np.ndarray, cure: str) -> None:
    """Raise `InputError` unless both are float arrays [N, D] of one D."""
    for rows in (descriptors0, descriptors1):
        if not isinstance(rows, np.ndarray):
            raise InputError(f"the descriptors are a {type(rows).__name__}; give arrays [N, D]")
        if rows.ndim != 2 or rows.dtype.kind != "f":
            raise InputError(
                f"the descriptors are {rows.dtype} {list(rows.shape)}; give float arrays [N, D]"
            )
    lengths = descriptors0.shape[1], descriptors1.shape[1]
    if lengths[0] != lengths[1]:
        raise InputError(f"descriptors have {lengths[0]} and {lengths[1]} values; {cure}")


def mutual_nearest_keypoints(
    keypoints0: np.ndarray, keypoints1: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pair keypoints, [N, 2] and [M, 2], that are each other's nearest, at most `radius` px apart.

    Returns the indices into each, [P] int64, ascending in the first, and the distances in
    pixels, [P] float64. Coordinates are subtracted in float64: the |a|^2 + |b|^2 - 2ab form,
    which `torch.cdist` and others use, is wrong by whole pixels in float32.
    """
    a, b = keypoints0.astype(np.float64), keypoints1.astype(np.float64)

    def nearness(rows: slice) -> np.ndarray:
        dx = a[rows, None, 0] - b[None, :, 0]
        dy = a[rows, None, 1] - b[None, :, 1]
        return -(dx * dx + dy * dy)

    i, j, _ = _mutual_best(nearness, len(a), len(b), NEAR_BLOCK)
    distance = np.hypot(*(a[i] - b[j]).T)
    kept = distance <= radius
    return i[kept], j[kept], distance[kept]


def _mutual_best(
    affinity: Callable[[slice], np.ndarray], n: int, m: int, block_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (row, column) of an [n, m] matrix that are the largest of both their row and column.

    `affinity(rows)` computes some rows of it, `block_size` values at a time. Returns rows [P],
    columns [P], values [P]; among equal values the lowest index wins.
    """
    if n == 0 or m == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    row_best = np.empty(n, np.int64)
    column_best, column_value = np.zeros(m, np.int64), np.full(m, -np.inf)
    step = max(1, block_size // m)
    for start in range(0, n, step):
        block = affinity(slice(start, start + step))
        block = np.where(np.isnan(block), -np.inf, block)  # what is not a number has no partner
        row_best[start : start + step] = block.argmax(axis=1)
        best = block.argmax(axis=0)
        value = block[best, np.arange(m)]
        better = value > column_value
        column_best[better], column_value[better] = best[better] + start, value[better]
    rows = np.flatnonzero(column_best[row_best] == np.arange(n))
    columns = row_best[rows]
    return rows, columns, column_value[columns]
