"""Every runtime by name. A runtime's own library is imported only when it is chosen."""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aliked.configs import PRECISIONS, Spec
from aliked.errors import InputError, missing_package, shown
from aliked.features import Extractor
from aliked.matching import PairRuntime


@dataclass(frozen=True)
class Backend:
    """A runtime: the class that runs it, with which options, and what it can do."""

    module: str  # of this package
    extractor: str  # the class in it, made of a `Spec`, the backend's name and `options`
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda",)  # of "cpu" and "cuda"
    precisions: tuple[str, ...] = ("fp32", "fp16")
    suffix: str | None = None  # of the model files that are made for it
    compiles: bool = False  # when it first runs, and keeps the result
    lightglue: bool = False  # whether it runs LightGlue: `open_runtime` of MODULE_lightglue

    def load(self) -> type[Extractor]:
        """Return the class, its module and library imported."""
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), self.extractor)

    def unavailable(self) -> str | None:
        """Return why it cannot run on this machine and what to install, or None."""
        try:
            return self.load().unavailable(**self.options)
        except ModuleNotFoundError as error:
            return missing_package(error)


ANYWHERE = ("cpu", "cuda")
with_tf32 = functools.partial(Backend, precisions=PRECISIONS)
BACKENDS = {
    "pytorch": Backend("pytorch", "PyTorchExtractor", devices=ANYWHERE, lightglue=True),
    "pytorch-amp": Backend("pytorch", "AutocastExtractor", devices=ANYWHERE, precisions=("fp16",)),
    "pytorch-compile": Backend(
        "pytorch", "CompiledExtractor", devices=ANYWHERE, compiles=True, lightglue=True
    ),
    "pytorch-cudagraph": Backend("pytorch", "CapturedExtractor", lightglue=True),
    "aotinductor": Backend("aotinductor", "PackageExtractor", devices=ANYWHERE, suffix=".pt2"),
    "onnxruntime": Backend(
        "onnxruntime", "ONNXRuntimeExtractor", devices=ANYWHERE, suffix=".onnx", lightglue=True
    ),
    "onnxruntime-cpu": Backend(
        "onnxruntime",
        "ONNXRuntimeExtractor",
        {"provider": "cpu"},
        ("cpu",),
        suffix=".onnx",
        lightglue=True,
    ),
    "onnxruntime-cuda": Backend(
        "onnxruntime",
        "ONNXRuntimeExtractor",
        {"provider": "cuda"},
        suffix=".onnx",
        lightglue=True,
    ),
    "onnxruntime-tensorrt": with_tf32(
        "onnxruntime", "ONNXRuntimeExtractor", {"provider": "tensorrt"}, suffix=".onnx"
    ),
    "onnxruntime-tensorrt-rtx": with_tf32(
        "onnxruntime", "ONNXRuntimeExtractor", {"provider": "tensorrt-rtx"}, suffix=".onnx"
    ),
    "tensorrt": with_tf32(
        "tensorrt", "TensorRTExtractor", {"library": "tensorrt"}, suffix=".trt", lightglue=True
    ),
    "tensorrt-cudagraph": with_tf32(
        "tensorrt",
        "TensorRTExtractor",
        {"library": "tensorrt", "cuda_graph": True},
        suffix=".trt",
        lightglue=True,
    ),
    "tensorrt-pycuda": with_tf32(
        "tensorrt", "TensorRTExtractor", {"library": "tensorrt", "memory": "pycuda"}, suffix=".trt"
    ),
    "tensorrt-lean": with_tf32(
        "tensorrt", "TensorRTExtractor", {"library": "tensorrt-lean"}, suffix=".trt"
    ),
    "tensorrt-rtx": with_tf32(
        "tensorrt",
        "TensorRTExtractor",
        {"library": "tensorrt-rtx"},
        suffix=".rtx",
        lightglue=True,
    ),
    "tensorrt-rtx-cudagraph": with_tf32(
        "tensorrt",
        "TensorRTExtractor",
        {"library": "tensorrt-rtx", "cuda_graph": True},
        suffix=".rtx",
        lightglue=True,
    ),
    "torch-tensorrt": with_tf32("pytorch", "TorchTensorRTExtractor"),
    "fused": Backend("fused", "FusedExtractor", compiles=True, lightglue=True),
}


def get_backend(name: str) -> Backend:
    """Return the backend `name`; `InputError` when there is no such backend."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise InputError(f"unknown backend {shown(name)}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def check_runs(name: str, spec: Spec) -> None:
    """Raise `InputError` where the backend does not run `spec`, on whatever machine."""
    backend = get_backend(name)
    if not isinstance(spec, Spec):
        raise InputError(f"a {type(spec).__name__} says nothing to run; give a Spec")
    spec.check()
    if spec.model_path is not None and backend.suffix is None:
        suffix = Path(spec.model_path).suffix
        other = next((n for n, b in BACKENDS.items() if b.suffix == suffix), "onnxruntime")
        raise InputError(
            f"backend {name} does not run {spec.model_path}; leave it out, or pass --backend "
            f"{other}"
        )


def create_extractor(name: str, spec: Spec) -> Extractor:
    """Return an extractor that runs `spec`.

    `InputError` where the backend cannot run here, or not this.
    """
    check_runs(name, spec)
    backend = get_backend(name)
    reason = backend.unavailable()
    if reason:
        raise InputError(f"backend {name} cannot run here: {reason}")
    return backend.load().from_spec(spec, name, **backend.options)


def create_pair_runtime(
    name: str, graph: str, spec: Spec, matcher_weights: Path | None, size: tuple[int, int]
) -> PairRuntime:
    """The runtime of LightGlue alone ("matcher") or of two images to matches ("pair").

    `size` is (width, height) of both images. Backends that run a file, `spec.model_path`, take
    sizes and LightGlue's weights from it. `InputError` where the backend does not run it here.
    """
    backend = get_backend(name)
    if not backend.lightglue:
        able = ", ".join(other for other, known in BACKENDS.items() if known.lightglue)
        raise InputError(f"backend {name} does not run LightGlue; choose one of {able}")
    reason = backend.unavailable()
    if reason:
        raise InputError(f"backend {name} cannot run here: {reason}")
    module = importlib.import_module(f"{__name__}.{backend.module}_lightglue")
    return module.open_runtime(name, graph, spec, matcher_weights, size, **backend.options)
