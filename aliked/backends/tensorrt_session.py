"""One TensorRT engine with its execution context, its buffers, and perhaps a CUDA graph."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aliked import gpu
from aliked.backends.cuda_graph import CudaGraph
from aliked.backends.cuda_memory import ALIGNMENT, Memory
from aliked.backends.tensorrt_runtime import journal, open_engine, runtime_module
from aliked.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt


class Session:
    """Runs an engine of one input. Calls belong inside `memory.active()`; not thread-safe.

    Device buffers and pinned arrays, by tensor name, are made for one input shape at a time and
    used again with every run.
    """

    def __init__(
        self, path: Path, device: gpu.Device, memory: Memory, cuda_graph: bool, lean: bool
    ) -> None:
        self.path, self.device, self.memory = path, device, memory
        self.cuda_graph, self.lean = cuda_graph, lean
        self.engine, self.manifest = open_engine(path, device, lean)
        trt = runtime_module(lean)
        self.inputs = self._tensors(trt.TensorIOMode.INPUT)
        self.outputs = self._tensors(trt.TensorIOMode.OUTPUT)
        self.shape: tuple[int, ...] | None = None  # of the input, for which all below is made
        self.buffers: dict[str, Any] = {}
        self.pinned: dict[str, np.ndarray] = {}
        self.context = self._create_context()
        self._batch: Any = None
        self._graph: CudaGraph | None = None

    def _tensors(self, mode: "trt.TensorIOMode") -> list[str]:
        names = map(self.engine.get_tensor_name, range(self.engine.num_io_tensors))
        return [name for name in names if self.engine.get_tensor_mode(name) == mode]

    def _create_context(self) -> "trt.IExecutionContext":
        journal().errors.clear()
        context = self.engine.create_execution_context()
        if context is None:
            raise self.out_of_memory(journal().last_words())
        if self.manifest["detailed"]:  # what the inspector shows is not to cost time here
            verbosity = runtime_module(self.lean).ProfilingVerbosity
            context.nvtx_verbosity = verbosity.LAYER_NAMES_ONLY
        return context

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor; `InputError` where NumPy does not have it."""
        trt, dtype = runtime_module(self.lean), self.engine.get_tensor_dtype(name)
        try:
            return np.dtype(trt.nptype(dtype))
        except TypeError as error:
            raise InputError(
                f"{name} of {self.path} is {dtype.name}; export it with float32 inputs and outputs"
            ) from error

    def limits(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest shape that the input takes."""
        (name,) = self.inputs
        fixed = tuple(self.engine.get_tensor_shape(name))
        if -1 not in fixed:
            return fixed, fixed
        smallest, _, largest = self.engine.get_tensor_profile_shape(name, 0)
        return tuple(smallest), tuple(largest)

    def prepare(self, shape: tuple[int, ...]) -> None:
        """Set the input's shape and make the buffers that go with it, once per shape.

        `InputError` for a shape outside the engine's limits, for outputs whose size depends on
        the data, and where the device has no room.
        """
        if shape == self.shape:
            return
        self._check_shape(shape)
        self.memory.synchronize()  # the old buffers may still be written to
        self.shape, self._graph = None, None
        journal().errors.clear()
        (name,) = self.inputs
        self._require(self.context.set_input_shape(name, shape), f"the input shape {list(shape)}")
        self._make_buffers({name: shape, **self._output_shapes()})
        self.shape = shape

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        smallest, largest = self.limits()
        inside = len(shape) == len(smallest) and all(
            low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
        )
        if inside:
            return
        takes = list(smallest) if smallest == largest else f"{list(smallest)} to {list(largest)}"
        raise InputError(
            f"the input is {list(shape)}, but {self.path} takes {takes}; give images of that "
            "size, or build an engine for this one"
        )

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        missing = self.context.infer_shapes()
        if missing:
            raise InputError(f"{self.path} needs values for {missing} first; export it again")
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in shapes.items():
            if any(size < 0 for size in shape):
                raise InputError(
                    f"the size of {name} in {self.path} depends on the data; export with a fixed "
                    "top_k or n_limit"
                )
        return shapes

    def _make_buffers(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.buffers.clear()
        self.pinned.clear()
        for name, shape in shapes.items():
            self.buffers[name] = self.empty(shape, self.dtype(name))
            self.pinned[name] = self.memory.pinned(shape, self.dtype(name))
            self._set_address(name, self.buffers[name])

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """A device buffer; `InputError` where the device has no room."""
        try:
            return self.memory.empty(shape, dtype)
        except MemoryError as error:
            raise self.out_of_memory(str(error), shape[0]) from error

    def _set_address(self, name: str, buffer: Any) -> None:
        address = self.memory.address(buffer)
        self._require(self.context.set_tensor_address(name, address), f"the address of {name}")

    def _require(self, done: bool, what: str) -> None:
        if done:
            return
        why = journal().last_words()
        if "memory" in why.lower():
            raise self.out_of_memory(why)
        raise InputError(f"TensorRT refuses {what} of {self.path} ({why}); build it again")

    def out_of_memory(self, why: str, batch: int | None = None) -> InputError:
        """What to do where the device has no room for `batch` images (by default the most)."""
        workspace = self.manifest["max_workspace_size_mib"]
        limit = f"a workspace of {workspace} MiB" if workspace else "no limit on its workspace"
        return InputError(
            f"out of device memory on {self.device.name} ({why}): {self.path} was built with "
            f"{limit} and is to run a batch of {batch or self.limits()[1][0]}; build it with a "
            "smaller --max_workspace_size or a smaller batch, or free the GPU"
        )

    def run(self, batch: Any) -> None:
        """Enqueue the engine on `batch`, a device buffer of the prepared shape."""
        journal().errors.clear()
        self._batch = batch  # the caller may let go of it before the stream has read it
        (name,) = self.inputs
        mine = self.buffers[name]
        # A recorded graph reads where it was recorded; TensorRT wants aligned addresses.
        if batch is not mine and (self.cuda_graph or self.memory.address(batch) % ALIGNMENT):
            self.memory.copy(batch, mine)
            batch = mine
        if self._graph:
            self._graph.launch()
            return
        self._set_address(name, batch)
        self._enqueue()
        if self.cuda_graph:  # the run above has settled what the engine allocates late
            self._record()

    def _enqueue(self) -> None:
        self._require(self.context.execute_async_v3(self.memory.stream), "the execution")

    def _record(self) -> None:
        self.memory.synchronize()
        try:
            self._graph = CudaGraph(self.memory.stream, self._enqueue)
        except RuntimeError as error:
            raise InputError(
                f"{self.path} cannot be recorded as a CUDA graph ({error}); run it without"
            ) from error
