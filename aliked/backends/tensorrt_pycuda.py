"""TensorRT over PyCUDA's device memory: for a machine without PyTorch."""

import importlib.util

from aliked.backends import Spec, tensorrt
from aliked.backends.tensorrt import SUFFIX, TensorRTExtractor, build, create_variant

__all__ = ["SUFFIX", "build", "create", "unavailable"]


def unavailable() -> str | None:
    """Why TensorRT over PyCUDA cannot run here, or None."""
    if importlib.util.find_spec("pycuda") is None:
        return "the package pycuda is not installed; pip install pycuda"
    return tensorrt.unavailable()


def create(spec: Spec) -> TensorRTExtractor:
    """The engine over PyCUDA's device memory."""
    return create_variant(spec, "tensorrt-pycuda", memory="pycuda")
