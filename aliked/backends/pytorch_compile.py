"""PyTorch compiled by Inductor, with CUDA graphs unless the compile mode says otherwise."""

import shutil

import torch

from aliked.backends import Spec
from aliked.backends.pytorch import ForwardExtractor, choose_device, load_model, named
from aliked.errors import InputError

COMPILES = True
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def unavailable() -> str | None:
    """Why Inductor cannot compile here, or None."""
    if torch.cuda.is_available() or shutil.which("c++") or shutil.which("g++"):
        return None
    return "Inductor needs a C++ compiler; install g++"


def create(spec: Spec) -> ForwardExtractor:
    """The compiled model; each image size is compiled at its first call, which takes a minute."""
    if spec.compile_mode not in COMPILE_MODES:
        raise InputError(
            f"unknown compile mode {spec.compile_mode!r}; choose one of {', '.join(COMPILE_MODES)}"
        )
    device = choose_device(spec.device)
    model = load_model(spec, device)
    # What was compiled for another model counts against this one: both share their code.
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, mode=spec.compile_mode, dynamic=False, fullgraph=True)
    return ForwardExtractor("pytorch-compile", device, lambda batch: named(compiled(batch)))
