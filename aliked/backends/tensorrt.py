"""TensorRT on an engine that `convert_onnx_to_trt.py` built for this machine."""

import tempfile
from pathlib import Path
from typing import Any

from aliked.backends import Spec
from aliked.backends.tensorrt_extractor import TensorRTExtractor
from aliked.backends.tensorrt_manifest import BuildOptions, read_manifest
from aliked.backends.tensorrt_runtime import unavailable
from aliked.errors import InputError

__all__ = ["SUFFIX", "TensorRTExtractor", "build", "create", "create_variant", "unavailable"]

SUFFIX = ".trt"


def build(spec: Spec, shape: tuple[int, int, int], path: Path) -> None:
    """Export the model of `spec` for images of `shape` = (B, H, W) and build its engine.

    Without TF32, and not verified: whoever times it compares what it gives.
    """
    from aliked.backends import onnxruntime
    from aliked.engine_build import Request, convert
    from aliked.engine_build.source import read_source

    batch, height, width = shape
    fixed = (batch, height, width, 3)
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder) / f"{path.stem}.onnx"
        onnxruntime.build(spec, shape, onnx_path)
        shapes = (fixed,) * 3 if -1 in read_source(onnx_path).shape else (None,) * 3
        options = BuildOptions(tf32=False)
        convert(Request(onnx_path, path, options, shapes=shapes, verify=False))


def _check_export(spec: Spec, export: dict) -> None:
    """`InputError` where the engine holds another model, or selects keypoints in another way."""
    model = export.get("model", spec.model)
    if model != spec.model:
        raise InputError(f"{spec.model_path} holds {model}, not {spec.model}; pass --model {model}")
    by_threshold = export.get("top_k", 0) <= 0
    if spec.top_k <= 0 and not (by_threshold and export.get("scores_th") == spec.scores_th):
        raise InputError(
            f"{spec.model_path} was not exported for --top_k 0 --scores_th {spec.scores_th}; "
            "export and build it again with these options, since what it selects is part of it"
        )


def create_variant(spec: Spec, name: str, **options: Any) -> TensorRTExtractor:
    """The extractor that runs `spec.model_path`, under a backend's name and with its options."""
    if spec.model_path is None:
        raise InputError(
            f"backend {name} needs an engine; pass --model_path FILE.trt, as written by "
            "convert_onnx_to_trt.py"
        )
    _check_export(spec, read_manifest(spec.model_path)["source"]["export"])
    return TensorRTExtractor(spec.model_path, spec.top_k, spec.device, name=name, **options)


def create(spec: Spec) -> TensorRTExtractor:
    """The engine over PyTorch's device memory."""
    return create_variant(spec, "tensorrt")
