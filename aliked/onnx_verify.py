"""Is an exported file still the model? ONNX Runtime beside PyTorch float32 on real images."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from aliked.backends import Spec
from aliked.backends.onnxruntime import ONNXRuntimeExtractor
from aliked.colmap_io import ColmapExtractor, pad_right_bottom
from aliked.features import Features
from aliked.model import ALIKED
from aliked.onnx_export import ExportOptions
from aliked.parity import FP16, FP32, Verdict, compare_features, judge
from aliked.ties import expect

Images = Iterable[tuple[str, np.ndarray]]  # name, uint8 [H, W, 3] RGB


def cropped(images: Images) -> Iterator[tuple[str, np.ndarray]]:
    """Each image, and a part of it whose odd sides a dynamic file has to bear as well."""
    for name, image in images:
        yield name, image
        height, width = (side * 3 // 4 | 1 for side in image.shape[:2])
        yield f"{name} cut to {width}x{height}", image[:height, :width].copy()


def padded(images: Images) -> Iterator[tuple[str, np.ndarray]]:
    """Each image padded as COLMAP pads."""
    for name, image in images:
        yield name, pad_right_bottom(image)


def open_exported(
    path: Path, reference: ALIKED, options: ExportOptions
) -> Callable[[np.ndarray], Features]:
    """What runs the file as a user of its contract would."""
    if options.io == "colmap":
        return ColmapExtractor(path, max_keypoints=reference.top_k, min_score=0)
    return ONNXRuntimeExtractor(
        Spec(
            reference.name,
            top_k=reference.top_k,
            scores_th=reference.scores_th,
            device="cpu",
            model_path=path,
        )
    )


def verify(
    path: Path, reference: ALIKED, precision: str, options: ExportOptions, images: Images
) -> Verdict:
    """Compare the file's features with those of `reference`, the float32 model, image by image.

    `precision` ("fp32" or "fp16") is that of the file and chooses the tolerance.
    """
    extract = open_exported(path, reference, options)
    if options.io == "colmap":
        images = padded(images)
    elif options.dynamic:
        images = cropped(images)
    parities = {}
    for name, image in images:
        expected = expect(reference, image)
        parities[name] = compare_features(expected.features, extract(image), ties=expected.ties)
    return judge(parities, FP16 if precision == "fp16" else FP32)
