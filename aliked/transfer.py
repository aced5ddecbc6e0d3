"""Copies between arrays in host memory and tensors on a device.

A CUDA device copies to and from page-locked memory by itself: copies are queued without waiting,
and one wait is enough for all. From ordinary memory the driver would first copy to a page-locked
buffer of its own, and wait for every copy by itself.
"""

from collections.abc import Iterable

import numpy as np
import torch

from aliked.errors import InputError


def stage(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bytes as a tensor in host memory, page-locked where `device` is a CUDA device.

    Raises `InputError` for anything but uint8.
    """
    if images.dtype != np.uint8:
        raise InputError(f"the batch is {images.dtype} {list(images.shape)}; give uint8")
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(images))
    # PyTorch keeps the block from being used again before a copy has read it.
    staged = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(staged.numpy(), images)
    return staged


def upload(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Bytes on `device`; the current stream's further work finds them there."""
    return stage(images, device).to(device, non_blocking=device.type == "cuda")


def download(tensors: Iterable[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of one device in host memory, once the current stream's work is done.

    The arrays may lie in page-locked memory, which is scarce, or be the tensors' own: copy what
    is to be kept.
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
