"""How the library is compiled: by pip (`setup.py`) or on first use (`build`).

usage: python -m custom_ops.get_patches.toolchain
"""

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

FOLDER = Path(__file__).resolve().parent
# The library runs with PyTorch 2.11, whose stable ABI it uses, and with every later version.
CUDA_FLAGS = ["-O3", "-DTORCH_TARGET_VERSION=0x020B000000000000"]
FLAGS = [*CUDA_FLAGS, "-fvisibility=hidden"]


def with_cuda() -> bool:
    """Whether to compile for GPUs: PyTorch and the toolkit are there, and it is known for which."""
    known = torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
    return bool(torch.version.cuda and cpp_extension.CUDA_HOME and known)


def sources() -> list[Path]:
    """What to compile."""
    names = ["get_patches.cpp"] + ["get_patches_cuda.cu"] * with_cuda()
    return [FOLDER / name for name in names]


@functools.cache
def build() -> ModuleType:
    """Compile and load the library; the module `binding`.

    Takes some seconds, or about 20 with CUDA, the first time; afterwards the library comes out
    of PyTorch's cache of extensions (`$TORCH_EXTENSIONS_DIR`). `RuntimeError` where it fails.
    """
    cpp_extension.load(
        "aliked_get_patches",
        [str(path) for path in sources()],
        extra_cflags=FLAGS,
        extra_cuda_cflags=CUDA_FLAGS,
        is_python_module=False,
    )
    return importlib.import_module(".binding", __package__)


if __name__ == "__main__":
    print(f"compiled for {' and '.join(build().DEVICES)}")
