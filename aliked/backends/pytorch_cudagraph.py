"""PyTorch's eager kernels, captured once per input shape as a CUDA graph and replayed."""

from typing import NamedTuple

import torch

from aliked.backends import Spec
from aliked.backends.pytorch import ForwardExtractor, choose_device, load_model, named
from aliked.errors import InputError
from aliked.model import ALIKED

WARMUP_RUNS = 3  # cuDNN and cuBLAS choose and allocate in the first ones


class Captured(NamedTuple):
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    outputs: dict[str, torch.Tensor]


class CapturedForward:
    """The model's forward pass as CUDA graphs; a call overwrites what the last one returned."""

    def __init__(self, model: ALIKED, device: torch.device):
        self.model, self.device = model, device
        self.captured: dict[torch.Size, Captured] = {}

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        if batch.shape not in self.captured:
            self.captured[batch.shape] = self._capture(batch)
        graph, images, outputs = self.captured[batch.shape]
        images.copy_(batch)
        graph.replay()
        return outputs

    def _capture(self, batch: torch.Tensor) -> Captured:
        with torch.cuda.device(self.device):
            images, graph = batch.clone(), torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_RUNS):
                    self.model(images)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                outputs = named(self.model(images))
        return Captured(graph, images, outputs)


def unavailable() -> str | None:
    """Why no CUDA graph can be captured here, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; install a CUDA build of PyTorch and a driver"
    return None


def create(spec: Spec) -> ForwardExtractor:
    """The captured model; `InputError` on another device than CUDA."""
    device = choose_device(spec.device)
    if device.type != "cuda":
        raise InputError(f"a CUDA graph cannot run on {device}; pass --device cuda")
    forward = CapturedForward(load_model(spec, device), device)
    return ForwardExtractor("pytorch-cudagraph", device, forward)
