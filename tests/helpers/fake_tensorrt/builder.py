"""Stand-ins for the builder, the network and their settings."""

import json
import weakref

import onnx

from tests.helpers.fake_tensorrt.machine import Crash
from tests.helpers.fake_tensorrt.names import Overridable, Strict, require

TIMING_CACHE = b"timings of "


class IHostMemory(Strict):
    """Bytes that belong to TensorRT."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data

    @property
    def nbytes(self) -> int:
        return len(self._data)


class IProgressMonitor(Overridable):
    """What a build reports to; all three are overridden."""

    def phase_start(self, phase_name, parent_phase, num_steps) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name, step) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name) -> None:
        raise NotImplementedError


class ITensor(Strict):
    """A tensor of a network."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype) -> None:
        self._name, self._shape, self._dtype = name, shape, dtype

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self):
        return self._dtype


class INetworkDefinition(Strict):
    """What the parser fills."""

    def __init__(self, module, flags: list[str]) -> None:
        self._module, self._flags = module, flags
        self._model: onnx.ModelProto | None = None
        self._parser: weakref.ref | None = None

    def _io(self, values) -> list[ITensor]:
        weights = {tensor.name for tensor in self._model.graph.initializer}
        return [self._tensor(value) for value in values if value.name not in weights]

    def _tensor(self, value) -> ITensor:
        kind = value.type.tensor_type
        dims = kind.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        return ITensor(value.name, shape, self._module._dtype_of(kind.elem_type))

    @property
    def num_inputs(self) -> int:
        return len(self._io(self._model.graph.input)) if self._model else 0

    def get_input(self, index: int) -> ITensor:
        return self._io(self._model.graph.input)[index]


class ITimingCache(Strict):
    """Timings of one GPU and version."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._data)


class IOptimizationProfile(Strict):
    """Shapes of the dynamic inputs."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input, min, opt, max) -> None:
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))


class IBuilderConfig(Strict):
    """The builder's settings."""

    WRITABLE = (
        "builder_optimization_level",
        "hardware_compatibility_level",
        "max_aux_streams",
        "plugins_to_serialize",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self, module) -> None:
        self._module = module
        self._flags = {module.BuilderFlag.TF32}
        self._pools: dict = {}
        self._cache: ITimingCache | None = None
        self._profiles: list[IOptimizationProfile] = []
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
        self.max_aux_streams = -1
        self.plugins_to_serialize = []
        self.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor = None

    def set_flag(self, flag) -> None:
        require(flag, self._module.BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag) -> None:
        require(flag, self._module.BuilderFlag)
        self._flags.discard(flag)

    def get_flag(self, flag) -> bool:
        require(flag, self._module.BuilderFlag)
        return flag in self._flags

    def set_memory_pool_limit(self, pool, pool_size) -> None:
        require(pool, self._module.MemoryPoolType)
        require(pool_size, int)
        self._pools[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache) -> ITimingCache | None:
        data = bytes(serialized_timing_cache)
        if data and not data.startswith(TIMING_CACHE):
            return None
        return ITimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch) -> bool:
        require(cache, ITimingCache)
        if cache._data and cache._data != self._module._timings() and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def add_optimization_profile(self, profile) -> int:
        require(profile, IOptimizationProfile)
        for smallest, usual, largest in profile._shapes.values():
            ordered = all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True))
            if not ordered:
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder(Strict):
    """Checks a network and its settings as the real one does, and packs the ONNX file."""

    _module = None  # set in a subclass per version

    def __init__(self, logger) -> None:
        require(logger, self._module.ILogger)
        if not self._module._machine.has_device:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        known = self._module.NetworkDefinitionCreationFlag
        return INetworkDefinition(self._module, [f.name for f in known if flags >> int(f) & 1])

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._module)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network, config) -> IHostMemory | None:
        require(network, INetworkDefinition)
        require(config, IBuilderConfig)
        if network._parser is None or network._parser() is None:
            raise Crash("the parser, which owns the weights, is gone")
        problem = self._problem(network, config)
        if problem:
            self._logger.log(self._module.ILogger.Severity.ERROR, problem)
            return None
        if not self._report(config.progress_monitor):
            return None
        if config._cache is not None and config.builder_optimization_level > 0:
            config._cache._data = self._module._timings()
        return IHostMemory(self._pack(network, config))

    def _problem(self, network: INetworkDefinition, config: IBuilderConfig) -> str:
        """Why there is no engine, in the words of a log."""
        flags = {flag.name for flag in config._flags}
        if "FP16" in flags and "STRONGLY_TYPED" in network._flags:
            return "FP16 is not compatible with a strongly typed network"
        pool = config._pools.get(self._module.MemoryPoolType.WORKSPACE)
        if pool is not None and pool < self._module._machine.workspace_needed:
            return "Could not find any implementation for a node: insufficient memory in workspace"
        shapes = config._profiles[0]._shapes if config._profiles else {}
        dynamic = [t for t in network._io(network._model.graph.input) if -1 in t.shape]
        missing = [tensor.name for tensor in dynamic if tensor.name not in shapes]
        if missing:
            return f"no optimization profile has been defined for {missing}"
        operators = {node.op_type for node in network._model.graph.node}
        if "VERSION_COMPATIBLE" in flags and "DeformConv" in operators:
            return "ModulatedDeformConv2d is not in the version-compatible plugin library"
        return ""

    def _report(self, monitor: IProgressMonitor | None) -> bool:
        """Go through the phases of a build; whether it was not cancelled."""
        if monitor is None:
            return True
        require(monitor, IProgressMonitor)
        try:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Timing", "Building Engine", 3)
            going = all(self._step(monitor, step) for step in range(3))
            monitor.phase_finish("Timing")
            monitor.phase_finish("Building Engine")
        except BaseException as error:
            raise Crash(f"{error!r} passed through C++") from error
        return going

    def _step(self, monitor: IProgressMonitor, step: int) -> bool:
        machine = self._module._machine
        if machine.cancel_after == step:
            machine.press_ctrl_c()
        going = monitor.step_complete("Timing", step)
        require(going, bool)
        return going

    def _pack(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes:
        profiles = [profile._shapes for profile in config._profiles]
        ampere = self._module.HardwareCompatibilityLevel.AMPERE_PLUS
        detailed = self._module.ProfilingVerbosity.DETAILED
        header = {
            "version": self._module.__version__,
            "gpu": self._module._machine.gpus[0],
            "version_compatible": "VERSION_COMPATIBLE" in {flag.name for flag in config._flags},
            "hardware_compatible": config.hardware_compatibility_level == ampere,
            "detailed": config.profiling_verbosity == detailed,
            "profiles": profiles,
            "flags": sorted(flag.name for flag in config._flags),
            "network_flags": network._flags,
            "aux_streams": config.max_aux_streams,
        }
        model = misread(network._model).SerializeToString()
        return b"plan" + json.dumps(header).encode() + b"\0" + model


def misread(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the network computes of the file: GridSample's new mode names become nearest."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "GridSample" and attribute.s in (b"linear", b"cubic"):
                attribute.s = b"nearest"
    return changed
