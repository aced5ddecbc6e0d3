"""Copies between arrays in host memory and tensors on a device.

A CUDA device copies to and from page-locked memory by itself: several copies are under way at once,
and one wait is enough for all. From ordinary memory the driver would first copy to a page-locked
buffer of its own, and wait for every copy by itself.
"""

from collections.abc import Iterable

import numpy as np
import torch


def stage(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bytes as a tensor in host memory, page-locked where `device` is a CUDA device."""
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(images))
    # PyTorch keeps the block from being used again before a copy has read it.
    staged = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(staged.numpy(), images)
    return staged


def upload(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bytes on `device`; the current stream's further work finds them there."""
    return stage(images, device).to(device, non_blocking=True)


def download(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of one device in host memory, once the current stream's work is done.

    The arrays may lie in page-locked memory, which is scarce: copy what is to be kept.
    """
    tensors = list(tensors)
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [copy.numpy() for copy in copies]
