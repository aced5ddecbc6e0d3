"""From the features of two images to matches: what a matcher is, and mutual nearest neighbours."""

import abc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from aliked.configs import CONFIGS, OFFICIAL
from aliked.errors import InputError, shown
from aliked.features import Features, check_features_type, check_tensors

MATCHERS = ("mutual", "lightglue")
LIGHTGLUE_DIM = 128  # length of the descriptors that the published weights match
BLOCK = 2**22  # affinities held at a time: all of 20000 x 20000 would be 1.6 GB or more
MIN_SIMILARITY = 0.75  # of mutual nearest neighbours, unless said otherwise
NEAR_BLOCK = 2**18  # distances: what fits into the processor's cache is computed twice as fast


Size = Sequence[float]  # width and height of an image, pixels


@dataclass(frozen=True)
class Matches:
    """Matches of one pair of images, ascending in the first image's index."""

    indices: np.ndarray  # [P, 2] int64: into the keypoints of each image
    scores: np.ndarray  # [P] float32, above the filter threshold, at most 1
    layers: int | None = None  # how many ran, where the matcher may stop early

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class PairMatches:
    """Keypoints of two images, as found and matched in one go. Rows beyond them are fill-ins."""

    keypoints0: np.ndarray  # [K, 2] float32, pixels, (x, y), centre of the top-left pixel = (0, 0)
    keypoints1: np.ndarray  # [K, 2] the same of the second image
    matches: Matches


NO_MATCHES = Matches(np.empty((0, 2), np.int64), np.empty(0, np.float32))


class Matcher(abc.ABC):
    """One runtime holding one matcher."""

    @abc.abstractmethod
    def prepare(self, features: Features, size: Size) -> Any:
        """What is kept of an image for all its pairs; `size` is (width, height) in pixels.

        Raises `InputError` for features that it cannot match.
        """

    @abc.abstractmethod
    def match_prepared(self, first: Any, second: Any) -> Matches:
        """Matches of what `prepare` made of two images."""

    def match(self, features0: Features, features1: Features, size0: Size, size1: Size) -> Matches:
        """Matches of two images' `Features`, given each image's (width, height) in pixels."""
        return self.match_prepared(self.prepare(features0, size0), self.prepare(features1, size1))


Arrays = dict[str, np.ndarray]

FEATURES = ("keypoints", "descriptors", "mask", "size")  # what is matched of an image
SIDES = (0, 1)  # behind the names of tensors that each of both images has
TENSORS = {  # LightGlue's graphs by name: their inputs and outputs
    "matcher": (
        tuple(f"{name}{side}" for side in SIDES for name in FEATURES),
        ("matches0", "scores0"),
    ),
    "pair": (("image0", "image1"), ("keypoints0", "keypoints1", "matches0", "scores0")),
}


class PairRuntime(abc.ABC):
    """One runtime of LightGlue, with the inputs and outputs of its ONNX file, by name.

    Its graph is "matcher", features of two images to matches, or "pair", two images to matches.
    "matcher" takes `keypoints` [1, K, 2], `descriptors` [1, K, D], `mask` [1, K] and `size` [1, 2]
    of both images, 0 or 1 behind each name; "pair" takes `image0` and `image1`, uint8 [1, H, W, 3].
    Both give `matches0` and `scores0` [1, K]; "pair" also `keypoints0` and `keypoints1` [1, K, 2].
    """

    name: str  # as the command line has it
    device: str  # where it runs: "cpu", "cuda" or "cuda:N"

    @abc.abstractmethod
    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""

    @abc.abstractmethod
    def to_device(self, inputs: Arrays) -> Any:
        """What `infer` takes, of arrays in host memory."""

    @abc.abstractmethod
    def infer(self, batch: Any) -> dict[str, Any]:
        """The outputs on the device, perhaps not ready yet: what a compute-only timing measures."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that `infer` started has finished."""


def padded_rows(features: Features, size: Size, rows: int) -> Arrays:
    """`keypoints`, `descriptors`, `mask` and `size` of an image, padded to `rows`; no batch."""
    count = len(features)
    padding = ((0, rows - count), (0, 0))
    return {
        "keypoints": np.pad(np.asarray(features.keypoints, np.float32), padding),
        "descriptors": np.pad(np.asarray(features.descriptors, np.float32), padding),
        "mask": np.arange(rows) < count,
        "size": np.asarray(size, np.float32),
    }


def matcher_inputs(
    features: tuple[Features, Features], sizes: tuple[Size, Size], rows: int
) -> Arrays:
    """The inputs of the graph "matcher" for two images, padded to `rows`."""
    sides = enumerate(zip(features, sizes, strict=True))
    return {
        f"{name}{side}": values[None]
        for side, image in sides
        for name, values in padded_rows(*image, rows).items()
    }


class MutualMatcher(Matcher):
    """Mutual nearest neighbours in descriptors, on the GPU where one is given.

    The score of a match is the cosine similarity of its descriptors.
    """

    def __init__(self, min_similarity: float = MIN_SIMILARITY, device: str = "cpu") -> None:
        """`device` is "cpu", "cuda", "cuda:N", or "auto": a GPU where PyTorch sees one."""
        check_similarity(min_similarity)
        if not isinstance(device, str):
            raise InputError(f"the device is {shown(device)}; give auto, cpu, cuda or cuda:N")
        if device != "cpu":
            from aliked.transfer import choose_device  # it loads PyTorch

            device = str(choose_device(device))
        self.min_similarity, self.device = min_similarity, device

    def prepare(self, features: Features, size: Size | None = None) -> Any:
        """The descriptors, on the device; the size makes no difference."""
        check_features_type(features)
        descriptors = np.ascontiguousarray(features.descriptors, np.float32)
        if self.device == "cpu":
            return descriptors
        import torch

        return torch.from_numpy(descriptors).to(self.device)

    def match_prepared(self, first: Any, second: Any) -> Matches:
        """Matches of two images' descriptors."""
        if self.device != "cpu":
            from aliked.transfer import download

            return matches_of_rows(*download(nearest_on_device(first, second, self.min_similarity)))
        indices = match_mutual(first, second, self.min_similarity)
        return Matches(indices, np.einsum("pd,pd->p", first[indices[:, 0]], second[indices[:, 1]]))


def match_mutual(
    descriptors0: Any, descriptors1: Any, min_similarity: float = MIN_SIMILARITY
) -> Any:
    """Match the descriptors of two images that are each other's most similar.

    `descriptors0` [N, D] and `descriptors1` [M, D] have unit length, so that the dot product is
    the cosine similarity; pairs below `min_similarity` are dropped. Returns [P, 2] int64: the
    index into each, ascending in the first. Arrays give an array; tensors give a tensor on their
    device, where the work is done. `InputError` where they are no such arrays or tensors.
    """
    check_similarity(min_similarity)
    torch = sys.modules.get("torch")  # who gives a tensor has it; nobody else waits for it
    if torch and isinstance(descriptors0, torch.Tensor):
        index, _ = nearest_on_device(descriptors0, descriptors1, min_similarity)
        (rows,) = torch.nonzero(index >= 0, as_tuple=True)
        return torch.stack([rows, index[rows].long()], dim=1)
    check_lengths(descriptors0, descriptors1, "match features of the same model")
    i, j, similarity = _mutual_best(
        lambda rows: descriptors0[rows] @ descriptors1.T,
        len(descriptors0),
        len(descriptors1),
        BLOCK,
    )
    kept = similarity >= min_similarity
    return np.stack([i[kept], j[kept]], axis=1)


def check_similarity(limit: float) -> None:
    """Raise `InputError` unless `limit` is a number from -1 on; above 1 nothing matches."""
    number = isinstance(limit, Real) and not isinstance(limit, bool)
    if not number or not limit >= -1:  # NaN too
        raise InputError(f"min_similarity is {shown(limit)}; give a cosine, -1 to 1")


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


def nearest_on_device(
    descriptors0: Any, descriptors1: Any, min_similarity: float
) -> tuple[Any, Any]:
    """For each row of tensor [N, D] its mutual nearest in [M, D], int [N], -1 for none.

    Also the similarities [N]. On a GPU by a kernel of this project where it takes the descriptors:
    nothing then waits, and no matrix of all similarities is made.
    """
    check_tensors(descriptors0, descriptors1)
    if descriptors0.is_cuda:
        from aliked.fused import match

        if match.takes(descriptors0):
            return match.nearest(descriptors0, descriptors1, min_similarity)
    return _nearest_by_torch(descriptors0, descriptors1, min_similarity)


def _nearest_by_torch(first: Any, second: Any, min_similarity: float) -> tuple[Any, Any]:
    import torch

    from aliked.model import plain_float32

    if not len(first) or not len(second):
        return first.new_full((len(first),), -1, dtype=torch.int64), first.new_zeros(len(first))
    with plain_float32():
        similarity = first @ second.T
    # What is not a number has no partner.
    similarity = torch.where(similarity.isnan(), -torch.inf, similarity)
    value, best = similarity.max(1)
    rows = torch.arange(len(first), device=first.device)
    kept = (similarity.argmax(0)[best] == rows) & (value >= min_similarity)
    return torch.where(kept, best, -1), value


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


def matches_of_rows(matches0: np.ndarray, scores0: np.ndarray) -> Matches:
    """`Matches` of one pair's rows: partners [K], -1 for none, and scores [K]."""
    matched = np.flatnonzero(matches0 >= 0)
    partners = matches0[matched].astype(np.int64)
    return Matches(np.stack([matched, partners], axis=1), scores0[matched].astype(np.float32))


def check_matchable(features: Features, size: Size, dim: int) -> None:
    """Raise `InputError` unless a matcher of `dim`-long descriptors can take these features.

    Keypoints and descriptors must be finite, and `size` the image's width and height.
    """
    check_features_type(features)
    check_descriptor_length(features.descriptors.shape[1], dim)
    if not (np.isfinite(features.keypoints).all() and np.isfinite(features.descriptors).all()):
        raise InputError("the features hold NaN or infinity; extract them again")
    check_size(size)


def check_descriptor_length(length: int, dim: int) -> None:
    """Raise `InputError` where descriptors of `length` are not those of `dim` that are matched."""
    if length != dim:
        names = [name for name in OFFICIAL if CONFIGS[name].dim == dim]
        raise InputError(
            f"the descriptors are {length} long, but these LightGlue weights match descriptors "
            f"of length {dim}; extract with {' or '.join(names) or 'another model'}"
        )


def check_size(size: Size) -> None:
    """Raise `InputError` unless `size` is two finite, positive numbers."""
    try:
        numbers = np.asarray(size, dtype=object).ravel()
        right = len(numbers) == 2 and all(0 < float(number) < np.inf for number in numbers)
    except (TypeError, ValueError, OverflowError):  # None, for example
        right = False
    if not right:
        raise InputError(f"the image size is {shown(size)}; give (width, height) in pixels")
