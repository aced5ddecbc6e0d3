"""ONNX Runtime's TensorRT provider; nodes that it does not take run on the CUDA provider."""

import ctypes.util
import importlib.util

from aliked.backends import Spec
from aliked.backends.onnxruntime import (
    SUFFIX,
    ONNXRuntimeExtractor,
    build,
    cuda_device,
    cuda_provider,
    provider_missing,
)

__all__ = ["SUFFIX", "build", "create", "unavailable"]

TENSORRT = "TensorrtExecutionProvider"


def unavailable() -> str | None:
    """Why the TensorRT provider cannot run here, or None.

    ONNX Runtime names the provider wherever it was built with it, TensorRT itself or not.
    """
    reason = provider_missing(TENSORRT)
    if reason or from_pip() or ctypes.util.find_library("nvinfer"):
        return reason
    return (
        "TensorRT's libraries are not installed; install the release that this ONNX Runtime was "
        "built for"
    )


def from_pip() -> bool:
    """Whether TensorRT's libraries lie in its pip package, where no loader looks."""
    return importlib.util.find_spec("tensorrt_libs") is not None


def create(spec: Spec) -> ONNXRuntimeExtractor:
    """The file on TensorRT, whose engine is built now; `InputError` where it does not load."""
    if from_pip():
        importlib.import_module("tensorrt")  # loads its libraries
    options = {
        "device_id": cuda_device(spec.device),
        # Half precision is in the graph, but a weakly typed engine has to be allowed to use it.
        "trt_fp16_enable": str(int(spec.precision == "fp16")),
    }
    providers = [(TENSORRT, options), cuda_provider(spec.device)]
    return ONNXRuntimeExtractor(spec, "onnxruntime-tensorrt", providers)
