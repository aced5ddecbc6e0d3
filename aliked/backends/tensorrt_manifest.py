"""The manifest beside an engine: what it was built from, how, and for which machine."""

import json
from dataclasses import dataclass
from pathlib import Path

from aliked import gpu
from aliked.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """What TensorRT's builder is told."""

    optimization_level: int = 3  # 0 takes the first kernel that works, 5 compares all
    max_workspace_size_mib: int | None = None  # None: no limit
    timing_cache: Path | None = None
    shapes: tuple[Shape, Shape, Shape] | None = None  # min, opt, max of a dynamic input
    weak_fp16: bool = False  # TensorRT 10 chooses where to use FP16 in a network in FP32
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = True
    max_aux_streams: int | None = None  # None: TensorRT's choice
    detailed: bool = False  # keep what the inspector shows
    log_level: str = "warning"


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies."""
    return engine.with_name(engine.name + ".json")


def read_manifest(engine: Path) -> dict:
    """The manifest of an engine; `InputError` where it is missing or not readable."""
    path = manifest_path(engine)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing, and without it nobody knows for which GPU and TensorRT version "
            f"{engine.name} is; copy it there, or build the engine with convert_onnx_to_trt.py"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); build the engine again") from error


def mismatch(manifest: dict, version: str, device: gpu.Device, lean: bool) -> str | None:
    """Why an engine with this manifest cannot run on this TensorRT version and GPU, or None."""
    built, built_gpu = manifest["tensorrt"], manifest["gpu"]
    portable = manifest["version_compatible"]
    if lean and not portable:
        return "the lean runtime runs only engines built with --version_compatible"
    if built != version and not portable:
        return f"it was built by TensorRT {built} and this is {version}"
    if portable and not _reads(version, built):
        return (
            f"it was built by TensorRT {built}, and this older or much newer {version} does not "
            "read it"
        )
    capability = built_gpu["compute_capability"]
    if manifest["hardware_compatible"]:
        if _numbers(device.compute_capability) >= (8, 0):
            return None
        return (
            f"it needs compute capability 8.0, this {device.name} has {device.compute_capability}"
        )
    if (built_gpu["name"], capability) != (device.name, device.compute_capability):
        return (
            f"it was built on a {built_gpu['name']} ({capability}) and this is a {device.name} "
            f"({device.compute_capability})"
        )
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _reads(runtime: str, built: str) -> bool:
    """Version-compatible engines run on newer runtimes, at most one major version up."""
    ours, theirs = _numbers(runtime), _numbers(built)
    return ours >= theirs and ours[0] - theirs[0] <= 1
