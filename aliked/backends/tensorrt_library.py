"""The libraries that build and run engines: TensorRT, its lean runtime, TensorRT for RTX.

They share one API. What differs is said here: how each is installed, on which GPUs it runs, and
that TensorRT for RTX builds without any GPU. The runtimes end the process on a machine without a
driver, so the driver is asked before any of them.
"""

import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

from aliked import gpu
from aliked.errors import InputError, how_to_install

if TYPE_CHECKING:
    import tensorrt as trt

SEVERITIES = ("internal_error", "error", "warning", "info", "verbose")


@dataclass(frozen=True)
class Library:
    """One of the libraries; its module is imported by `load` only."""

    name: str  # as backends, --builder and manifests have it
    title: str  # for sentences
    module: str  # in Python

    def __str__(self) -> str:
        return self.title

    def not_installed(self) -> str | None:
        """Return that the package is missing, or its libraries, and what to install, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed; {how_to_install(self.module)}"
        try:
            self.load()
        except InputError as error:
            return str(error)
        return None

    def cannot_build(self) -> str | None:
        """Return why no file can be parsed and no engine built here, or None."""
        return self.not_installed() if self is RTX else self.unavailable()

    def unavailable(self) -> str | None:
        """Return why no engine can be run here and what to do, or None."""
        if importlib.util.find_spec(self.module) is None:
            return self.not_installed()
        reason = gpu.unavailable() or self.not_installed()
        if reason:
            return reason
        refusals = [self.refuses(device) for device in gpu.devices()]
        return refusals[0] if all(refusals) else None

    def load(self) -> ModuleType:
        """Return the module; `InputError` where the wheel's shared libraries are missing."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: Windows names a missing DLL so
            raise InputError(
                f"the package {self.module} does not load ({error}); {how_to_install(self.module)}"
            ) from error

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return self.load().__version__

    def refuses(self, device: gpu.Device) -> str | None:
        """Return why this version does not run on `device`, where that is known, or None."""
        if self is not RTX:
            return None
        capability = numbers(device.compute_capability)
        where = f"{device.name} (compute capability {device.compute_capability})"
        if capability == HOPPER and numbers(self.version) >= RTX_WITHOUT_HOPPER:
            return (
                f"TensorRT for RTX {self.version} refuses the {where}; version 1.6.1 runs there, "
                'though NVIDIA does not list it: pip install "tensorrt-rtx-cu13==1.6.1.120"'
            )
        if capability < TURING:
            return f"TensorRT for RTX needs compute capability 7.5 or more, not the {where}"
        return None


TENSORRT = Library("tensorrt", "TensorRT", "tensorrt")
LEAN = Library("tensorrt-lean", "TensorRT's lean runtime", "tensorrt_lean")
RTX = Library("tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx")
LIBRARIES = {library.name: library for library in (TENSORRT, LEAN, RTX)}
BUILDERS = ("tensorrt", "tensorrt-rtx")  # the lean runtime builds nothing

# Compute capabilities. Hopper is on none of NVIDIA's lists: that 1.5.0 and 1.6.1 run on an H100
# and 1.7.1 refuses it was tried; nothing else outside the lists was.
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)
RTX_WITHOUT_HOPPER = (1, 7)
RTX_GPUS = {
    "7.5": "every version, engines built with --compute_capability SM75",
    "8.0, 8.6, 8.9, 12.0": "every version",
    "12.1": "1.5 and later",
    "9.0": "1.5.0 and 1.6.1 run, though NVIDIA does not list it; 1.7.1 refuses it",
}
THIS_GPU = "CURRENT"  # TensorRT for RTX's name for the GPU that it builds on
COMPUTE_CAPABILITIES = (THIS_GPU, "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")


TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # "0" forbids TF32 to all of NVIDIA's libraries


def tf32_is_off() -> bool:
    """Return whether the environment forbids TF32, whatever an engine allows."""
    return os.environ.get(TF32_OVERRIDE) == "0"


def settle_tf32(allowed: bool) -> None:
    """Allow or forbid TF32 to TensorRT for RTX, for the rest of this process, by the environment.

    It follows nothing else: with the builder's flag cleared it multiplies float32 in TF32 all the
    same, and it refuses to load an engine that was built under another setting. `InputError` where
    another was settled before: seen on an H100, an engine that was loaded after such a change
    multiplied as before the change.
    """
    if tf32_settled().setdefault("allowed", allowed) != allowed:
        ours, theirs = ("with", "without") if allowed else ("without", "with")
        raise InputError(
            f"this engine is to run {ours} TF32 and an earlier one in this process {theirs} it, "
            "which TensorRT for RTX does not do right; run each in a process of its own"
        )
    os.environ.pop(TF32_OVERRIDE, None)  # any value counts as another setting
    if not allowed:
        os.environ[TF32_OVERRIDE] = "0"


@functools.cache
def tf32_settled() -> dict[str, bool]:
    """Return what `settle_tf32` has settled in this process."""
    return {}


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version or compute capability: (8, 6) of "8.6"."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


@dataclass
class Journal:
    """What the libraries log: errors, for the sentence that ends in them; the rest is printed."""

    errors: list[str] = field(default_factory=list)  # since they were last cleared
    least: str = "warning"  # the least severe level that is printed

    def write(self, library: Library, level: str, message: str) -> None:
        """Take one message of a library's logger."""
        if level in ("internal_error", "error"):
            self.errors.append(message)
        elif SEVERITIES.index(level) <= SEVERITIES.index(self.least):
            print(f"{library} {level}: {message}", file=sys.stderr)

    def last_words(self, library: Library) -> str:
        """Return what went wrong, for the end of a sentence."""
        return "; ".join(self.errors) or f"{library} gave no reason"


@functools.cache
def journal() -> Journal:
    """Return the journal of this process."""
    return Journal()


def logger(library: Library) -> "trt.ILogger":
    """Return the one logger of a library, since it keeps the first that it is given."""
    return _logger(library, library.load())


@functools.cache
def _logger(library: Library, trt: ModuleType) -> "trt.ILogger":
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: "trt.ILogger.Severity", msg: str) -> None:
            journal().write(library, severity.name.lower(), msg)

    return Log()


def register_plugins(library: Library) -> None:
    """Make the standard plugins known, DeformConv's among them; the lean runtime has none."""
    trt = library.load()
    if not hasattr(trt, "init_libnvinfer_plugins"):
        return
    if not trt.init_libnvinfer_plugins(logger(library), ""):
        raise InputError(
            f"the standard plugins of {library} do not load ({journal().last_words(library)}); "
            "install it again"
        )
