"""Torch-TensorRT: the parts of the model that TensorRT takes as engines, the rest in PyTorch."""

import importlib.util

import torch

from aliked.backends import Spec
from aliked.backends.pytorch import (
    ForwardExtractor,
    NamedOutputs,
    choose_device,
    load_model,
)
from aliked.backends.pytorch_cudagraph import unavailable as no_cuda
from aliked.errors import InputError


def unavailable() -> str | None:
    """Why Torch-TensorRT cannot run here, or None."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "the package torch_tensorrt is not installed; pip install torch-tensorrt"
    return no_cuda()


class EngineForward:
    """The forward pass, compiled at the first call of each input shape."""

    def __init__(self, model: torch.nn.Module):
        self.model = NamedOutputs(model)
        self.compiled: dict[torch.Size, torch.nn.Module] = {}

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        if batch.shape not in self.compiled:
            self.compiled[batch.shape] = self._compile(batch)
        return self.compiled[batch.shape](batch)

    def _compile(self, batch: torch.Tensor) -> torch.nn.Module:
        import torch_tensorrt

        program = torch.export.export(self.model, (batch,))
        # The model's own types are the precision, as in the other runtimes; TF32 is neither.
        return torch_tensorrt.dynamo.compile(
            program, arg_inputs=[batch], use_explicit_typing=True, disable_tf32=True
        )


def create(spec: Spec) -> ForwardExtractor:
    """The compiled model; `InputError` on another device than CUDA."""
    device = choose_device(spec.device)
    if device.type != "cuda":
        raise InputError(f"TensorRT cannot run on {device}; pass --device cuda")
    return ForwardExtractor("torch-tensorrt", device, EngineForward(load_model(spec, device)))
