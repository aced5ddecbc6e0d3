"""Copies between arrays in host memory and tensors on a device.

A CUDA device copies to and from page-locked memory by itself: copies are queued without waiting,
and one wait is enough for all. From ordinary memory the driver would first copy to a page-locked
buffer of its own, and wait for every copy by itself. What is large goes there in parts, so that the
device copies one while threads prepare the next ones.
"""

from collections.abc import Iterable

import numpy as np
import torch

from aliked.errors import InputError
from aliked.threads import copied_parts


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape and type in page-locked host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def upload(
    images: np.ndarray,
    device: torch.device,
    out: torch.Tensor | None = None,
    through: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 [B, H, W, C] on `device`, in `out` if given; the current stream's next work finds them.

    `out` is of the same shape, on a CUDA device. So is `through`, in page-locked memory, which is
    the caller's again once the copies are over. Raises `InputError` for another type than uint8.
    """
    if images.dtype != np.uint8:
        raise InputError(f"the batch is {images.dtype} {list(images.shape)}; give uint8")
    if device.type != "cuda":
        return torch.from_numpy(np.ascontiguousarray(images))
    if out is None:
        out = torch.empty(images.shape, dtype=torch.uint8, device=device)
    if through is None:  # PyTorch keeps such a block from being used again too soon
        through = page_locked(out)
    # Parts are images or, of a single one, rows of pixels.
    whole = slice(None) if len(images) > 1 else 0
    to, staged = out[whole], through[whole]
    for part in copied_parts(staged.numpy(), images[whole]):
        to[part].copy_(staged[part], non_blocking=True)
    return out


def download(
    tensors: Iterable[torch.Tensor], copies: list[torch.Tensor] | None = None
) -> list[np.ndarray]:
    """Tensors of one device in host memory, once the current stream's work is done.

    The arrays may lie in page-locked memory, which is scarce, or be the tensors' own: copy what
    is to be kept. `copies`, of the same shapes in page-locked memory, take those of a CUDA device.
    """
    tensors = list(tensors)
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = copies or [page_locked(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return [copy.numpy() for copy in copies]
