"""ONNX Runtime's TensorRT provider; nodes that it does not take run on the CUDA provider."""

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
    """Why the TensorRT provider cannot run here, or None."""
    return provider_missing(TENSORRT)


def create(spec: Spec) -> ONNXRuntimeExtractor:
    """The file on TensorRT, whose engine is built now; `InputError` where it does not load."""
    options = {
        "device_id": cuda_device(spec.device),
        # Half precision is in the graph, but a weakly typed engine has to be allowed to use it.
        "trt_fp16_enable": str(int(spec.precision == "fp16")),
    }
    providers = [(TENSORRT, options), cuda_provider(spec.device)]
    return ONNXRuntimeExtractor(spec, "onnxruntime-tensorrt", providers)
