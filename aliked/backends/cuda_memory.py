"""Device buffers, pinned host buffers, a stream and CUDA graphs, by PyTorch or by PyCUDA."""

import contextlib
import ctypes
import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from aliked import gpu
from aliked.errors import InputError
from aliked.threads import each, in_parts

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


class Part(NamedTuple):
    """A part of page-locked memory, and where both sides of its copy are."""

    rows: slice  # of the images or, of a single one, of its pixels
    array: np.ndarray
    on_device: int
    on_host: int


class Twin:
    """Page-locked memory of a device buffer's shape and type, and copies between the two.

    The driver is called directly, with what can be known before: a copy by PyTorch takes 40 us of
    the processor's time, and this one 4. Inside the device's context; nothing is waited for.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], nbytes: int, make: Callable[[], np.ndarray]
    ) -> None:
        """Stand beside the buffer at `address`; `make` gives the memory, once it is needed."""
        self._on_device, self._shape, self.nbytes, self._make = address, shape, nbytes, make
        self._whole: Any = 0 if shape[:1] == (1,) else slice(None)

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The page-locked memory."""
        return self._make()

    @functools.cached_property
    def _on_host(self) -> int:
        return self.array.ctypes.data

    @functools.cached_property
    def _parts(self) -> list[Part]:
        """What several threads copy, one part each; nothing where it is not worth waking them."""
        images, pixels = (*self._shape, 1, 1)[:2]
        slices = in_parts(images if images > 1 else pixels, self.nbytes)
        if len(slices) == 1:
            return []
        array = self.array[self._whole]
        offsets = [rows.start * array.strides[0] for rows in slices]
        return [
            Part(rows, array[rows], self._on_device + offset, self._on_host + offset)
            for rows, offset in zip(slices, offsets, strict=True)
        ]

    def send(self, values: np.ndarray, stream: int) -> np.ndarray:
        """Queue the copy of an array of this shape and type to the device.

        Keep what is returned until the stream has been waited for: it may be read until then.
        """
        if not self._parts:  # by the driver's own page-locked memory it takes less than by ours
            values = np.ascontiguousarray(values)
            gpu.copy_async(self._on_device, values.ctypes.data, values.nbytes, stream)
            return values
        rows_of = values[self._whole]

        def copy(part: Part) -> Part:
            np.copyto(part.array, rows_of[part.rows])
            return part

        for part in each(copy, self._parts):
            gpu.copy_async(part.on_device, part.on_host, part.array.nbytes, stream)
        return values

    def fetch(self, stream: int) -> np.ndarray:
        """Queue the copy of all values from the device to `array`, which is returned."""
        gpu.copy_async(self._on_host, self._on_device, self.nbytes, stream)
        return self.array


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
