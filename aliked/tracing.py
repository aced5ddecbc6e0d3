"""Whether the model runs, or is being written down to run later."""

import torch


def is_traced() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` is looking on."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
