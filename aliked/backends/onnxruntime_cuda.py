"""ONNX Runtime's CUDA provider, inputs and outputs bound to the device, TF32 off."""

from aliked.backends import Spec
from aliked.backends.onnxruntime import (
    CUDA,
    SUFFIX,
    ONNXRuntimeExtractor,
    build,
    cuda_provider,
    provider_missing,
)

__all__ = ["SUFFIX", "build", "create", "unavailable"]


def unavailable() -> str | None:
    """Why the CUDA provider cannot run here, or None."""
    return provider_missing(CUDA)


def create(spec: Spec) -> ONNXRuntimeExtractor:
    """The file on CUDA; `InputError` where the provider does not load."""
    return ONNXRuntimeExtractor(spec, "onnxruntime-cuda", [cuda_provider(spec.device)])
