"""How the stand-in keeps to the real bindings' names, per version."""

import enum

VERSIONS = {"10.16": "10.16.1.11", "11.4": "11.4.0.106"}
RTX_VERSION = "1.6.1.120"  # of TensorRT for RTX, whose API is that of 11

# Members and values of the enumerations that the project uses, or might use by mistake.
COMMON_ENUMS = {
    "DataType": {"FLOAT": 0, "HALF": 1, "INT32": 3, "BOOL": 4, "UINT8": 5, "BF16": 7, "INT64": 8},
    "TensorIOMode": {"NONE": 0, "INPUT": 1, "OUTPUT": 2},
    "TensorLocation": {"DEVICE": 0, "HOST": 1},
    "MemoryPoolType": {"WORKSPACE": 0},
    "HardwareCompatibilityLevel": {"NONE": 0, "AMPERE_PLUS": 1},
    "ProfilingVerbosity": {"LAYER_NAMES_ONLY": 0, "NONE": 1, "DETAILED": 2},
    "LayerInformationFormat": {"ONELINE": 0, "JSON": 1},
    "Severity": {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4},
}
ENUMS = {
    "10.16": {
        "BuilderFlag": {"FP16": 0, "TF32": 6, "VERSION_COMPATIBLE": 13},
        "NetworkDefinitionCreationFlag": {
            "EXPLICIT_BATCH": 0,
            "STRONGLY_TYPED": 1,
            "PREFER_JIT_PYTHON_PLUGINS": 2,
        },
    },
    "11.4": {
        "BuilderFlag": {"TF32": 6, "VERSION_COMPATIBLE": 12},
        "NetworkDefinitionCreationFlag": {
            "STRONGLY_TYPED": 0,
            "PREFER_JIT_PYTHON_PLUGINS": 1,
        },
    },
}

ENUMS[RTX_VERSION] = {
    "BuilderFlag": ENUMS["11.4"]["BuilderFlag"],
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": 0},
    "DynamicShapesKernelSpecializationStrategy": {"LAZY": 0, "EAGER": 1, "NONE": 2},
}


class BindingEnum(enum.Enum):
    """Like a pybind11 enumeration: `int(x)` works, `1 << x` does not."""

    def __int__(self) -> int:
        return self.value


def make_enums(version: str) -> dict[str, type[BindingEnum]]:
    """The enumerations of one version by name."""
    tables = COMMON_ENUMS | ENUMS.get(version, ENUMS[RTX_VERSION])
    return {name: BindingEnum(name, members) for name, members in tables.items()}


class Strict:
    """A class of the bindings: a public attribute can be set only where `WRITABLE` names it."""

    WRITABLE: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and name not in self.WRITABLE:
            raise AttributeError(f"{type(self).__name__} has no writable attribute {name!r}")
        object.__setattr__(self, name, value)


class Overridable:
    """A class that Python derives from; its own `__init__` must be called, as pybind11 demands."""

    def __init__(self) -> None:
        self._constructed = True


def require(instance: object, kind: type) -> None:
    """Take only what the bindings take."""
    if not isinstance(instance, kind) or not getattr(instance, "_constructed", True):
        raise TypeError(f"incompatible function arguments: {instance!r} is no {kind.__name__}")
