"""The CUDA devices of this machine, as the driver itself reports them, and copies by the driver.

The driver is asked, and not a runtime library, because TensorRT's runtime ends the process with a
segmentation fault on a machine without a driver: this question has to come before it.
"""

import ctypes
import functools
import sys
import threading
from dataclasses import dataclass

from aliked.errors import InputError

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, cuda.h

# Held while a CUDA graph is captured: CUDA refuses other threads whatever waits for the whole
# device meanwhile, as every capture by PyTorch does when it begins.
CAPTURE = threading.Lock()


@dataclass(frozen=True)
class Device:
    """One CUDA device."""

    name: str  # as the driver spells it
    compute_capability: str  # such as "8.6"
    memory: int  # bytes


@functools.cache
def driver() -> ctypes.CDLL | None:
    """The CUDA driver library, None where there is none."""
    try:
        if sys.platform == "win32":
            return ctypes.WinDLL("nvcuda.dll")
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def check(status: int, call: str) -> None:
    """Raise `RuntimeError` with the driver's own name for a status other than success."""
    if status == 0:
        return
    name = ctypes.c_char_p()
    driver().cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
    raise RuntimeError(f"{call} failed with {(name.value or b'unknown error').decode()} ({status})")


def unavailable() -> str | None:
    """Why no CUDA device can be used here and what to do, or None."""
    if driver() is None:
        return (
            "there is no NVIDIA driver; install one, or start the container with --gpus all "
            "(on a Jetson with --runtime nvidia)"
        )
    try:
        count = _count()
    except RuntimeError as error:
        return f"the NVIDIA driver does not work ({error}); see what nvidia-smi says"
    if count == 0:
        return "the driver shows no CUDA device; see nvidia-smi and $CUDA_VISIBLE_DEVICES"
    return None


def devices() -> list[Device]:
    """The CUDA devices that $CUDA_VISIBLE_DEVICES leaves; `InputError` where there is none."""
    reason = unavailable()
    if reason:
        raise InputError(reason)
    return [_device(index) for index in range(_count())]


def device(name: str) -> tuple[int, Device]:
    """The device that "auto", "cuda" or "cuda:N" names, with its index; `InputError` otherwise."""
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cuda") or not (number or "0").isdecimal():
        raise InputError(f"device {name!r} is no CUDA device; give auto, cuda or cuda:N")
    found, index = devices(), int(number or 0)
    if index >= len(found):
        raise InputError(f"device {name} was asked for, but there are {len(found)} CUDA devices")
    return index, found[index]


def _count() -> int:
    check(driver().cuInit(0), "cuInit")
    count = ctypes.c_int()
    check(driver().cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    return count.value


def _device(index: int) -> Device:
    library, handle = driver(), ctypes.c_int()
    check(library.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(index)), "cuDeviceGet")
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    check(library.cuDeviceGetName(name, ctypes.c_int(256), handle), "cuDeviceGetName")
    check(library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle), "cuDeviceTotalMem")
    numbers = [
        _attribute(handle, attribute)
        for attribute in (COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR)
    ]
    return Device(name.value.decode(), "{}.{}".format(*numbers), memory.value)


def _attribute(handle: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    status = driver().cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), handle)
    check(status, "cuDeviceGetAttribute")
    return value.value


class Context:
    """The context that is current where this is made. In a `with` it is current in any thread."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        check(driver().cuCtxGetCurrent(ctypes.byref(self._handle)), "cuCtxGetCurrent")

    def __enter__(self) -> None:
        check(driver().cuCtxPushCurrent_v2(self._handle), "cuCtxPushCurrent")

    def __exit__(self, *_: object) -> None:
        driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def copy_async(to: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy between two addresses, of a device or of the host.

    Ordinary memory of the host goes by the driver's own page-locked memory, and the call may wait
    for the stream first. It may be read or written until the stream has been waited for.
    """
    status = driver().cuMemcpyAsync(
        ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes),
        ctypes.c_void_p(stream),
    )  # fmt: skip
    check(status, "cuMemcpyAsync")


def wait(stream: int) -> None:
    """Wait for a stream."""
    check(driver().cuStreamSynchronize(ctypes.c_void_p(stream)), "cuStreamSynchronize")
