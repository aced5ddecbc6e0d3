"""TensorRT's lean runtime, for engines built with `--version_compatible`."""

from aliked.backends import Spec, tensorrt
from aliked.backends.tensorrt import TensorRTExtractor, create_variant


def unavailable() -> str | None:
    """Why the lean runtime cannot run here, or None."""
    return tensorrt.unavailable(lean=True)


def create(spec: Spec) -> TensorRTExtractor:
    """The engine in the lean runtime."""
    return create_variant(spec, "tensorrt-lean", lean=True)
