"""The engine run beside the PyTorch reference in float32, on photographs, and judged."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked import parity
from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.backends.tensorrt_extractor import TensorRTExtractor
from aliked.backends.tensorrt_manifest import Shape
from aliked.engine_build.source import Source
from aliked.errors import InputError
from aliked.images import list_images, load_image
from aliked.onnx_verify import cropped

Images = list[tuple[str, np.ndarray]]  # name, uint8 [H, W, 3] RGB

# TF32 multiplies with the 11 significant bits of FP16, so an FP32 engine that may use it cannot
# be held to the tolerance of float32.
TF32 = dataclasses.replace(parity.FP16, name="TF32")


def tolerance(precision: str, tf32: bool) -> parity.Tolerance:
    """What an engine of this precision is judged by."""
    if precision == "FP16":
        return parity.FP16
    return TF32 if tf32 else parity.FP32


def create_reference(source: Source, weights: Path | None) -> PyTorchExtractor:
    """The PyTorch model in float32 that a file was exported from."""
    try:
        names = ("model", "top_k", "scores_th", "n_limit")
        spec = Spec(**{name: source.export[name] for name in names}, weights=weights)
    except KeyError as error:
        raise InputError(
            f"{source.path} does not say which {error} it was exported with, so there is nothing "
            "to verify against; export the model again, or pass --no_verify"
        ) from error
    return PyTorchExtractor(spec)


def load_fitting_images(
    folder: Path, number: int, uint8: bool, smallest: Shape, largest: Shape
) -> Images:
    """The first `number` images of `folder`; for an engine of several sizes, cut ones as well.

    `InputError` at the first whole image that is outside the engine's smallest or largest input.
    """
    rows = slice(1, 3) if uint8 else slice(2, 4)
    low, high = smallest[rows], largest[rows]

    def fits(image: np.ndarray) -> bool:
        return all(a <= b <= c for a, b, c in zip(low, image.shape[:2], high, strict=True))

    images = [(path.name, load_image(path)) for path in list_images(folder)[:number]]
    for name, image in images:
        if not fits(image):
            limits = f"{low[1]}x{low[0]}" + ("" if low == high else f" to {high[1]}x{high[0]}")
            raise InputError(
                f"{folder / name} has {image.shape[1]}x{image.shape[0]} pixels and the engine "
                f"takes {limits}; give other --images, or pass --no_verify"
            )
    return images if low == high else [pair for pair in cropped(images) if fits(pair[1])]


def verify(
    engine: Path, reference: PyTorchExtractor, images: Images, limits: parity.Tolerance, memory: str
) -> parity.Verdict:
    """Compare an engine with `reference` on every image, two at a time where it takes batches."""
    extractor = TensorRTExtractor(engine, memory=memory)
    smallest, largest = extractor.session.limits()
    parities = {}
    with tqdm(total=len(images), desc="TensorRT and PyTorch fp32", unit="image") as bar:
        for names, batch in _batches(images, max(smallest[0], min(2, largest[0]))):
            found = extractor.extract_batch(batch)
            for name, image, features in zip(names, batch, found, strict=False):
                expected = reference.expect(image)
                parities[name] = parity.compare_features(
                    expected.features, features, ties=expected.ties
                )
                bar.update()
    return parity.judge(parities, limits)


def _batches(images: Images, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and images [size, H, W, 3] of one size each, filled up with the last image."""
    by_size = sorted(images, key=lambda pair: pair[1].shape)
    for _, group in itertools.groupby(by_size, key=lambda pair: pair[1].shape):
        while chunk := list(itertools.islice(group, size)):
            pixels = [image for _, image in chunk]
            pixels += [pixels[-1]] * (size - len(pixels))
            yield [name for name, _ in chunk], np.stack(pixels)
