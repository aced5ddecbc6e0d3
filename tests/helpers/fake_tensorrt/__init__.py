"""A stand-in for TensorRT's Python bindings, for what needs a GPU and a driver: running engines.

It has only names that the real bindings of its version have (`test_fake_tensorrt.py` holds it
against them), refuses what they refuse, and crashes where they crash. Its engines are the ONNX
files themselves, run by ONNX Runtime: it shows that the project calls TensorRT rightly, not what
TensorRT computes.
"""

from types import ModuleType

import numpy as np

from tests.helpers.fake_tensorrt import builder, runtime
from tests.helpers.fake_tensorrt.builder import TIMING_CACHE
from tests.helpers.fake_tensorrt.machine import Crash, HostMemory, Machine
from tests.helpers.fake_tensorrt.names import (
    RTX_VERSION,
    VERSIONS,
    Overridable,
    make_enums,
    require,
)

__all__ = ["RTX_VERSION", "VERSIONS", "Crash", "HostMemory", "Machine", "make_tensorrt"]

DATA_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF", 16: "BF16"}
CONCRETE = (
    builder.IBuilderConfig,
    builder.IHostMemory,
    builder.INetworkDefinition,
    builder.IOptimizationProfile,
    builder.IProgressMonitor,
    builder.ITensor,
    builder.ITimingCache,
    runtime.EngineInspector,
    runtime.ICudaEngine,
    runtime.IExecutionContext,
)
ONLY_RTX = (runtime.IRuntimeCache, runtime.IRuntimeConfig)


def make_tensorrt(version: str, machine: Machine, name: str = "tensorrt") -> ModuleType:
    """The module `name`, such as `tensorrt_lean`, of a version on a machine."""
    module, lean = ModuleType(name), name == "tensorrt_lean"
    module.__version__ = VERSIONS.get(version, version)
    module._machine = machine
    enums = make_enums(version)
    severity = enums.pop("Severity")
    for enum_name, enumeration in enums.items():
        setattr(module, enum_name, enumeration)
    module.ILogger = type("ILogger", (Overridable,), {"Severity": severity})
    for kind in (*CONCRETE, *(ONLY_RTX if name == "tensorrt_rtx" else ())):
        setattr(module, kind.__name__, kind)
    if name == "tensorrt_rtx":
        module.ICudaEngine = runtime.CompiledEngine
    for kind in (runtime.Runtime, *(() if lean else (builder.Builder, builder.OnnxParser))):
        setattr(module, kind.__name__, type(kind.__name__, (kind,), {"_module": module}))
    module._dtype_of = lambda elem_type: module.DataType[ONNX_TYPES[elem_type]]
    module._timings = lambda: TIMING_CACHE + f"{machine.gpus[0]} {module.__version__}".encode()
    module.nptype = lambda trt_type: nptype(module, trt_type)
    if not lean:
        module.init_libnvinfer_plugins = lambda logger, namespace: register(module, logger)
    return module


def nptype(module: ModuleType, trt_type) -> type:
    """NumPy's type; TypeError where it has none, as for BF16."""
    require(trt_type, module.DataType)
    if trt_type.name not in DATA_TYPES:
        raise TypeError(f"{trt_type} has no equivalent in NumPy")
    return DATA_TYPES[trt_type.name]


def register(module: ModuleType, logger) -> bool:
    """Make the standard plugins known."""
    require(logger, module.ILogger)
    module._machine.plugins_registered = True
    return True
