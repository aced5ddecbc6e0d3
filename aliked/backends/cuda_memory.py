"""Device buffers, pinned host buffers, a stream and CUDA graphs, by PyTorch or by PyCUDA."""

import contextlib
import ctypes
import importlib.util
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from aliked import gpu
from aliked.errors import InputError

ALIGNMENT = 256  # bytes, which TensorRT asks of every address


class Memory(Protocol):
    """One stream of a device and buffers to use on it. Calls belong inside `active()`.

    A buffer has `shape`. Buffers and pinned arrays live as long as somebody holds them.
    """

    stream: int  # CUDA stream handle, not the default stream

    def active(self) -> contextlib.AbstractContextManager:
        """Make the device current; the stream goes on after the caller's work and before more."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A device buffer at a multiple of 256 bytes; `MemoryError` where there is no room."""

    def address(self, buffer: Any) -> int:
        """Device address of the buffer's first element."""

    def matches(self, buffer: Any, dtype: np.dtype) -> bool:
        """Whether the buffer is on the device, contiguous, and of this element type."""

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A page-locked host array, so that copies from and to it overlap with other work."""

    def upload(self, host: np.ndarray, buffer: Any) -> None:
        """Enqueue a copy to the device."""

    def download(self, buffer: Any, host: np.ndarray) -> None:
        """Enqueue a copy to the host."""

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue a copy on the device, between buffers of one shape and type."""

    def replay(self, graph: "CudaGraph", sources: Sequence[int]) -> None:
        """Launch a graph that copies from these addresses first.

        Not inside `active()`, but ordered as if it were.
        """

    def synchronize(self) -> None:
        """Wait for the stream."""


class TorchMemory:
    """Buffers are `torch.Tensor`s: results can be used by PyTorch where they lie."""

    def __init__(self, index: int) -> None:
        import torch

        if not torch.cuda.is_available():
            raise InputError(
                "this PyTorch has no CUDA; install a CUDA build of it, or choose PyCUDA's memory"
            )
        self._torch = torch
        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)
        self.stream = self._stream.cuda_stream
        self._latest = self._stream  # what is enqueued there comes after all that was here
        self._dtypes: dict[np.dtype, Any] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        cuda = self._torch.cuda
        with cuda.device(self._device):
            caller = cuda.current_stream()
            self._stream.wait_stream(caller)
            if self._latest not in (caller, self._stream):
                self._stream.wait_stream(self._latest)
            with cuda.stream(self._stream):
                yield
            caller.wait_stream(self._stream)
            self._latest = caller

    def _dtype(self, dtype: np.dtype) -> Any:
        if dtype not in self._dtypes:
            self._dtypes[dtype] = self._torch.from_numpy(np.empty(0, dtype)).dtype
        return self._dtypes[dtype]

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        try:
            return self._torch.empty(shape, dtype=self._dtype(dtype), device=self._device)
        except self._torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    def address(self, buffer: Any) -> int:
        return buffer.data_ptr()

    def matches(self, buffer: Any, dtype: np.dtype) -> bool:
        here = isinstance(buffer, self._torch.Tensor) and buffer.is_cuda
        here = here and buffer.get_device() == self._device.index
        return here and buffer.dtype == self._dtype(dtype) and buffer.is_contiguous()

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self._torch.empty(shape, dtype=self._dtype(dtype), pin_memory=True).numpy()

    def upload(self, host: np.ndarray, buffer: Any) -> None:
        buffer.copy_(self._torch.from_numpy(host), non_blocking=True)

    def download(self, buffer: Any, host: np.ndarray) -> None:
        self._torch.from_numpy(host).copy_(buffer, non_blocking=True)

    def copy(self, source: Any, target: Any) -> None:
        target.copy_(source, non_blocking=True)

    def replay(self, graph: "CudaGraph", sources: Sequence[int]) -> None:
        # On the caller's stream: to wait for one another costs streams some ten microseconds.
        # All that this does the GPU waits for: of a stream only its handle is asked, which is not
        # public; the public way makes an object first, which takes longer than the launch.
        index = self._device.index
        cuda = self._torch.cuda
        here = cuda.current_device() == index
        with contextlib.nullcontext() if here else cuda.device(self._device):
            handle = self._torch._C._cuda_getCurrentRawStream(index)
            if self._latest.cuda_stream != handle:
                caller = cuda.current_stream(self._device)
                caller.wait_stream(self._latest)
                self._latest = caller
            graph.launch(handle, sources)

    def synchronize(self) -> None:
        self._stream.synchronize()


class PyCudaMemory:
    """Buffers are `pycuda.gpuarray.GPUArray`s, in the device's primary context."""

    def __init__(self, index: int) -> None:
        import pycuda.driver
        import pycuda.gpuarray

        self._driver, self._gpuarray = pycuda.driver, pycuda.gpuarray
        self._driver.init()
        # The primary context is the one that TensorRT works in.
        self._context = self._driver.Device(index).retain_primary_context()
        with self.active():
            self._stream = self._driver.Stream()
        self.stream = self._stream.handle

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        try:
            return self._gpuarray.empty(shape, dtype)
        except self._driver.MemoryError as error:
            raise MemoryError(str(error)) from error

    def address(self, buffer: Any) -> int:
        return int(buffer.gpudata)

    def matches(self, buffer: Any, dtype: np.dtype) -> bool:
        here = isinstance(buffer, self._gpuarray.GPUArray)
        return here and buffer.flags.c_contiguous and buffer.dtype == dtype

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return self._driver.pagelocked_empty(shape, dtype)

    def upload(self, host: np.ndarray, buffer: Any) -> None:
        self._driver.memcpy_htod_async(buffer.gpudata, host, self._stream)

    def download(self, buffer: Any, host: np.ndarray) -> None:
        self._driver.memcpy_dtoh_async(host, buffer.gpudata, self._stream)

    def copy(self, source: Any, target: Any) -> None:
        size = math.prod(source.shape) * source.dtype.itemsize
        self._driver.memcpy_dtod_async(target.gpudata, source.gpudata, size, self._stream)

    def replay(self, graph: "CudaGraph", sources: Sequence[int]) -> None:
        with self.active():
            graph.launch(self.stream, sources)

    def synchronize(self) -> None:
        self._stream.synchronize()


MEMORIES = {"torch": TorchMemory, "pycuda": PyCudaMemory}


def create_memory(name: str, index: int) -> Memory:
    """The memory of kind `name` on device `index`; `InputError` where it cannot be had."""
    if name not in MEMORIES:
        raise InputError(f"unknown memory {name!r}; choose one of {', '.join(MEMORIES)}")
    if importlib.util.find_spec(name) is None:
        raise InputError(
            f"the package {name} is not installed, so it cannot give device memory; install it, "
            f"or choose another of {', '.join(MEMORIES)}"
        )
    return MEMORIES[name](index)


CAPTURE_MODE_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may go on calling CUDA
MEMCPY_NODE = 1  # CUgraphNodeType
# A CUDA_MEMCPY3D as 64-bit words, and those that hold the device addresses.
WORDS, SOURCE, TARGET = 25, 6, 17


class CudaGraph:
    """The work that one call puts on a stream, recorded once and launched again and again.

    Shapes and addresses are recorded with it, but for the sources of the copies that it begins
    with. `RuntimeError` where something in the call cannot be recorded.
    """

    def __init__(
        self,
        stream: int,
        enqueue: Callable[[], None],
        copies: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """Record `enqueue()`, which must only enqueue on `stream`: nothing runs meanwhile.

        `copies` are what runs before it: (target, source, bytes) of each.
        """

        def work() -> None:
            for target, source, size in copies:
                gpu.copy_async(target, source, size, stream)
            enqueue()

        self._driver = gpu.driver()
        graph = self._record(ctypes.c_void_p(stream), work)
        weakref.finalize(self, self._driver.cuGraphDestroy, graph)  # its nodes are named below
        self._executable = ctypes.c_void_p()
        status = self._driver.cuGraphInstantiateWithFlags(
            ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
        )
        gpu.check(status, "cuGraphInstantiateWithFlags")
        weakref.finalize(self, self._driver.cuGraphExecDestroy, self._executable)
        self._copies = self._find(graph, [target for target, _, _ in copies])
        self._context = ctypes.c_void_p()
        status = self._driver.cuCtxGetCurrent(ctypes.byref(self._context))
        gpu.check(status, "cuCtxGetCurrent")

    def _record(self, stream: ctypes.c_void_p, enqueue: Callable[[], None]) -> ctypes.c_void_p:
        mode = ctypes.c_int(CAPTURE_MODE_THREAD_LOCAL)
        graph, failure = ctypes.c_void_p(), None
        with gpu.CAPTURE:
            gpu.check(self._driver.cuStreamBeginCapture_v2(stream, mode), "cuStreamBeginCapture")
            try:
                enqueue()
            except Exception as error:  # the capture must be ended before anything else is called
                failure = error
            status = self._driver.cuStreamEndCapture(stream, ctypes.byref(graph))
        if failure is not None:
            raise failure
        gpu.check(status, "cuStreamEndCapture")
        return graph

    def _find(
        self, graph: ctypes.c_void_p, targets: list[int]
    ) -> list[tuple[ctypes.c_void_p, ctypes.Array]]:
        """The nodes of a graph that copy to these addresses, and their parameters."""
        if not targets:
            return []
        count = ctypes.c_size_t()
        status = self._driver.cuGraphGetNodes(graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        status = status or self._driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count))
        gpu.check(status, "cuGraphGetNodes")
        found = {}
        for node in map(ctypes.c_void_p, nodes):
            kind, copy = ctypes.c_int(), (ctypes.c_uint64 * WORDS)()
            status = self._driver.cuGraphNodeGetType(node, ctypes.byref(kind))
            if kind.value == MEMCPY_NODE:
                status = status or self._driver.cuGraphMemcpyNodeGetParams(node, copy)
                found[copy[TARGET]] = (node, copy)
            gpu.check(status, "cuGraphMemcpyNodeGetParams")
        if not found.keys() >= set(targets):
            raise RuntimeError("a copy is not in the graph")
        return [found[target] for target in targets]

    def launch(self, stream: int, sources: Sequence[int] = ()) -> None:
        """Enqueue the recorded work on a stream; `sources` are the addresses to copy from."""
        for (node, copy), source in zip(self._copies, sources, strict=True):
            if copy[SOURCE] != source:  # what has been launched already keeps its own
                copy[SOURCE] = source
                status = self._driver.cuGraphExecMemcpyNodeSetParams(
                    self._executable, node, copy, self._context
                )
                gpu.check(status, "cuGraphExecMemcpyNodeSetParams")
        status = self._driver.cuGraphLaunch(self._executable, ctypes.c_void_p(stream))
        gpu.check(status, "cuGraphLaunch")
