"""Compiles and launches the CUDA C++ kernels: all of half precision, and the choice of keypoints.

Their sources are compiled on first use by NVRTC, which comes with PyTorch: no compiler is needed.
What comes of it is kept in the user's cache.
"""

import contextlib
import ctypes
import functools
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch.cuda._utils import _cuda_load_module, _nvrtc_compile

from aliked.errors import InputError
from aliked.files import whole_file
from aliked.weights import cache_dir

FOLDER = Path(__file__).parent
HEADER = "warp.cuh"

# Kernels start while the one before them in the stream still ends (programmatic dependent launch).
OVERLAP = True
OVERLAPS_FROM = (9, 0)  # compute capability
OVERLAPS_IN_GRAPHS_FROM = 12030  # version of the driver
ALLOW_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def text(file: str, constants: tuple[tuple[str, int], ...]) -> str:
    """A source file of this folder after definitions of its constants, without `HEADER`."""
    definitions = "".join(f"#define {name} {value}\n" for name, value in constants)
    return definitions + (FOLDER / file).read_text()


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer: how a kernel gets a float."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: 64 bytes of value, of which a flag uses the first four."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


def launch_early(function: ctypes.c_void_p, grid: tuple, block: tuple, arguments: list) -> None:
    """Launch a kernel that itself waits for the one before: tensors by address, ints as C ints."""
    values = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int(a)
        for a in arguments
    ]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    attribute = Attribute(id=ALLOW_OVERLAP, value=1)
    stream = torch.cuda.current_stream().cuda_stream
    launch = Launch(grid, block, 0, stream, ctypes.pointer(attribute), 1)
    driver = torch.cuda._utils._get_gpu_runtime_library()
    status = driver.cuLaunchKernelEx(ctypes.byref(launch), function, addresses, None)
    torch.cuda._utils._check_cuda(status)


def driver_version() -> int:
    """The CUDA version that the driver supports, 12030 for 12.3."""
    version = ctypes.c_int()
    torch.cuda._utils._get_gpu_runtime_library().cuDriverGetVersion(ctypes.byref(version))
    return version.value


def can_overlap(device: torch.device) -> bool:
    """Whether kernels may start early here: the GPU and the driver must know of it."""
    return (
        OVERLAP
        and torch.cuda.get_device_capability(device) >= OVERLAPS_FROM
        and driver_version() >= OVERLAPS_IN_GRAPHS_FROM
    )


@functools.cache
def compiled(file: str, kernel: str, constants: tuple, device: torch.device) -> Callable:
    """A kernel of a source file, compiled for a device, callable with grid, block, arguments."""
    with torch.cuda.device(device):
        run = _kernel((FOLDER / HEADER).read_text() + text(file, constants), kernel)
    return functools.partial(launch_early, run.func) if can_overlap(device) else run


def _kernel(source: str, name: str) -> Callable:
    """A kernel of a source for the current device, as this or an earlier process compiled it."""
    capability = torch.cuda.get_device_capability()
    facts = (torch.__version__, torch.version.cuda, capability, name, source)
    path = cache_dir() / "kernels" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.cubin"
    # What is not public yet is the same in PyTorch 2.11 and 2.14.
    with contextlib.suppress(OSError, RuntimeError):  # there is none, or it is damaged
        return _cuda_load_module(path.read_bytes(), [name])[name]
    binary, _ = _nvrtc_compile(source, name)  # the names of extern "C" stay
    with contextlib.suppress(OSError, InputError), whole_file(path) as partial:
        partial.write_bytes(binary)
    return _cuda_load_module(binary, [name])[name]
