"""CUDA C++ kernels, for what Triton cannot say: stencils chained inside one tile.

Their sources are compiled on first use by NVRTC, which comes with PyTorch: no compiler is needed.
"""

import functools
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
HEADER = "warp.cuh"


def text(file: str, constants: tuple[tuple[str, int], ...]) -> str:
    """A source file of this folder after definitions of its constants, without `HEADER`."""
    definitions = "".join(f"#define {name} {value}\n" for name, value in constants)
    return definitions + (FOLDER / file).read_text()


@functools.cache
def compiled(file: str, kernel: str, constants: tuple, device: torch.device):
    """A kernel of a source file, compiled for a device and callable with its arguments."""
    with torch.cuda.device(device):
        # Not public yet; the same in PyTorch 2.11 and 2.14.
        source = (FOLDER / HEADER).read_text() + text(file, constants)
        return torch.cuda._compile_kernel(source, kernel)
