"""Features extracted once and kept: an HDF5 file per image, in a folder per system."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
from tqdm import tqdm

from aliked.benchmark.environment import ROOT
from aliked.evaluation.images import Image
from aliked.evaluation.systems import Extract, Place, System, given_file
from aliked.features import Features
from aliked.files import sha256, whole_file
from aliked.weights import find_weights

# What decides the features besides weights and options: other code makes other features.
CODE = ("aliked/*.py", "aliked/backends/*.py")
KERNELS = {"fused": ("aliked/fused/*.*",)}  # what a backend has elsewhere


class FeatureStore:
    """The features of one system. `extract` puts images into it, `read` takes them out.

    Files are written whole or not at all, so that an interrupted run loses one image at most.
    """

    def __init__(self, root: Path, key: dict, open_extractor: Callable[[], Extract]):
        """`key` is everything that the features depend on besides the image, as JSON has it."""
        self.key = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(self.key.encode()).hexdigest()
        names = (key["system"][name] for name in ("model", "backend", "precision"))
        self.folder = Path(root) / "-".join(filter(None, (*names, digest[:12])))
        self._open_extractor = open_extractor

    def extract(self, images: Sequence[Image]) -> int:
        """Extract the features of those images that are not there yet; how many these were."""
        missing = [image for image in images if not self._path(image).exists()]
        if not missing:
            return 0
        extractor = self._open_extractor()
        for image in tqdm(missing, desc="features", unit="image", leave=False, disable=None):
            self._write(image, extractor(image.load()))
        return len(missing)

    def read(self, image: Image) -> Features:
        """The features of an image, extracted now if it has not been through `extract`."""
        self.extract([image])
        with h5py.File(self._path(image)) as file:
            return Features(*(file[name][()] for name in ("keypoints", "scores", "descriptors")))

    def _path(self, image: Image) -> Path:
        return self.folder / f"{image.sha256}.h5"

    def _write(self, image: Image, features: Features) -> None:
        with whole_file(self._path(image)) as partial, h5py.File(partial, "w") as file:
            file.attrs["key"], file.attrs["image"] = self.key, image.name
            for name, values in vars(features).items():
                # ORB's bits shrink to a twentieth; chunks, which compression needs, have rows.
                compression = "lzf" if len(values) else None
                file.create_dataset(name, data=values, compression=compression)


def store_key(system: System, place: Place) -> dict:
    """What the features of `system` depend on besides the image."""
    key = {"system": vars(system), "versions": place.versions}
    if system.baseline:
        return key
    file = given_file(system, place)
    return key | {
        "weights": sha256(find_weights(system.model, place.weights)),
        "model_path": file and sha256(file),
        "gpu": place.machine.get("gpu") if system.device == "cuda" else None,
        "code": code_digest(CODE + KERNELS.get(system.backend, ())),
    }


@functools.cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """A hash of the project's files of these names."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()
