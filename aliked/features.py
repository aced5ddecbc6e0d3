"""What every runtime returns, and the interface every runtime has."""

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aliked.configs import RADIUS, Spec
from aliked.errors import InputError, shown
from aliked.threads import each, in_parts

# What every runtime returns for a batch, found by these names: [B, K, 2], [B, K, D], [B, K].
OUTPUTS = ("keypoints", "descriptors", "scores")
MIN_SIDE = 2 * RADIUS + 1  # pixels: detection drops the border, so a smaller image has no keypoint


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


def room_for(keypoints: np.ndarray, descriptors: np.ndarray, scores: np.ndarray) -> Features:
    """Memory for one image's [K, 2], [K, D] and [K] outputs, which `drop_fill_ins` may return.

    It is written to, as a copy waits at each page that is new: make it while the device works.
    """
    return Features(*(np.full_like(rows, 0) for rows in (keypoints, scores, descriptors)))


def drop_fill_ins(
    keypoints: np.ndarray,
    descriptors: np.ndarray,
    scores: np.ndarray,
    room: Features | None = None,
) -> Features:
    """One image's [K, 2], [K, D] and [K] outputs to `Features`, without the rows of score 0.

    A model with a fixed K fills the outputs of an image that has fewer keypoints with rows
    whose score is exactly 0. Nothing of the result shares memory with the outputs. `room` is of
    `room_for` these outputs, made before. `InputError` where a score is NaN.
    """
    outputs = keypoints, scores, descriptors
    if (scores > 0).all():  # as most often: a whole is copied twice as fast as its rows
        if room is None:
            return Features(*(rows.copy() for rows in outputs))
        for to, rows in zip((room.keypoints, room.scores, room.descriptors), outputs, strict=True):
            np.copyto(to, rows)
        return room
    if np.isnan(scores).any():  # no more than 0 either, but no fill-in
        raise InputError(
            "the runtime returned scores that are NaN, so its model is damaged or its precision "
            "too low; check the weights or the file"
        )
    kept = np.flatnonzero(scores > 0)  # rows taken by number are copied twice as fast as by mask
    return Features(*(rows.take(kept, axis=0) for rows in outputs))


def features_of_batch(
    keypoints: np.ndarray,
    descriptors: np.ndarray,
    scores: np.ndarray,
    rooms: Sequence[Features | None] | None = None,
) -> list[Features]:
    """`drop_fill_ins` of every image of a batch's [B, K, 2], [B, K, D] and [B, K] outputs."""
    rooms = rooms or [None] * len(keypoints)
    images = list(zip(keypoints, descriptors, scores, rooms, strict=True))

    def of_part(part: slice) -> list[Features]:
        return [drop_fill_ins(*image) for image in images[part]]

    parts = in_parts(len(images), descriptors.nbytes)
    return list(itertools.chain.from_iterable(each(of_part, parts)))


def check_image(image: np.ndarray) -> None:
    """Raise `InputError` unless `image` is uint8 [H, W, 3] with H and W at least `MIN_SIDE`."""
    _check_pixels(image, 3, "the image is", "uint8 [H, W, 3] in RGB order")


def check_images(images: np.ndarray) -> None:
    """Raise `InputError` unless `images` is uint8 [B, H, W, 3], B at least 1, H and W as above."""
    _check_pixels(images, 4, "the batch is", "uint8 [B, H, W, 3] in RGB order")
    if not len(images):
        raise InputError("the batch has no image; give at least one")


def _check_pixels(pixels: np.ndarray, ndim: int, what: str, wanted: str) -> None:
    if not isinstance(pixels, np.ndarray):
        raise InputError(f"{what} a {type(pixels).__name__}; give a NumPy array, {wanted}")
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3:
        raise InputError(f"{what} {pixels.dtype} {list(pixels.shape)}; give {wanted}")
    height, width = pixels.shape[-3:-1]
    if min(height, width) < MIN_SIDE:
        raise InputError(
            f"{what} {width}x{height} pixels; both sides must be at least {MIN_SIDE}, since "
            "detection drops a border of 2 pixels"
        )


def check_features_type(features: Features) -> None:
    """Raise `InputError` unless these are `Features`, of float arrays with as many rows each."""
    if not isinstance(features, Features):
        raise InputError(f"{shown(features)} is given for features; give `Features` of an image")
    for name, ndim in (("keypoints", 2), ("scores", 1), ("descriptors", 2)):
        rows = getattr(features, name)
        if not isinstance(rows, np.ndarray) or rows.ndim != ndim or rows.dtype.kind != "f":
            what = (
                f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else shown(rows)
            )
            raise InputError(f"the {name} of the features are {what}; extract them again")
    rows, columns = features.keypoints.shape
    if columns != 2 or len(features.scores) != rows or len(features.descriptors) != rows:
        raise InputError("the arrays of the features do not belong together; extract them again")


def check_features(features: Features, height: int, width: int) -> None:
    """Raise `InputError` where a runtime's features of an image of this size cannot be that.

    Refinement leaves a keypoint within a pixel of the image.
    """
    values = features.keypoints, features.scores, features.descriptors
    if not all(np.isfinite(array).all() for array in values):
        raise InputError(
            "the runtime returned NaN or infinity, so its model is damaged or its precision too "
            "low; compare it with PyTorch's by compare_fp32_fp16.py"
        )
    outside = (features.keypoints < -1) | (features.keypoints > (width, height))
    if outside.any():
        x, y = features.keypoints[outside.any(axis=1)][0]
        raise InputError(
            f"the runtime returned a keypoint at ({x:.4g}, {y:.4g}) of an image of {width}x{height}"
            " pixels, so its file is none of this project; export it again"
        )


def check_tensors(descriptors0: Any, descriptors1: Any) -> None:
    """Raise `InputError` unless both are float tensors [N, D] of one D, type and device."""
    import torch

    for rows in (descriptors0, descriptors1):
        if not isinstance(rows, torch.Tensor):
            raise InputError(f"the descriptors are a tensor and a {type(rows).__name__}")
        if rows.ndim != 2 or not rows.is_floating_point():
            raise InputError(
                f"the descriptors are {rows.dtype} {list(rows.shape)}; give float tensors [N, D]"
            )
    a, b = ((rows.shape[1], rows.dtype, rows.device) for rows in (descriptors0, descriptors1))
    if a != b:
        raise InputError(
            f"the descriptors differ: {a[0]} values in {a[1]} on {a[2]}, and {b[0]} in {b[1]} on "
            f"{b[2]}; match features of the same model on one device"
        )


# In float32 on a CPU: 227 to 336 were measured of PyTorch's eager model, 258 to 267 of a file's in
# ONNX Runtime.
BYTES_PER_PIXEL = 340
SMALL = 2**28  # bytes that any host has: to ask it for more takes as long as a small image


def check_memory(height: int, width: int, batch: int = 1) -> None:
    """Raise `InputError` where images of this size need more memory than this host has free."""
    needed = BYTES_PER_PIXEL * height * width * batch
    there = None if needed < SMALL else available_memory()
    if there is not None and needed > there:
        what = "an image" if batch == 1 else f"a batch of {batch} images"
        raise InputError(
            f"{what} of {width}x{height} pixels needs about {needed / 2**30:.1f} GiB of memory, "
            f"and {there / 2**30:.1f} GiB are free; reduce it (--max_size, where a script has it)"
        )


def available_memory() -> int | None:
    """Bytes that this process can still have, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


class Extractor(abc.ABC):
    """One runtime holding one model; `aliked.backends` has a table of them."""

    name: str  # as the command line has it, for example "onnxruntime-cpu"
    device: str  # where it runs: "cpu", "cuda" or "cuda:N"

    @classmethod
    def unavailable(cls) -> str | None:
        """Why this runtime cannot run on this machine and what to install, or None."""
        return None

    @classmethod
    def from_spec(cls, spec: Spec, name: str, **options: Any) -> "Extractor":
        """Return an extractor that runs `spec`, under a backend's name and with its options.

        `InputError` where `spec` cannot be run.
        """
        return cls(spec, name, **options)

    def __call__(self, image: np.ndarray) -> Features:
        """Return the `Features` of uint8 [H, W, 3] RGB in host memory, copies included.

        Raises `InputError` for another type or shape, or a side below 5 pixels.
        """
        check_image(image)
        (features,) = self.extract_batch(image[None])
        check_features(features, *image.shape[:2])
        return features

    @abc.abstractmethod
    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """Return each image's `Features` of uint8 [B, H, W, 3] RGB in host memory.

        Raises `InputError` for another type or shape, or a side below 5 pixels.
        """

    @abc.abstractmethod
    def to_device(self, images: np.ndarray) -> Any:
        """Return the input that `infer` takes, of uint8 [B, H, W, 3] RGB in host memory."""

    @abc.abstractmethod
    def infer(self, batch: Any) -> dict[str, Any]:
        """Return device tensors of a batch on the device: what a compute-only timing measures.

        `batch` is what `to_device` made; the result has `keypoints` [B, K, 2], `descriptors`
        [B, K, D] and `scores` [B, K], found by name. The work may still be running on return:
        `synchronize` waits for it.
        """

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that `infer` started has finished."""
