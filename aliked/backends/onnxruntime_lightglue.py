"""ONNX Runtime on the files that `convert_lightglue_to_onnx.py` writes."""

import abc
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import OrtValue

from aliked.backends import Spec
from aliked.backends.onnxruntime import (
    PROVIDERS,
    Providers,
    as_input,
    choose_providers,
    device_of,
    open_session,
    place_of,
    sides_of,
)
from aliked.errors import InputError
from aliked.features import Features, check_image
from aliked.files import as_path
from aliked.matching import (
    FEATURES,
    TENSORS,
    Arrays,
    Matcher,
    Matches,
    PairMatches,
    PairRuntime,
    Size,
    check_matchable,
    matches_of_rows,
    padded_rows,
)

COLMAP_FEATURES = ("kpts", "desc", "image_size")


class MatcherSession(Matcher):
    """What the files with a matcher alone have in common: one session, by default on CUDA."""

    features: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, path: str | Path, device: str = "auto"):
        (provider, options), *others = choose_providers(device)
        self.path = as_path(path)
        self.session = open_session(self.path, provider, options, others)
        self.shapes = {tensor.name: tensor.shape for tensor in self.session.get_inputs()}
        wanted = {f"{name}{side}" for name in self.features for side in (0, 1)}
        if set(self.shapes) != wanted:
            raise InputError(
                f"{self.path} has inputs {sorted(self.shapes)}, not {sorted(wanted)}; write it "
                "with convert_lightglue_to_onnx.py"
            )

    def prepare(self, features: Features, size: Size) -> dict[str, np.ndarray]:
        """An image's inputs by name, without 0 or 1 behind it.

        Raises `InputError` as `LightGlue.prepare` does, and for more keypoints than the file takes.
        """
        check_matchable(features, size, self.shapes[f"{self.features[1]}0"][2])
        return self.rows(features, size)

    def match_prepared(
        self, first: dict[str, np.ndarray], second: dict[str, np.ndarray]
    ) -> Matches:
        """Matches of what `prepare` made of two images."""
        sides = enumerate((first, second))
        inputs = {f"{name}{i}": rows[None] for i, side in sides for name, rows in side.items()}
        matches0, scores0 = (rows.reshape(-1) for rows in self.session.run(self.outputs, inputs))
        return matches_of_rows(matches0, scores0)

    @abc.abstractmethod
    def rows(self, features: Features, size: Size) -> dict[str, np.ndarray]:
        """One image's inputs by name, without the batch."""


class ONNXRuntimeMatcher(MatcherSession):
    """A file of the default contract; fewer than its K keypoints are padded and masked."""

    features, outputs = FEATURES, TENSORS["matcher"][1]

    def rows(self, features: Features, size: Size) -> dict[str, np.ndarray]:
        """`keypoints`, `descriptors`, `mask` and `size`, with the file's K rows."""
        count, rows = len(features), self.shapes["keypoints0"][1]
        if not isinstance(rows, int):  # symbolic
            rows = count
        if count > rows:
            raise InputError(
                f"an image has {count} keypoints, but {self.path} matches at most {rows}; "
                f"export it with --top_k {count}, or extract fewer"
            )
        return padded_rows(features, size, rows)


class ColmapMatcher(MatcherSession):
    """A file written with `--io colmap`, run the way COLMAP does."""

    features, outputs = COLMAP_FEATURES, ("matches0", "mscores0")

    def __init__(self, path: str | Path, device: str = "auto", min_score: float = 0.1):
        super().__init__(path, device)
        self.min_score = min_score  # COLMAP's default

    def rows(self, features: Features, size: Size) -> dict[str, np.ndarray]:
        """`kpts`, `desc` and `image_size`."""
        rows = features.keypoints, features.descriptors, size
        arrays = (np.asarray(values, np.float32) for values in rows)
        return dict(zip(self.features, arrays, strict=True))

    def match_prepared(self, *pair) -> Matches:
        """Matches with at least the score `min_score`."""
        matches = super().match_prepared(*pair)
        kept = matches.scores >= self.min_score
        return Matches(matches.indices[kept], matches.scores[kept])


class ONNXRuntimePair:
    """A file from two images to keypoints and matches."""

    inputs, outputs = TENSORS["pair"]

    def __init__(self, path: str | Path, device: str = "auto"):
        (provider, options), *others = choose_providers(device)
        self.path = as_path(path)
        self.session = open_session(self.path, provider, options, others)
        self.tensors = {tensor.name: tensor for tensor in self.session.get_inputs()}
        if set(self.tensors) != set(self.inputs):
            raise InputError(
                f"{self.path} has inputs {sorted(self.tensors)}; write it with "
                "convert_lightglue_to_onnx.py --graph pair"
            )

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> PairMatches:
        """Two images, uint8 [H, W, 3] RGB, to their keypoints and matches."""
        images = dict(zip(self.inputs, (image0, image1), strict=True))
        batches = {name: self._prepare(name, image) for name, image in images.items()}
        rows = self.session.run(self.outputs, batches)
        keypoints0, keypoints1, matches0, scores0 = (row[0] for row in rows)
        return PairMatches(keypoints0, keypoints1, matches_of_rows(matches0, scores0))

    def _prepare(self, name: str, image: np.ndarray) -> np.ndarray:
        """A batch of one image as the file's input takes it; `InputError` for another size."""
        check_image(image)
        sides = sides_of(self.tensors[name])
        for want, got in zip(sides, image.shape[:2], strict=True):
            if isinstance(want, int) and want != got:
                raise InputError(
                    f"{name} is {image.shape[1]}x{image.shape[0]} pixels, but {self.path} was "
                    f"exported for {sides[1]}x{sides[0]}; export it for images of this size"
                )
        return as_input(image[None], self.tensors[name])


class ONNXRuntimePairRuntime(PairRuntime):
    """A file of LightGlue on one provider; on a GPU its inputs and outputs stay there."""

    def __init__(self, name: str, path: Path, providers: Providers) -> None:
        (provider, options), *others = providers
        self.session = open_session(path, provider, options, others)
        self.name, self._place = name, place_of(provider, options)
        self.device = device_of(*self._place)
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))

    def to_device(self, inputs: Arrays) -> Any:
        """A binding with the inputs, and room for the outputs, on the device."""
        binding = self.session.io_binding()
        for name, rows in inputs.items():
            value = OrtValue.ortvalue_from_numpy(rows, *self._place)
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, *self._place)
        return binding

    def infer(self, batch: Any) -> dict[str, Any]:
        """The outputs by name, on the device."""
        self.session.run_with_iobinding(batch)
        return dict(zip(self.outputs, batch.get_outputs(), strict=True))

    def synchronize(self) -> None:
        """Nothing to wait for: a run returns when it has finished."""


def open_runtime(
    name: str,
    graph: str,
    spec: Spec,
    matcher_weights: Path | None,
    size: tuple[int, int],
    provider: str | None = None,
) -> ONNXRuntimePairRuntime:
    """The file `spec.model_path`, which holds the weights, on a provider."""
    if spec.model_path is None:
        raise InputError(
            f"backend {name} needs a file of LightGlue; give model_path, as written by "
            "convert_lightglue_to_onnx.py"
        )
    return ONNXRuntimePairRuntime(name, Path(spec.model_path), PROVIDERS[provider][1](spec))
