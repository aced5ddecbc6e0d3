"""ONNX Runtime's CPU provider."""

from aliked.backends import Spec
from aliked.backends.onnxruntime import CPU, SUFFIX, ONNXRuntimeExtractor, build, unavailable

__all__ = ["SUFFIX", "build", "create", "unavailable"]


def create(spec: Spec) -> ONNXRuntimeExtractor:
    """The file on the CPU, whatever `spec.device` is: the name says where."""
    return ONNXRuntimeExtractor(spec, "onnxruntime-cpu", [(CPU, {})])
