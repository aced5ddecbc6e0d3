"""The PyTorch model itself, and what PyTorch's compilers and CUDA graphs make of it."""

import functools
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import torch

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.tensorrt_library import RTX, TENSORRT, numbers, settle_tf32
from aliked.errors import InputError
from aliked.features import (
    OUTPUTS,
    Extractor,
    Features,
    check_images,
    check_memory,
    features_of_batch,
)
from aliked.model import ALIKED, Output, plain_float32, to_tensor
from aliked.ties import Expected, expect
from aliked.transfer import choose_device, download, upload

Forward = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def no_cuda() -> str | None:
    """Return why PyTorch has no CUDA device here and what to install, or None."""
    if torch.cuda.is_available():
        return None
    return "PyTorch sees no CUDA device; install a CUDA build of PyTorch and a driver"


def load_model(spec: Spec, device: torch.device) -> ALIKED:
    """The model that `spec` describes, on `device`."""
    return ALIKED.from_pretrained(
        spec.model,
        top_k=spec.top_k,
        scores_th=spec.scores_th,
        n_limit=spec.n_limit,
        strict=spec.strict,
        weights=spec.weights,
        device=device,
        precision=spec.precision,
    )


def named(output: Output) -> dict[str, torch.Tensor]:
    """What every backend returns of a model's output."""
    return {name: getattr(output, name) for name in OUTPUTS}


def to_features(outputs: dict[str, torch.Tensor]) -> list[Features]:
    """Each image's `Features` of a batch's `named` outputs, once the device has them."""
    return features_of_batch(*download(outputs[name] for name in OUTPUTS))


class NamedOutputs(torch.nn.Module):
    """A model as a module that returns `named` outputs, for exporters."""

    def __init__(self, model: ALIKED):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        return named(self.model(images))


class ForwardExtractor(Extractor):
    """A forward pass, float [B, 3, H, W] to `named` outputs, run by PyTorch on one device."""

    def __init__(self, name: str, device: torch.device, forward: Forward):
        self.name, self.device, self.forward = name, str(device), forward
        self.torch_device = device

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """Return each image's `Features` of uint8 [B, H, W, 3] RGB, copies included."""
        return to_features(self.infer(self.to_device(images)))

    def to_device(self, images: np.ndarray) -> torch.Tensor:
        """Return uint8 [B, H, W, 3] RGB as float32 [B, 3, H, W] in [0, 1] on the device."""
        check_images(images)
        if self.torch_device.type == "cpu":
            check_memory(*images.shape[1:3], len(images))
        return to_tensor(upload(images, self.torch_device))

    @torch.inference_mode()
    def infer(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `keypoints`, `descriptors` and `scores` of float [B, 3, H, W] on the device."""
        with plain_float32():
            return self.forward(batch)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)


class PyTorchExtractor(ForwardExtractor):
    """The eager model on one device."""

    def __init__(self, spec: Spec, name: str = "pytorch"):
        device = choose_device(spec.device)
        self.model = load_model(spec, device)
        super().__init__(name, device, lambda batch: named(self.model(batch)))

    def __call__(self, image: np.ndarray) -> Features:
        """Return the `Features` of uint8 [H, W, 3] RGB; no fill-in is described."""
        return self.model.extract(image)

    def expect(self, image: np.ndarray) -> Expected:
        """Return what other runtimes are compared with, of uint8 [H, W, 3] RGB."""
        return expect(self.model, image)


class AutocastExtractor(ForwardExtractor):
    """The eager model under `torch.autocast`: float32 weights, half-precision products."""

    def __init__(self, spec: Spec, name: str = "pytorch-amp"):
        """Raise `InputError` unless `spec.precision` is fp16."""
        if spec.precision != "fp16":
            raise InputError("mixed precision is not float32; pass --precision fp16")
        device = choose_device(spec.device)
        model = load_model(replace(spec, precision="fp32"), device)

        def forward(batch: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.autocast(device.type, torch.float16):
                return named(model(batch))

        super().__init__(name, device, forward)


def compiled(network: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """A network by Inductor, which compiles each shape of its inputs at the first call."""
    # What was compiled for another network counts against this one where both share their code.
    torch._dynamo.reset()
    return torch.compile(network, mode=mode, dynamic=False, fullgraph=True)


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class CompiledExtractor(ForwardExtractor):
    """The model compiled by Inductor, with CUDA graphs unless the compile mode says otherwise.

    Each image size is compiled at its first call, which takes a minute.
    """

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why Inductor cannot compile here, or None."""
        if torch.cuda.is_available() or shutil.which("c++") or shutil.which("g++"):
            return None
        return "Inductor needs a C++ compiler; install g++"

    def __init__(self, spec: Spec, name: str = "pytorch-compile"):
        if spec.compile_mode not in COMPILE_MODES:
            raise InputError(
                f"unknown compile mode {spec.compile_mode!r}; choose one of "
                f"{', '.join(COMPILE_MODES)}"
            )
        device = choose_device(spec.device)
        model = load_model(spec, device)
        forward = compiled(model.forward, spec.compile_mode)
        super().__init__(name, device, lambda batch: named(forward(batch)))


WARMUP_RUNS = 3  # compilers and libraries choose and allocate in the first ones


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run on a side stream, which compiles and allocates, then record the same run as a graph.

    Returns the graph and what `run` returned, whose tensors each replay overwrites.
    """
    with gpu.CAPTURE:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may allocate
            result = run()
    return graph, result


class Captured:
    """A network as CUDA graphs, one for each shape of its inputs; a call overwrites the last's."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network
        self.captured: dict[tuple, tuple] = {}

    def __call__(self, *batch: torch.Tensor | None) -> Any:
        """What the network returns of `batch`, whose first is a tensor."""
        key = tuple(None if rows is None else rows.shape for rows in batch)
        if key not in self.captured:
            with torch.cuda.device(batch[0].device):
                inputs = [None if rows is None else rows.clone() for rows in batch]
                run = functools.partial(self.network, *inputs)
                self.captured[key] = (inputs, *capture(run))
        inputs, graph, outputs = self.captured[key]
        for mine, given in zip(inputs, batch, strict=True):
            if mine is not None:
                mine.copy_(given)
        graph.replay()
        return outputs


class CapturedExtractor(ForwardExtractor):
    """The eager kernels, captured once per input shape as a CUDA graph and replayed."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why no CUDA graph can be captured here, or None."""
        return no_cuda()

    def __init__(self, spec: Spec, name: str = "pytorch-cudagraph"):
        """Raise `InputError` on another device than CUDA."""
        device = choose_device(spec.device, "cuda")
        model = load_model(spec, device)
        super().__init__(name, device, Captured(lambda batch: named(model(batch))))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_tensorrt_refuses() -> str | None:
    """Return why the installed Torch-TensorRT does not go with this PyTorch or GPU, or None."""
    for package, library in (("torch-tensorrt-rtx", RTX), ("torch-tensorrt", TENSORRT)):
        if not (installed := _installed(package)):
            continue
        ours = torch.__version__.split("+")[0]
        if numbers(installed)[:2] != numbers(ours)[:2]:
            series = ".".join(ours.split(".")[:2])
            return (
                f"{package} {installed} is not for PyTorch {ours}; "
                f'pip install "{package}=={series}.*"'
            )
        return library.unavailable()
    return None


def import_torch_tensorrt() -> ModuleType:
    """Return Torch-TensorRT's module; `InputError` where it does not load."""
    if _installed("torch-tensorrt-rtx"):
        _restore(RTX.load())
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it raises Exception itself where its library is missing
        raise InputError(
            f"torch_tensorrt does not load ({error}); install the version of it and of its "
            "library that belong to this PyTorch"
        ) from error


def _restore(rtx: ModuleType) -> None:
    """Give TensorRT for RTX back what Torch-TensorRT-RTX 2.11 takes for granted, as 1.4 had it."""
    if not hasattr(rtx, "IAlgorithmSelector"):  # named in an annotation
        rtx.IAlgorithmSelector = object
    types = rtx.ITensor.dtype
    if types.fset is None:  # it sets what an output is anyway
        rtx.ITensor.dtype = types.setter(lambda tensor, dtype: None)
    # It looks for plugins, whose module is in the wheel but cannot be imported.
    sys.modules["tensorrt.plugin"] = None


class EngineForward:
    """The forward pass, compiled at the first call of each input shape."""

    def __init__(self, model: torch.nn.Module, tf32: bool):
        self.model, self.tf32 = NamedOutputs(model), tf32
        self.compiled: dict[torch.Size, torch.nn.Module] = {}

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        if batch.shape not in self.compiled:
            self.compiled[batch.shape] = self._compile(batch)
        return self.compiled[batch.shape](batch)

    def _compile(self, batch: torch.Tensor) -> torch.nn.Module:
        torch_tensorrt = import_torch_tensorrt()
        program = torch.export.export(self.model, (batch,))
        return torch_tensorrt.dynamo.compile(
            program,
            arg_inputs=[batch],
            use_explicit_typing=True,  # precision is in the model, as in the other runtimes
            disable_tf32=not self.tf32,
            # Torch-TensorRT-RTX 2.11's other runtime ends the process with library 1.6.1.
            use_python_runtime=_installed("torch-tensorrt-rtx") is not None,
        )


class TorchTensorRTExtractor(ForwardExtractor):
    """Torch-TensorRT, or Torch-TensorRT-RTX: what the library takes as engines, the rest eager."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why Torch-TensorRT cannot run here, or None."""
        if importlib.util.find_spec("torch_tensorrt") is None:
            return (
                "the package torch_tensorrt is not installed; pip install torch-tensorrt, or "
                "torch-tensorrt-rtx for an RTX GPU, of the version of PyTorch"
            )
        return no_cuda() or torch_tensorrt_refuses()

    def __init__(self, spec: Spec, name: str = "torch-tensorrt"):
        """Raise `InputError` on another device than CUDA."""
        device = choose_device(spec.device, "cuda")
        forward = EngineForward(load_model(spec.in_its_types(), device), spec.tf32)
        if _installed("torch-tensorrt-rtx"):
            settle_tf32(forward.tf32)
        super().__init__(name, device, forward)
