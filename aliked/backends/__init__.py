"""Every runtime by name. A runtime's own library is imported only when it is chosen."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from aliked.errors import InputError
from aliked.features import Extractor

# Each module has `unavailable() -> str | None`, a sentence that says why it cannot run on this
# machine and what to install, and `create(spec) -> Extractor`. One that runs a file may also have
# `SUFFIX`, that file's, and `build(spec, shape, path)`, which makes it for images of
# `shape` = (B, H, W). One that compiles when it first runs, and keeps the result, says `COMPILES`.
BACKENDS = {
    "pytorch": "aliked.backends.pytorch",
    "pytorch-amp": "aliked.backends.pytorch_amp",
    "pytorch-compile": "aliked.backends.pytorch_compile",
    "pytorch-cudagraph": "aliked.backends.pytorch_cudagraph",
    "aotinductor": "aliked.backends.aotinductor",
    "onnxruntime": "aliked.backends.onnxruntime",
    "onnxruntime-cpu": "aliked.backends.onnxruntime_cpu",
    "onnxruntime-cuda": "aliked.backends.onnxruntime_cuda",
    "onnxruntime-tensorrt": "aliked.backends.onnxruntime_tensorrt",
    "tensorrt": "aliked.backends.tensorrt",
    "tensorrt-cudagraph": "aliked.backends.tensorrt_cudagraph",
    "tensorrt-pycuda": "aliked.backends.tensorrt_pycuda",
    "tensorrt-lean": "aliked.backends.tensorrt_lean",
    "torch-tensorrt": "aliked.backends.torch_tensorrt",
    "fused": "aliked.backends.fused",
}


@dataclass(frozen=True)
class Spec:
    """What to run. A backend that runs a file (`model_path`) takes the rest from that file."""

    model: str = "aliked-t16-homography"  # the one whose weights are part of the project
    top_k: int = 1000  # <= 0: threshold mode
    scores_th: float = 0.2
    n_limit: int = 5000
    precision: str = "fp32"  # or "fp16"
    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    weights: Path | None = None
    model_path: Path | None = None
    compile_mode: str = "reduce-overhead"  # of torch.compile: with CUDA graphs


def load_backend(name: str):
    """The module of backend `name`; `InputError` when there is no such backend."""
    if name not in BACKENDS:
        raise InputError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])


def create_extractor(backend: str, spec: Spec) -> Extractor:
    """An extractor that runs `spec`; `InputError` where the backend cannot run here."""
    module = load_backend(backend)
    reason = module.unavailable()
    if reason:
        raise InputError(f"backend {backend} cannot run here: {reason}")
    return module.create(spec)
