"""TensorRT for RTX on engines of LightGlue, alone or from two images on, of fixed shapes."""

from pathlib import Path
from typing import Any

import numpy as np

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.cuda_memory import CudaGraph, create_memory
from aliked.backends.tensorrt import deserialize, runtime_config
from aliked.backends.tensorrt_library import RTX, journal, settle_tf32
from aliked.errors import InputError
from aliked.matching import Arrays, PairRuntime


class EnginePairRuntime(PairRuntime):
    """One engine on a stream of its own, whose buffers are used again with every run."""

    def __init__(self, name: str, path: Path, device: str, cuda_graph: bool) -> None:
        """The engine at `path`, as `build_lightglue_file` made it, for this library and GPU."""
        self.name, self.path = name, path
        index, _ = gpu.device(device)  # first: without a driver the library crashes
        self.device = f"cuda:{index}"
        self._trt, self.memory = RTX.load(), create_memory("torch", index)
        self._graph: CudaGraph | None = None
        with self.memory.active():
            self.engine = deserialize(path, False, RTX)
            config = runtime_config(self._trt, self.engine, cuda_graph)
            self.context = self.engine.create_execution_context(config)
            if self.context is None:
                raise InputError(f"{RTX} cannot compile {path}: {journal().last_words(RTX)}")
            self._make_buffers()
            self._enqueue()  # settles what the engine allocates late
            self.memory.synchronize()
            if cuda_graph:
                self._graph = CudaGraph(self.memory.stream, self._enqueue)

    def _make_buffers(self) -> None:
        """A device buffer and a page-locked array for every input and output."""
        self.buffers: dict[str, Any] = {}
        self.pinned: dict[str, np.ndarray] = {}
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        output = self._trt.TensorIOMode.OUTPUT
        self.outputs = [name for name in names if self.engine.get_tensor_mode(name) == output]
        for name in names:
            shape = tuple(self.engine.get_tensor_shape(name))
            dtype = np.dtype(self._trt.nptype(self.engine.get_tensor_dtype(name)))
            self.buffers[name] = self.memory.empty(shape, dtype)
            self.pinned[name] = self.memory.pinned(shape, dtype)
            self.context.set_tensor_address(name, self.memory.address(self.buffers[name]))

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.memory.stream):
            raise InputError(f"{RTX} refuses to run {self.path}: {journal().last_words(RTX)}")

    def _run(self) -> None:
        if self._graph:
            self._graph.launch(self.memory.stream)
        else:
            self._enqueue()

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""
        with self.memory.active():
            for name, rows in inputs.items():
                self.pinned[name][...] = rows
                self.memory.upload(self.pinned[name], self.buffers[name])
            self._run()
            for name in self.outputs:
                self.memory.download(self.buffers[name], self.pinned[name])
            self.memory.synchronize()
        return {name: self.pinned[name].copy() for name in self.outputs}

    def to_device(self, inputs: Arrays) -> Arrays:
        """The inputs in new buffers on the device."""
        with self.memory.active():
            batch = {}
            for name, rows in inputs.items():
                self.pinned[name][...] = rows
                batch[name] = self.memory.empty(rows.shape, self.pinned[name].dtype)
                self.memory.upload(self.pinned[name], batch[name])
            self.memory.synchronize()  # the pinned arrays are used again
        return batch

    def infer(self, batch: Arrays) -> dict[str, Any]:
        """The outputs by name; the next call overwrites them."""
        with self.memory.active():
            for name, rows in batch.items():
                self.memory.copy(rows, self.buffers[name])
            self._run()
        return {name: self.buffers[name] for name in self.outputs}

    def synchronize(self) -> None:
        """Wait for the stream."""
        with self.memory.active():
            self.memory.synchronize()


def open_runtime(
    name: str,
    graph: str,
    spec: Spec,
    matcher_weights: Path | None,
    size: tuple[int, int],
    library: str,
    cuda_graph: bool = False,
) -> EnginePairRuntime:
    """The engine `spec.model_path`, which holds the weights; `library` is "tensorrt-rtx"."""
    settle_tf32(spec.tf32)
    return EnginePairRuntime(name, Path(spec.model_path), spec.device, cuda_graph)
