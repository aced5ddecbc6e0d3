"""Copies between arrays in host memory and tensors on a device.

A CUDA device copies to and from page-locked memory by itself: copies are queued without waiting,
and one wait is enough for all. What is large goes there in parts, so that the device copies one
while threads prepare the next ones. Where the same memory is used again and again there is
`aliked.backends.cuda_memory.Twin`, which takes less time for a single image.
"""

from collections.abc import Iterable

import numpy as np
import torch

from aliked.errors import InputError, shown
from aliked.threads import copied_parts


def page_locked(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape and type in page-locked host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def choose_device(device: str | torch.device, only: str | None = None) -> torch.device:
    """Return the device of that name: "auto" is the first CUDA device, or else the CPU.

    There is one CPU, whatever its number.

    `InputError` where it does not exist on this machine, or is of another type than `only`.
    """
    if not isinstance(device, str | torch.device):
        raise InputError(f"the device is {shown(device)}; give auto, cpu, cuda or cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"this project does not run on {chosen}; give auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        chosen = torch.device("cpu")  # the name that everything else compares with
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA "
            "devices; pass --device cpu, or install a CUDA build of PyTorch and a driver"
        )
    if only not in (None, chosen.type):
        raise InputError(f"this backend cannot run on {chosen}; pass --device {only}")
    return chosen


def upload(
    images: np.ndarray, device: torch.device, out: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 [B, H, W, C] on `device`, in `out` if given; the current stream's next work finds them.

    `out` is of the same shape, on a CUDA device. Raises `InputError` for another type than uint8.
    """
    if images.dtype != np.uint8:
        raise InputError(f"the batch is {images.dtype} {list(images.shape)}; give uint8")
    if device.type != "cuda":
        # Copied where it cannot be written to, as an array of Pillow: PyTorch warns of these.
        return torch.from_numpy(np.require(images, requirements=("C", "W")))
    if out is None:
        out = torch.empty(images.shape, dtype=torch.uint8, device=device)
    # PyTorch keeps the block from being used again before its copies are over.
    staged = page_locked(out)
    # Parts are images or, of a single one, rows of pixels.
    whole = slice(None) if len(images) > 1 else 0
    to, through = out[whole], staged[whole]
    for part in copied_parts(through.numpy(), images[whole]):
        to[part].copy_(through[part], non_blocking=True)
    return out


def download(tensors: Iterable[torch.Tensor], asleep: bool = False) -> list[np.ndarray]:
    """Tensors of one device in host memory, once the current stream's work is done.

    Where they are waited for `asleep`, they come a little later, and the core does other work
    meanwhile.

    The arrays may lie in page-locked memory, which is scarce, or be the tensors' own: copy what
    is to be kept.
    """
    tensors = list(tensors)
    device = tensors[0].device
    if device.type != "cuda":
        return [tensor.cpu().numpy() for tensor in tensors]
    copies = [page_locked(tensor) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    stream = torch.cuda.current_stream(device)
    if asleep:
        stream.record_event(torch.cuda.Event(blocking=True)).synchronize()
    else:
        stream.synchronize()
    return [copy.numpy() for copy in copies]
