"""Run a CUDA C++ source of `aliked.fused` on the CPU; `cuda_on_host.hpp` says how."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HEADER = Path(__file__).with_suffix(".hpp")


def build(source: str, folder: Path) -> ctypes.CDLL:
    """Compile a source text with the host's C++ compiler; skips the test where there is none."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA source for the CPU")
    file, library = folder / "kernel.cpp", folder / "kernel.so"
    file.write_text(f'#include "{HEADER}"\n{source}')
    flags = ["-O2", "-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-w"]
    subprocess.run(["g++", *flags, str(file), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def launch(
    library: ctypes.CDLL,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: list,
    cluster: int = 1,
) -> None:
    """Run a kernel; tensors are passed by address, integers as C ints, as on the GPU.

    `cluster` blocks along x run together.
    """
    for argument in arguments:
        assert isinstance(argument, int) or argument.is_contiguous()
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    library.launch(
        ctypes.cast(getattr(library, kernel), ctypes.c_void_p),
        (ctypes.c_long * len(values))(*values),
        len(values),
        (ctypes.c_int * 3)(*grid),
        (ctypes.c_int * 3)(*block),
        cluster,
    )
