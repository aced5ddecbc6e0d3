"""What is compared: runtimes, and OpenCV's SIFT and ORB behind the same call; features kept."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from tqdm import tqdm

from aliked.backends import BACKENDS, Spec, create_extractor, get_backend
from aliked.configs import Selection, get_config
from aliked.errors import InputError
from aliked.features import Features, check_image
from aliked.files import code_digest, sha256
from aliked.lightglue import LightGlue
from aliked.matching import LIGHTGLUE_DIM, Matcher, check_descriptor_length
from aliked.store import FeatureStore
from aliked.weights import find_weights
from benchmark.artifacts import BuildFile, build_files, cached_path, facts_of
from benchmark.process import TaskFailed
from benchmark.rows import Row, device_of
from evaluation.pairs import MUTUAL, Image, RatioMatcher

ORB_BITS = 256


class Baseline:
    """One of OpenCV's detectors, with its best `top_k` keypoints."""

    def __init__(self, name: str, top_k: int):
        self.name, self.top_k = name, top_k
        create, self.to_unit_length, self.dim = DETECTORS[name]
        self.detector = create(top_k)

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; scores are the detector's responses, not in [0, 1]."""
        check_image(image)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        found, rows = self.detector.detectAndCompute(grey, None)
        if rows is None:
            return Features(*(np.zeros(shape, np.float32) for shape in ((0, 2), 0, (0, self.dim))))
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


# How to make one, to bring its descriptors to unit length, and how long they are then.
DETECTORS: dict[str, tuple[Callable, Callable, int]] = {
    "sift": (lambda top_k: cv2.SIFT_create(nfeatures=top_k), unit_vectors, 128),
    "orb": (lambda top_k: cv2.ORB_create(nfeatures=top_k), unit_bits, ORB_BITS),
}


OPENCV = "opencv"  # the backend of the baselines
PRECISIONS = ("fp32", "fp16")
TITLES = {"mutual": "", "ratio": " + ratio test", "lightglue": " + LightGlue"}  # by matcher
Extract = Callable[[np.ndarray], Features]


@dataclass(frozen=True)
class System:
    """What finds, describes and matches the keypoints. The fields are what a record is found by."""

    backend: str  # of aliked.backends, or "opencv"
    device: str  # "cpu" or "cuda": where it has to run
    model: str  # or "sift", "orb"
    precision: str  # "fp32" or "fp16"; of a baseline ""
    top_k: int  # 0: threshold mode
    scores_th: float | None  # of threshold mode
    n_limit: int | None
    matcher: Literal["mutual", "ratio", "lightglue"] = "mutual"

    @property
    def extractor(self) -> dict:
        """The fields that decide the features."""
        return {name: value for name, value in asdict(self).items() if name != "matcher"}

    @property
    def baseline(self) -> bool:
        """Whether it is one of OpenCV's detectors."""
        return self.backend == OPENCV

    @property
    def runtime(self) -> str:
        """The backend in words, with the place where that is not clear from it."""
        if self.baseline:
            return "OpenCV"
        on_cpu = self.device == "cpu" and not self.backend.endswith("-cpu")
        return f"{self.backend} (CPU)" if on_cpu else self.backend

    @property
    def selection(self) -> Selection:
        """Which keypoints are kept."""
        usual = Selection()
        th, limit = self.scores_th, self.n_limit
        return Selection(self.top_k, usual.scores_th if th is None else th, limit or usual.n_limit)

    def spec(self, machine: "Machine", model_path: Path | None) -> Spec:
        """The extractor that this system is, on a machine."""
        return Spec(
            model=self.model,
            **asdict(self.selection),
            precision=self.precision,
            device=self.device if self.device == "cpu" else machine.device,
            weights=machine.weights,
            model_path=model_path,
        )

    def row(self, width: int, height: int) -> Row:
        """The benchmark's row for single images of this size, whatever they show."""
        size = {"width": width, "height": height, "batch": 1}
        return Row(**self.extractor, **size, image_set="", compile_mode=None)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.runtime, self.precision, self.model))) + self.matched

    @property
    def matched(self) -> str:
        """The matcher as it stands behind a model's name; empty for mutual nearest neighbours."""
        return TITLES[self.matcher]


def systems_from(
    texts: list[str],
    models: list[str],
    device: str,
    selection: Selection,
    matchers: Sequence[str] = ("mutual",),
) -> list[System]:
    """The systems that BACKEND[:PRECISION], "sift" and "orb" name, each backend with each model.

    `device` is a real one, such as "cpu" or "cuda:0". A baseline has as many keypoints as the
    others at most have, and no LightGlue. `InputError` for a name that is none, and for a model
    whose descriptors LightGlue does not match.
    """
    if "lightglue" in matchers:
        for model in models:
            check_descriptor_length(get_config(model).dim, LIGHTGLUE_DIM)
    kept = {
        "top_k": max(selection.top_k, 0),
        "scores_th": selection.scores_th if selection.by_threshold else None,
        "n_limit": selection.n_limit if selection.by_threshold else None,
    }
    systems = []
    for text in texts:
        if text in DETECTORS:
            own = [name for name in matchers if name != "lightglue"] or ["mutual"]
            baseline = OPENCV, "cpu", text, "", selection.limit, None, None
            systems += [System(*baseline, matcher) for matcher in own]
            continue
        backend, precision = _runtime(text)
        place = device_of(backend, device)
        systems += [
            System(backend, place, model, precision, **kept, matcher=matcher)
            for model in models
            for matcher in matchers
        ]
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
class Machine:
    """Where systems run, and with which files."""

    device: str  # such as "cuda:1"
    facts: dict  # of its hardware
    versions: dict
    unavailable: dict[str, str | None]  # backend to the reason why it cannot run here
    weights: Path | None = None
    model_path: Path | None = None  # a model file for the backends that run one of its kind
    matcher_weights: Path | None = None


def given_file(system: System, machine: Machine) -> Path | None:
    """The user's model file, for a backend that runs one of its kind."""
    if system.baseline or machine.model_path is None:
        return None
    suffix = get_backend(system.backend).suffix
    return machine.model_path if machine.model_path.suffix == suffix else None


def check_precisions(systems: Sequence[System], machine: Machine) -> None:
    """Raise `InputError` where the user's model file has another precision than its system."""
    for system in systems:
        path = given_file(system, machine)
        own = path and facts_of(path).get("precision")
        if own and own != system.precision:
            raise InputError(
                f"{path} is {own}, and the system is {system}; pass --systems "
                f"{system.backend}:{own}, or another file"
            )


def open_system(system: System, machine: Machine) -> Extract:
    """What extracts the features; `InputError` where it cannot run here."""
    if system.baseline:
        return Baseline(system.model, system.top_k)
    path, suffix = given_file(system, machine), get_backend(system.backend).suffix
    if suffix and path is None:
        return FileExtractor(system, machine, suffix)
    return create_extractor(system.backend, system.spec(machine, path))


class FileExtractor:
    """A runtime that runs a model file: one for each image size, made and kept as for timing."""

    def __init__(self, system: System, machine: Machine, suffix: str):
        self.system, self.machine, self.suffix = system, machine, suffix
        self.extractors: dict[tuple[int, int], Extract] = {}

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; the first image of a size may wait for its file."""
        size = image.shape[1::-1]
        if size not in self.extractors:
            self.extractors[size] = self._open(self.system.row(*size))
        return self.extractors[size](image)

    def _open(self, row: Row) -> Extract:
        machine = self.machine
        made_on = {"versions": machine.versions, "machine": machine.facts}
        path = cached_path(row, self.suffix, machine.weights, made_on)
        build = BuildFile(self.system.spec(machine, None), (row.batch, row.height, row.width), path)
        made = build_files([build])[path]
        if isinstance(made, TaskFailed):
            raise InputError(f"the model file of {row} cannot be made: {made}") from made
        return create_extractor(row.backend, self.system.spec(machine, path))


def open_matchers(systems: Sequence[System], machine: Machine) -> dict[System, Matcher]:
    """The matcher of each system; LightGlue in the system's precision, once for all of one."""
    opened: dict[tuple[str, str], Matcher] = {}
    for kind in {(system.matcher, system.precision) for system in systems}:
        opened[kind] = _open_matcher(*kind, machine)
    return {system: opened[system.matcher, system.precision] for system in systems}


def _open_matcher(name: str, precision: str, machine: Machine) -> Matcher:
    if name == "lightglue":
        return LightGlue.from_pretrained(machine.matcher_weights, machine.device, precision)
    return RatioMatcher() if name == "ratio" else MUTUAL


def features_key(system: System, machine: Machine) -> dict:
    """What the features of `system` depend on besides the image."""
    key = {
        "system": system.extractor,
        "versions": machine.versions,
        "code": code_digest(Path(__file__)),
    }
    if system.baseline:
        return key
    file = given_file(system, machine)
    return key | {
        "weights": sha256(find_weights(system.model, machine.weights)),
        "model_path": file and sha256(file),
        "gpu": machine.facts.get("gpu") if system.device == "cuda" else None,
    }


class SystemFeatures:
    """The features of one system: extracted once, kept in a store of its own between runs.

    An image goes by the hash of its pixels, so that all data sets share what they share.
    """

    def __init__(self, folder: Path, key: dict, open_extractor: Callable[[], Extract]) -> None:
        """`key` as of `features_key`; the store is in `folder`, under a name made of it."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        names = (key["system"][name] for name in ("model", "backend", "precision"))
        path = Path(folder) / ("-".join(filter(None, (*names, digest))) + ".h5")
        # ORB's bits shrink to a twentieth.
        self.store = FeatureStore.open(path, key, compression="lzf")
        self._open_extractor = open_extractor

    def extract(self, images: Sequence[Image]) -> int:
        """Extract the features of those images that are not there yet; how many these were."""
        missing = [image for image in images if image.sha256 not in self.store]
        if missing:
            extractor = self._open_extractor()
            with self.store:
                bar = tqdm(missing, desc="features", unit="image", leave=False, disable=None)
                for image in bar:
                    self.store.write(image.sha256, extractor(image.load()), image.size)
        return len(missing)

    def read(self, image: Image) -> Features:
        """The features of an image that has been through `extract`."""
        return self.store.read(image.sha256)
