"""A make-believe machine: its GPU, its driver, its streams, its memory, and what goes wrong there.

Work put on a stream runs when somebody synchronizes the stream, so that code which does not wait
reads stale results here too.
"""

import copy
import ctypes
import itertools
import math
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from aliked.backends.cuda_memory import SOURCE, TARGET, WORDS

NO_DEVICE, INVALID_CAPTURE = 100, 901  # CUresult


class Crash(BaseException):
    """Where the real library would end the process or read freed memory."""


@dataclass
class Machine:
    """One machine; tests set the fields that make it fail."""

    gpus: list[tuple[str, int, int]] = field(default_factory=lambda: [("Stand-in RTX", 8, 6)])
    driver_status: int = 0  # of cuInit
    free_bytes: int = 2**40  # device memory
    execution_error: str = ""  # what the next executions fail with
    capturable: bool = True
    odd_tensors: dict[str, str] = field(default_factory=dict)  # name: "open", "host" or "bf16"

    def __post_init__(self) -> None:
        self.driver = Driver(self)
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.allocations: dict[int, int] = {}  # address -> bytes
        self.page_locked: dict[int, int] = {}  # the same of host memory
        self.current = 0  # how many times the device has been made current
        self.plugins_registered = False
        self.compiled = 0  # engines that TensorRT for RTX has compiled for this GPU

    @property
    def has_device(self) -> bool:
        return self.driver_status == 0 and bool(self.gpus)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Put work on a stream, or into the graph that is being recorded from it."""
        if not self.current:
            raise Crash("the device is not current")
        self.captures.get(stream, self.streams[stream]).append(work)

    def synchronize(self, stream: int) -> None:
        if stream in self.captures:
            raise Crash("a stream that is being captured cannot be waited for")
        pending, self.streams[stream] = self.streams[stream], []
        for work in pending:
            work()

    def allocate(self, size: int) -> np.ndarray:
        """`size` bytes of device memory at a multiple of 256."""
        if sum(self.allocations.values()) + size > self.free_bytes:
            raise MemoryError("CUDA out of memory")
        room = np.zeros(size + 256, np.uint8)
        start = -room.ctypes.data % 256
        data = room[start : start + size]
        self.allocations[data.ctypes.data] = size
        return data

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Page-locked host memory."""
        array = np.zeros(shape, dtype)
        self.page_locked[array.ctypes.data] = array.nbytes
        weakref.finalize(array, self.page_locked.pop, array.ctypes.data)
        return array

    def view(self, address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """What lies at an address; `Crash` where that is not device memory any more."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not lies_in(self.allocations, address, size):
            raise Crash("this address is not in device memory")
        return at(address, size).view(dtype).reshape(shape)


def lies_in(pieces: dict[int, int], address: int, size: int) -> bool:
    """Whether `size` bytes at an address are part of one of the pieces of memory."""
    return any(
        start <= address and address + size <= start + length for start, length in pieces.items()
    )


def at(address: int, size: int) -> np.ndarray:
    """The bytes at an address."""
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)


class Driver:
    """The part of libcuda that the project calls; arguments are those of ctypes."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._nodes: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)

    def cuInit(self, flags: int) -> int:
        return self._machine.driver_status

    def cuGetErrorName(self, status, name) -> int:
        name._obj.value = b"CUDA_ERROR_NO_DEVICE" if status.value == NO_DEVICE else b"CUDA_ERROR"
        return 0

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = len(self._machine.gpus)
        return 0

    def cuDeviceGet(self, handle, index) -> int:
        handle._obj.value = index.value
        return 0

    def cuDeviceGetName(self, name, size, handle) -> int:
        name.value = self._machine.gpus[handle.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory, handle) -> int:
        memory._obj.value = 8 * 2**30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle) -> int:
        value._obj.value = self._machine.gpus[handle.value][{75: 1, 76: 2}[attribute.value]]
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode) -> int:
        if self._machine.streams[stream.value]:
            raise Crash("work was still running when the capture began")
        self._machine.captures[stream.value] = []
        return 0

    def cuStreamEndCapture(self, stream, graph) -> int:
        work = self._machine.captures.pop(stream.value)
        if not self._machine.capturable:
            return INVALID_CAPTURE
        graph._obj.value = next(self._numbers)
        self._graphs[graph._obj.value] = work
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags) -> int:
        executable._obj.value = next(self._numbers)
        self._graphs[executable._obj.value] = self._graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph) -> int:
        del self._graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    def cuMemcpyAsync(self, target, source, size, stream) -> int:
        work = Copy(self._machine, target.value, source.value, size.value)
        self._machine.enqueue(stream.value, work)
        return 0

    def cuGraphGetNodes(self, graph, nodes, count) -> int:
        work = self._graphs[graph.value]
        count._obj.value = len(work)
        for index in range(len(work) if nodes else 0):
            nodes[index] = next(self._numbers)
            self._nodes[nodes[index]] = work[index]
        return 0

    def cuGraphNodeGetType(self, node, kind) -> int:
        kind._obj.value = int(isinstance(self._nodes[node.value], Copy))
        return 0

    def cuGraphMemcpyNodeGetParams(self, node, words) -> int:
        words[:] = self._nodes[node.value].words
        return 0

    def cuGraphExecMemcpyNodeSetParams(self, executable, node, words, context) -> int:
        self._nodes[node.value].words = list(words)
        return 0

    def cuCtxGetCurrent(self, context) -> int:
        return 0

    def cuGraphLaunch(self, executable, stream) -> int:
        for work in self._graphs[executable.value]:
            self._machine.enqueue(stream.value, copy.copy(work))  # as it is now
        return 0


class Copy:
    """A copy between two addresses, whose parameters are the words of a CUDA_MEMCPY3D.

    What lies in ordinary memory is read at once, as the driver does.
    """

    def __init__(self, machine: Machine, target: int, source: int, size: int) -> None:
        self._machine, self._size = machine, size
        self.words = [0] * WORDS
        self.words[SOURCE], self.words[TARGET] = source, target
        places = (machine.allocations, machine.page_locked)
        self._from, self._to = (
            next((pieces for pieces in places if lies_in(pieces, address, size)), None)
            for address in (source, target)
        )
        self._staged = None if self._from is not None else at(source, size).copy()

    def __call__(self) -> None:
        np.copyto(self._bytes(TARGET, self._to), self._source())

    def _source(self) -> np.ndarray:
        return self._bytes(SOURCE, self._from) if self._staged is None else self._staged

    def _bytes(self, word: int, pieces: dict[int, int] | None) -> np.ndarray:
        """What the copy reads or writes; `Crash` where it is not there any more."""
        address = self.words[word]
        if not lies_in(pieces or {}, address, self._size):
            raise Crash("this address is in no memory that the device can use")
        return at(address, self._size)


class HostBuffer:
    """A piece of make-believe device memory, freed when nobody holds it."""

    def __init__(self, machine: Machine, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.data = machine.allocate(math.prod(shape) * self.dtype.itemsize)
        self.address = self.data.ctypes.data
        weakref.finalize(self, machine.allocations.pop, self.address)

    def numpy(self) -> np.ndarray:
        return self.data.view(self.dtype).reshape(self.shape).copy()


class HostMemory:
    """The memory interface of the TensorRT backend, in host memory."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.stream = 100 + len(machine.streams)
        machine.streams[self.stream] = []

    @contextmanager
    def active(self):
        self._machine.current += 1
        try:
            yield
        finally:
            self._machine.current -= 1

    def empty(self, shape, dtype) -> HostBuffer:
        return HostBuffer(self._machine, shape, dtype)

    def address(self, buffer: HostBuffer) -> int:
        return buffer.address

    def matches(self, buffer, dtype) -> bool:
        return isinstance(buffer, HostBuffer) and buffer.dtype == dtype

    def pinned(self, shape, dtype) -> np.ndarray:
        return self._machine.pinned(shape, dtype)

    def replay(self, graph, sources) -> None:
        with self.active():
            graph.launch(self.stream, sources)

    def synchronize(self) -> None:
        self._machine.synchronize(self.stream)
