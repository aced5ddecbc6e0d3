"""Stand-ins for the runtime, the engine and its execution context: ONNX Runtime inside."""

import functools
import hashlib
import json

import numpy as np
import onnx
import onnxruntime

from tests.helpers.fake_tensorrt.builder import IHostMemory
from tests.helpers.fake_tensorrt.machine import Crash
from tests.helpers.fake_tensorrt.names import Strict, require

ALIGNMENT = 256


class Runtime(Strict):
    """Loads engines of its own version and GPU."""

    WRITABLE = ("engine_host_code_allowed",)
    _module = None  # set in a subclass per version

    def __init__(self, logger) -> None:
        require(logger, self._module.ILogger)
        if not self._module._machine.has_device:
            raise Crash("segmentation fault: there is no driver")
        self._logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine) -> "ICudaEngine | None":
        plan = bytes(serialized_engine)
        if not plan.startswith(b"plan"):
            return self._fail("the magic tag does not match")
        text, _, model = plan.removeprefix(b"plan").partition(b"\0")
        header = json.loads(text)
        reason = self._refusal(header)
        if b"DeformConv" in model and not self._module._machine.plugins_registered:
            reason = "could not find the plugin ModulatedDeformConv2d"
        return self._fail(reason) if reason else self._module.ICudaEngine(self, header, model)

    def _refusal(self, header: dict) -> str:
        here = self._module
        if here.__name__ == "tensorrt_lean" and not header["version_compatible"]:
            return "Unexpected call to stub loadRunner"
        if header["version_compatible"] and not self.engine_host_code_allowed:
            return "the engine contains host code, which is not allowed"
        if header["version"] != here.__version__ and not header["version_compatible"]:
            return "the engine was built by another version"
        if here.__name__ == "tensorrt_rtx":
            return ""  # compiled for this GPU when a context is made
        if header["gpu"] != list(here._machine.gpus[0]) and not header["hardware_compatible"]:
            return "the engine was built for another device"
        return ""

    def _fail(self, reason: str) -> None:
        self._logger.log(self._module.ILogger.Severity.ERROR, reason)


class ICudaEngine(Strict):
    """An ONNX model in ONNX Runtime."""

    def __init__(self, runtime: Runtime, header: dict, model: bytes) -> None:
        self._runtime, self._header = runtime, header
        self._module, self._machine = runtime._module, runtime._module._machine
        self._model, self._plan = onnx.load_from_string(model), model
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        graph = self._model.graph
        weights = {tensor.name for tensor in graph.initializer}
        self._inputs = {value.name: value for value in graph.input if value.name not in weights}
        self._outputs = {value.name: value for value in graph.output}

    def _tensor(self, name: str):
        require(name, str)
        return (self._inputs | self._outputs)[name]

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name):
        mode = self._module.TensorIOMode
        return mode.INPUT if name in self._inputs else mode.OUTPUT

    def get_tensor_shape(self, name) -> tuple[int, ...]:
        dims = self._tensor(name).type.tensor_type.shape.dim
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)

    def get_tensor_dtype(self, name):
        bf16 = self._machine.odd_tensors.get(name) == "bf16"
        elem_type = self._tensor(name).type.tensor_type.elem_type
        return self._module.DataType.BF16 if bf16 else self._module._dtype_of(elem_type)

    def get_tensor_location(self, name):
        self._tensor(name)
        place = self._module.TensorLocation
        return place.HOST if self._machine.odd_tensors.get(name) == "host" else place.DEVICE

    def get_tensor_profile_shape(self, name, profile_index) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._header["profiles"][profile_index][name]]

    def create_execution_context(self) -> "IExecutionContext | None":
        if self._machine.free_bytes < 2**20:
            self._runtime._fail("OutOfMemory: could not allocate activation memory")
            return None
        return IExecutionContext(self)

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector(self)


class CompiledEngine(ICudaEngine):
    """The `ICudaEngine` of TensorRT for RTX: compiled for this GPU when a context is made."""

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig(self._machine)

    def create_execution_context(self, runtime_config=None) -> "IExecutionContext | None":
        runtime_config._cache._compile(self._plan)
        return super().create_execution_context()


class IRuntimeConfig(Strict):
    """How TensorRT for RTX compiles an engine for this GPU."""

    WRITABLE = ("dynamic_shapes_kernel_specialization_strategy",)

    def __init__(self, machine) -> None:
        self._machine, self._cache = machine, IRuntimeCache(machine)

    def create_runtime_cache(self) -> "IRuntimeCache":
        return IRuntimeCache(self._machine)

    def set_runtime_cache(self, cache) -> bool:
        require(cache, IRuntimeCache)
        self._cache = cache
        return True


class IRuntimeCache(Strict):
    """Kernels by engine; the machine counts what had to be compiled."""

    def __init__(self, machine) -> None:
        self._machine, self._kernels = machine, set()

    def _compile(self, plan: bytes) -> None:
        kernel = f"{self._machine.gpus[0][0]} {hashlib.sha256(plan).hexdigest()}"
        if kernel not in self._kernels:
            self._machine.compiled += 1
        self._kernels.add(kernel)

    def deserialize(self, blob) -> bool:
        if not bytes(blob).startswith(b"kernels"):
            raise Crash("the library reads what is no cache")
        self._kernels = set(json.loads(bytes(blob).removeprefix(b"kernels")))
        return True

    def serialize(self) -> IHostMemory:
        return IHostMemory(b"kernels" + json.dumps(sorted(self._kernels)).encode())


class EngineInspector(Strict):
    """The layers of an engine: the nodes of its file."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, format) -> str:
        require(format, self._engine._module.LayerInformationFormat)
        new = self._engine._module.__version__.startswith("11.")
        nodes = self._engine._model.graph.node
        layers = [self._layer(node, new) for node in nodes]
        return json.dumps({"Layers": layers, "I/O Tensors" if new else "Bindings": []})

    def _layer(self, node, new: bool) -> str | dict:
        if not self._engine._header["detailed"]:
            return node.name
        kind = {"Format": "Linear", "Datatype": "Float"} if new else {"Format/Datatype": "Row FP32"}
        outputs = [{"Name": name, "Dimensions": [1], **kind} for name in node.output]
        return {"Name": node.name, "LayerType": node.op_type, "Outputs": outputs}


class IExecutionContext(Strict):
    """Runs the session on what lies at the addresses, when the stream gets there.

    One of several inputs has shapes that are fixed, as all others have.
    """

    WRITABLE = ("nvtx_verbosity",)

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._machine = engine, engine._machine
        levels = engine._module.ProfilingVerbosity
        detailed = engine._header["detailed"]
        self.nvtx_verbosity = levels.DETAILED if detailed else levels.LAYER_NAMES_ONLY
        self._addresses: dict[str, int] = {}
        self._input = next(iter(engine._inputs.values()))
        self._fixed = engine.get_tensor_shape(self._input.name)
        self._shape = None if -1 in self._fixed else self._fixed

    def _fail(self, reason: str) -> bool:
        self._engine._runtime._fail(reason)
        return False

    def set_input_shape(self, name, shape) -> bool:
        require(shape, (tuple, list))
        if name in self._engine._inputs and name != self._input.name:
            return tuple(shape) == self._engine.get_tensor_shape(name)
        if name != self._input.name or len(shape) != len(self._fixed):
            return self._fail(f"no input {name} of {len(shape)} dimensions")
        if -1 in self._fixed:
            low, _, high = self._engine.get_tensor_profile_shape(name, 0)
        else:
            low = high = self._fixed
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self._fail(f"{shape} is outside the optimization profile")
        self._shape = tuple(int(size) for size in shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else [self._input.name]

    def get_tensor_shape(self, name) -> tuple[int, ...]:
        fixed = self._engine.get_tensor_shape(name)
        if name == self._input.name:
            return self._shape or fixed
        if self._machine.odd_tensors.get(name) == "open":  # known after the run only
            return (*fixed[:-1], -1)
        return output_shapes(self._engine, self._shape)[name] if self._shape else fixed

    def set_tensor_address(self, name, memory) -> bool:
        self._engine._tensor(name)
        require(memory, int)
        if memory == 0 or memory % ALIGNMENT:
            return self._fail(f"the address of {name} is null or not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle) -> bool:
        if self._machine.execution_error:
            return self._fail(self._machine.execution_error)
        missing = (self._engine._inputs | self._engine._outputs).keys() - self._addresses
        if self._shape is None or missing:
            return self._fail(f"no shape, or no address for {missing}")
        if stream_handle not in self._machine.streams:
            raise Crash("no such stream")
        work = functools.partial(self._work, self._shape, dict(self._addresses))
        self._machine.enqueue(stream_handle, work)
        return True

    def _work(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        shapes = input_shapes(self._engine, shape) | output_shapes(self._engine, shape)
        view = {
            name: self._machine.view(address, shapes[name], numpy_type(self._engine, name))
            for name, address in addresses.items()
        }
        names = list(self._engine._outputs)
        results = self._engine._session.run(names, {n: view[n] for n in self._engine._inputs})
        for name, result in zip(names, results, strict=True):
            view[name][...] = result


def numpy_type(engine: ICudaEngine, name: str) -> np.dtype:
    """Element type of a tensor of the engine."""
    return np.dtype(engine._module.nptype(engine.get_tensor_dtype(name)))


def input_shapes(engine: ICudaEngine, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The inputs' shapes, `shape` the first's."""
    first, *others = engine._inputs
    return {first: shape, **{name: engine.get_tensor_shape(name) for name in others}}


@functools.cache
def output_shapes(engine: ICudaEngine, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What a run on zeros of this shape gives."""
    shapes, names = input_shapes(engine, shape), list(engine._outputs)
    zeros = {name: np.zeros(own, numpy_type(engine, name)) for name, own in shapes.items()}
    results = engine._session.run(names, zeros)
    return {name: result.shape for name, result in zip(names, results, strict=True)}
