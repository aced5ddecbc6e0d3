"""PyTorch, eager, under automatic mixed precision: float32 weights, half-precision products."""

from dataclasses import replace

import torch

from aliked.backends import Spec
from aliked.backends.pytorch import (
    ForwardExtractor,
    choose_device,
    load_model,
    named,
    unavailable,
)
from aliked.errors import InputError

__all__ = ["create", "unavailable"]


def create(spec: Spec) -> ForwardExtractor:
    """The eager model under `torch.autocast`; `InputError` unless `spec.precision` is fp16."""
    if spec.precision != "fp16":
        raise InputError("mixed precision is not float32; pass --precision fp16")
    device = choose_device(spec.device)
    model = load_model(replace(spec, precision="fp32"), device)

    def forward(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.float16):
            return named(model(batch))

    return ForwardExtractor("pytorch-amp", device, forward)
