"""What the builders of TensorRT 10 and 11 are told: it is written down, nothing is built.

Building itself is tested with the real TensorRT for RTX (`tests/export/test_engine.py`). Here are
the options that it does not have, and the flags by which versions 10 and 11 differ.
"""

import io
import json
from pathlib import Path
from typing import IO

import onnx

from tests.helpers.fake_tensorrt.names import Overridable, Strict, require

TIMING_CACHE = b"timings of "


def pack(onnx_file: Path | IO[bytes], **header) -> bytes:
    """An engine of the stand-in: how it was built, and the ONNX file that ONNX Runtime runs."""
    model = onnx.shape_inference.infer_shapes(onnx.load(onnx_file))
    return b"plan" + json.dumps(header).encode() + b"\0" + model.SerializeToString()


class IHostMemory(Strict):
    """Bytes that belong to TensorRT."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class IProgressMonitor(Overridable):
    """What a build reports to."""


class ITensor(Strict):
    """The input of a network."""

    @property
    def name(self) -> str:
        return "image"


class INetworkDefinition(Strict):
    """What the parser fills."""

    def __init__(self, flags: list[str]) -> None:
        self._flags, self._file = flags, None

    def get_input(self, index: int) -> ITensor:
        return ITensor()


class OnnxParser(Strict):
    """Takes every file."""

    _module = None  # set in a subclass per version

    def __init__(self, network, logger) -> None:
        require(network, INetworkDefinition)
        require(logger, self._module.ILogger)
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        self._network._file = model
        return True

    def parse(self, model: bytes) -> bool:
        self._network._file = io.BytesIO(model)
        return True

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []


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
        self._module, self._flags = module, {module.BuilderFlag.TF32}
        self._pools: dict = {}
        self._cache: ITimingCache | None = None
        self._profiles: list[IOptimizationProfile] = []
        self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
        self.max_aux_streams = -1
        self.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY

    def set_flag(self, flag) -> None:
        require(flag, self._module.BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag) -> None:
        require(flag, self._module.BuilderFlag)
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool, pool_size) -> None:
        require(pool, self._module.MemoryPoolType)
        self._pools[pool] = pool_size

    def create_timing_cache(self, serialized_timing_cache) -> ITimingCache | None:
        data = bytes(serialized_timing_cache)
        return None if data and not data.startswith(TIMING_CACHE) else ITimingCache(data)

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
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder(Strict):
    """Packs the ONNX file with what it was told."""

    _module = None  # set in a subclass per version

    def __init__(self, logger) -> None:
        require(logger, self._module.ILogger)
        if not self._module._machine.has_device:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        known = self._module.NetworkDefinitionCreationFlag
        return INetworkDefinition([f.name for f in known if flags >> int(f) & 1])

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig(self._module)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network, config) -> IHostMemory | None:
        flags = {flag.name for flag in config._flags}
        if "FP16" in flags and "STRONGLY_TYPED" in network._flags:
            problem = "FP16 is not compatible with a strongly typed network"
            self._logger.log(self._module.ILogger.Severity.ERROR, problem)
            return None
        if config._cache is not None:
            config._cache._data = self._module._timings()
        ampere = self._module.HardwareCompatibilityLevel.AMPERE_PLUS
        detailed = self._module.ProfilingVerbosity.DETAILED
        plan = pack(
            network._file,
            version=self._module.__version__,
            gpu=self._module._machine.gpus[0],
            version_compatible="VERSION_COMPATIBLE" in flags,
            hardware_compatible=config.hardware_compatibility_level == ampere,
            detailed=config.profiling_verbosity == detailed,
            profiles=[profile._shapes for profile in config._profiles],
            flags=sorted(flags),
            network_flags=network._flags,
            aux_streams=config.max_aux_streams,
            workspace=next(iter(config._pools.values()), None),
        )
        return IHostMemory(plan)
