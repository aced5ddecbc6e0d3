"""TensorRT, its work recorded as a CUDA graph: one launch instead of one per kernel."""

from aliked.backends import Spec
from aliked.backends.tensorrt import (
    SUFFIX,
    TensorRTExtractor,
    build,
    create_variant,
    unavailable,
)

__all__ = ["SUFFIX", "build", "create", "unavailable"]


def create(spec: Spec) -> TensorRTExtractor:
    """The engine, recorded once per input size; its input is copied into place."""
    return create_variant(spec, "tensorrt-cudagraph", cuda_graph=True)
