"""What every runtime returns, and the interface every runtime has."""

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from aliked.errors import InputError
from aliked.threads import each, in_parts

MIN_SIDE = 5  # pixels: detection drops a border of 2, so a smaller image has no keypoint


@dataclass(frozen=True)
class Features:
    """Keypoints of one image, fill-ins removed.

    Order: descending detection score (the score map at the maximum, before sub-pixel refinement,
    so `scores` itself need not be sorted). PyTorch in threshold mode: row by row of the image.
    """

    keypoints: np.ndarray  # [N, 2] float32, pixels, (x, y), centre of the top-left pixel = (0, 0)
    scores: np.ndarray  # [N] float32, in [0, 1], score map at the refined position
    descriptors: np.ndarray  # [N, D] float32, unit length

    def __len__(self) -> int:
        return len(self.keypoints)


class Extractor(Protocol):
    """One runtime holding one model (`aliked/backends/`, a file each)."""

    name: str  # as the command line has it, for example "onnxruntime-cpu"

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB in host memory to `Features` in host memory, copies included."""

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB in host memory to each image's `Features`, copies included."""

    def infer(self, batch: Any) -> dict[str, Any]:
        """Device tensors to device tensors: what a compute-only timing measures.

        `batch` is what `to_device` made; the result has `keypoints` [B, K, 2], `descriptors`
        [B, K, D] and `scores` [B, K], found by name. The work may still be running on return:
        `synchronize` waits for it.
        """

    def to_device(self, images: np.ndarray) -> Any:
        """uint8 [B, H, W, 3] RGB in host memory to the input that `infer` takes."""

    def synchronize(self) -> None:
        """Wait until everything that `infer` started has finished."""


def drop_fill_ins(keypoints: np.ndarray, descriptors: np.ndarray, scores: np.ndarray) -> Features:
    """One image's [K, 2], [K, D] and [K] outputs to `Features`, without the rows of score 0.

    A model with a fixed K fills the outputs of an image that has fewer keypoints with rows
    whose score is exactly 0. Nothing of the result shares memory with the outputs.
    """
    kept = np.flatnonzero(scores > 0)  # rows taken by number are copied twice as fast as by mask
    return Features(*(rows.take(kept, axis=0) for rows in (keypoints, scores, descriptors)))


def features_of_batch(
    keypoints: np.ndarray, descriptors: np.ndarray, scores: np.ndarray
) -> list[Features]:
    """`drop_fill_ins` of every image of a batch's [B, K, 2], [B, K, D] and [B, K] outputs."""
    images = list(zip(keypoints, descriptors, scores, strict=True))

    def of_part(part: slice) -> list[Features]:
        return [drop_fill_ins(*image) for image in images[part]]

    parts = in_parts(len(images), descriptors.nbytes)
    return list(itertools.chain.from_iterable(each(of_part, parts)))


def check_image(image: np.ndarray) -> None:
    """Raise `InputError` unless `image` is uint8 [H, W, 3] with H and W at least `MIN_SIDE`."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"the image is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3] in RGB order"
        )
    if min(image.shape[:2]) < MIN_SIDE:
        raise InputError(
            f"the image is {image.shape[1]}x{image.shape[0]} pixels; both sides must be at least "
            f"{MIN_SIDE}, since detection drops a border of 2 pixels"
        )
