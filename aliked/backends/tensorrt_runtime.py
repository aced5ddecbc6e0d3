"""Opening a TensorRT engine safely: everything that can be known is checked before the runtime.

The runtime itself cannot be asked: without a driver it ends the process, and an engine of another
version or GPU is an error in its log at best.
"""

import functools
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from aliked import gpu
from aliked.backends.tensorrt_manifest import manifest_path, mismatch, read_manifest
from aliked.errors import InputError
from aliked.files import sha256

if TYPE_CHECKING:
    import tensorrt as trt

SEVERITIES = ("internal_error", "error", "warning", "info", "verbose")


def unavailable(lean: bool = False) -> str | None:
    """Why TensorRT cannot run here and what to do, or None. Loads nothing of it."""
    package = "tensorrt_lean" if lean else "tensorrt"
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed; see requirements-tensorrt.txt"
    return gpu.unavailable()


def runtime_module(lean: bool) -> ModuleType:
    """The bindings: of the whole of TensorRT, or of the lean runtime."""
    if lean:
        import tensorrt_lean as trt
    else:
        import tensorrt as trt
    return trt


@dataclass
class Journal:
    """What TensorRT says: its errors since they were last cleared, the rest on the terminal."""

    errors: list[str] = field(default_factory=list)
    least: str = "warning"  # the least severe level that is printed

    def write(self, level: str, message: str) -> None:
        """Take one message of TensorRT's logger."""
        if level in ("internal_error", "error"):
            self.errors.append(message)
        if SEVERITIES.index(level) <= SEVERITIES.index(self.least):
            print(f"TensorRT {level}: {message}", file=sys.stderr)

    def last_words(self) -> str:
        """What went wrong, for the end of a sentence."""
        return "; ".join(self.errors) or "TensorRT gave no reason"


@functools.cache
def journal() -> Journal:
    """The journal of this process."""
    return Journal()


@functools.cache
def logger(lean: bool = False) -> "trt.ILogger":
    """The one logger of these bindings, since TensorRT keeps the first that it is given."""
    trt = runtime_module(lean)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            journal().write(severity.name.lower(), msg)

    return Log()


def register_plugins(lean: bool = False) -> None:
    """Make the standard plugins known, DeformConv's among them; the lean runtime has none."""
    trt = runtime_module(lean)
    if not hasattr(trt, "init_libnvinfer_plugins"):
        return
    if not trt.init_libnvinfer_plugins(logger(lean), ""):
        raise InputError(
            f"TensorRT's standard plugins do not load ({journal().last_words()}); install "
            "TensorRT again"
        )


def open_engine(
    path: Path, device: gpu.Device, lean: bool = False
) -> tuple["trt.ICudaEngine", dict]:
    """Deserialize an engine for `device`, which is current; also its manifest.

    `InputError` for an engine that is missing, truncated, of another TensorRT version, of
    another GPU, or that TensorRT refuses.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; build it with convert_onnx_to_trt.py")
    manifest, trt = read_manifest(path), runtime_module(lean)
    try:
        reason = mismatch(manifest, trt.__version__, device, lean)
        whole = manifest["sha256"] == sha256(path)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{manifest_path(path)} is not the manifest of an engine; build the engine with "
            "convert_onnx_to_trt.py"
        ) from error
    if reason:
        raise InputError(f"{path} cannot run here: {reason}; build it again on this machine")
    if not whole:
        raise InputError(
            f"{path} is truncated or not the file that {manifest_path(path).name} describes; "
            "copy both again, or build the engine again"
        )
    return deserialize(path, manifest["version_compatible"], lean), manifest


def deserialize(path: Path, version_compatible: bool, lean: bool = False) -> "trt.ICudaEngine":
    """The engine in a file; `InputError` where TensorRT refuses it."""
    trt = runtime_module(lean)
    journal().errors.clear()
    register_plugins(lean)
    runtime = trt.Runtime(logger(lean))
    runtime.engine_host_code_allowed = version_compatible  # such a file carries its own runtime
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"TensorRT {trt.__version__} cannot load {path} ({journal().last_words()}); build it "
            "again on this machine"
        )
    return engine
