"""OpenCV's SIFT and ORB behind the call that every runtime has."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from aliked.backends import BACKENDS, create_extractor, get_backend
from aliked.errors import InputError
from aliked.features import Features, check_image
from benchmark.artifacts import BuildFile, build_files, cached_path
from benchmark.process import TaskFailed
from benchmark.rows import Row, device_of

ORB_BITS = 256


class Baseline:
    """One of OpenCV's detectors, with its best `top_k` keypoints."""

    def __init__(self, name: str, top_k: int):
        self.name, self.top_k = name, top_k
        create, self.to_unit_length = DETECTORS[name]
        self.detector = create(top_k)

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; scores are the detector's responses, not in [0, 1]."""
        check_image(image)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        found, rows = self.detector.detectAndCompute(grey, None)
        if rows is None:
            return Features(*(np.zeros(shape, np.float32) for shape in ((0, 2), 0, (0, 1))))
        keypoints = np.array([keypoint.pt for keypoint in found], np.float32)
        scores = np.array([keypoint.response for keypoint in found], np.float32)
        # SIFT returns more where several orientations of one place have the same response.
        best = np.argsort(-scores, kind="stable")[: self.top_k]
        return Features(keypoints[best], scores[best], self.to_unit_length(rows[best]))


def unit_vectors(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] at unit length, float32; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def unit_bits(rows: np.ndarray) -> np.ndarray:
    """Bit strings, uint8 [N, 32], as vectors of +-1/16, float32 [N, 256].

    Their dot product is 1 - 2 h / 256 for a Hamming distance of h bits, exactly: the most similar
    vectors are those at the smallest Hamming distance.
    """
    bits = np.unpackbits(rows, axis=1).astype(np.float32)
    return (2 * bits - 1) / np.float32(ORB_BITS**0.5)


DETECTORS: dict[str, tuple[Callable, Callable]] = {
    "sift": (lambda top_k: cv2.SIFT_create(nfeatures=top_k), unit_vectors),
    "orb": (lambda top_k: cv2.ORB_create(nfeatures=top_k), unit_bits),
}


OPENCV = "opencv"  # the backend of the baselines
PRECISIONS = ("fp32", "fp16")
Extract = Callable[[np.ndarray], Features]


@dataclass(frozen=True)
class System:
    """What finds and describes the keypoints. The fields are what a record is found by."""

    backend: str  # of aliked.backends, or "opencv"
    device: str  # "cpu" or "cuda": where it has to run
    model: str  # or "sift", "orb"
    precision: str  # "fp32" or "fp16"; of a baseline ""
    top_k: int  # 0: threshold mode
    scores_th: float | None  # of threshold mode
    n_limit: int | None

    @property
    def baseline(self) -> bool:
        """Whether it is one of OpenCV's detectors."""
        return self.backend == OPENCV

    def row(self, width: int, height: int) -> Row:
        """The timing script's row for single images of this size, without its image set."""
        size = {"width": width, "height": height, "batch": 1}
        return Row(**asdict(self), **size, image_set="", compile_mode=None)

    @property
    def runtime(self) -> str:
        """The backend in words, with the place where that is not clear from it."""
        return "OpenCV" if self.baseline else self.row(0, 0).runtime

    @property
    def selection(self) -> str:
        """Which keypoints, in words."""
        return str(self.top_k) if self.baseline else str(self.row(0, 0).selection)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.runtime, self.precision, self.model)))


def systems_from(
    texts: list[str], models: list[str], device: str, top_k: int, scores_th: float, n_limit: int
) -> list[System]:
    """The systems that BACKEND[:PRECISION], "sift" and "orb" name, each backend with each model.

    `device` is a real one, such as "cpu" or "cuda:0". A baseline has as many keypoints as the
    others at most have. `InputError` for a name that is none.
    """
    by_threshold = top_k <= 0
    selection = {
        "top_k": max(top_k, 0),
        "scores_th": scores_th if by_threshold else None,
        "n_limit": n_limit if by_threshold else None,
    }
    systems = []
    for text in texts:
        if text in DETECTORS:
            limit = n_limit if by_threshold else top_k
            systems.append(System(OPENCV, "cpu", text, "", limit, None, None))
            continue
        backend, precision = _runtime(text)
        place = device_of(backend, device)
        systems += [System(backend, place, model, precision, **selection) for model in models]
    return list(dict.fromkeys(systems))


def backends_of(texts: list[str]) -> list[str]:
    """The backends that the names of systems ask for; `InputError` for a name that is none."""
    return list(dict.fromkeys(_runtime(text)[0] for text in texts if text not in DETECTORS))


def _runtime(text: str) -> tuple[str, str]:
    """Backend and precision of BACKEND[:PRECISION]."""
    backend, _, precision = text.partition(":")
    if backend not in BACKENDS or precision not in ("", *PRECISIONS):
        raise InputError(
            f"unknown system {text!r}; give {', '.join(DETECTORS)}, or BACKEND:PRECISION of the "
            f"backends {', '.join(BACKENDS)} and the precisions fp32 and fp16"
        )
    choices = get_backend(backend).precisions
    if precision and precision not in choices:
        raise InputError(f"backend {backend} has half precision only; give {backend}:fp16")
    return backend, precision or choices[0]


@dataclass(frozen=True)
class Place:
    """Where systems run, and with which files."""

    device: str  # such as "cuda:1"
    machine: dict
    versions: dict
    unavailable: dict[str, str | None]  # backend to the reason why it cannot run here
    weights: Path | None = None
    model_path: Path | None = None  # a model file for the backends that run one of its kind


def given_file(system: System, place: Place) -> Path | None:
    """The user's model file, for a backend that runs one of its kind."""
    if system.baseline or place.model_path is None:
        return None
    suffix = get_backend(system.backend).suffix
    return place.model_path if place.model_path.suffix == suffix else None


def open_system(system: System, place: Place) -> Extract:
    """What extracts the features; `InputError` where it cannot run here."""
    if system.baseline:
        return Baseline(system.model, system.top_k)
    path, suffix = given_file(system, place), get_backend(system.backend).suffix
    if suffix and path is None:
        return FileExtractor(system, place, suffix)
    spec = system.row(0, 0).spec(place.device, place.weights, path)
    return create_extractor(system.backend, spec)


class FileExtractor:
    """A runtime that runs a model file: one for each image size, made and kept as for timing."""

    def __init__(self, system: System, place: Place, suffix: str):
        self.system, self.place, self.suffix = system, place, suffix
        self.extractors: dict[tuple[int, int], Extract] = {}

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; the first image of a size may wait for its file."""
        size = image.shape[1::-1]
        if size not in self.extractors:
            self.extractors[size] = self._open(self.system.row(*size))
        return self.extractors[size](image)

    def _open(self, row: Row) -> Extract:
        place = self.place
        made_on = {"versions": place.versions, "machine": place.machine}
        path = cached_path(row, self.suffix, place.weights, made_on)
        spec = row.spec(place.device, place.weights, None)
        build = BuildFile(spec, (row.batch, row.height, row.width), path)
        made = build_files([build])[path]
        if isinstance(made, TaskFailed):
            raise InputError(f"the model file of {row} cannot be made: {made}") from made
        return create_extractor(row.backend, row.spec(place.device, place.weights, path))


NOT_MEASURED = "not measured"
