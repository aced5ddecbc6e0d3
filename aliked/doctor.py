"""What is installed, and what runs on this machine: versions, devices, backends, operators."""

import argparse
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from aliked import cli, gpu
from aliked.backends import BACKENDS
from aliked.backends.tensorrt_library import RTX, RTX_GPUS
from aliked.errors import missing_package


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of `packages`, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# Each installs the same module, cv2; one of them is enough.
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
PACKAGES = (
    "aliked",
    "aliked-custom-ops",
    "torch",
    "torchvision",
    "numpy",
    *OPENCV,
    "simplejpeg",
    "nvidia-nvimgcodec-cu13",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-lean",
    "tensorrt-rtx-cu12",
    "tensorrt-rtx-cu13",
    "torch-tensorrt",
    "torch-tensorrt-rtx",
    "onnxruntime-ep-nv-tensorrt-rtx-cu12",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "pycuda",
    "nvidia-ml-py",
)


def packages() -> dict[str, str]:
    """Version of Python and of every package that a part of the project can use."""
    versions = installed_versions(PACKAGES)
    others = {name for name in OPENCV if any(map(versions.get, OPENCV)) and not versions[name]}
    return {
        name: found or "not installed" for name, found in versions.items() if name not in others
    }


def graphics_cards() -> dict[str, str]:
    """Every CUDA device by index, or why there is none."""
    reason = gpu.unavailable()
    if reason:
        return {"CUDA": reason}
    return {
        f"cuda:{index}": f"{device.name}, compute capability {device.compute_capability}, "
        f"{device.memory / 2**30:.1f} GiB"
        for index, device in enumerate(gpu.devices())
    }


def backends() -> dict[str, str]:
    """Every backend: "available", or why not and what to install."""
    return {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()}


def tensorrt_for_rtx() -> dict[str, str]:
    """Return which version of TensorRT for RTX runs on which GPU, and what is so here."""
    rows = {f"compute capability {gpus}": text for gpus, text in RTX_GPUS.items()}
    here = RTX.not_installed()
    if here or gpu.unavailable():
        return rows | {"here": here or f"version {RTX.version} builds, but runs nothing: no GPU"}
    for index, device in enumerate(gpu.devices()):
        rows[f"cuda:{index}"] = RTX.refuses(device) or f"version {RTX.version} may run"
    return rows


def custom_operators() -> dict[str, str]:
    """Every operator that can be compiled: which form of it is in use."""
    try:
        from aliked import patches  # here, because the doctor also runs without PyTorch
    except ModuleNotFoundError as error:
        return {"get_patches": missing_package(error)}
    return {"get_patches": patches.form_in_use(), **native_deform_conv()}


def native_deform_conv() -> dict[str, str]:
    """Whether ONNX Runtime runs files exported with `--deform_conv native`; others need nothing."""
    try:
        from aliked.backends.onnxruntime import deform_conv_missing

        return {"DeformConv": deform_conv_missing() or "available in ONNX Runtime"}
    except ModuleNotFoundError as error:
        return {"DeformConv": missing_package(error)}


def parser() -> argparse.ArgumentParser:
    """The command line: no options."""
    return cli.Parser(prog="python -m aliked.doctor", description=__doc__)


def main(args: argparse.Namespace | None = None) -> None:
    """Print all of it, on a terminal within its width."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    sections = {
        "Installed": packages(),
        "Devices": graphics_cards(),
        "Backends": backends(),
        "TensorRT for RTX": tensorrt_for_rtx(),
        "Operators": custom_operators(),
    }
    for title, rows in sections.items():
        print(f"{title}:")
        width = max(map(len, rows))
        for name, text in rows.items():
            print(row(f"  {name.ljust(width)}  ", text, columns))


def row(head: str, text: str, columns: int) -> str:
    """One line, or several of at most `columns` characters (0: no limit) with `text` indented."""
    if columns < len(head) + 20:
        return head + text
    return textwrap.fill(
        text,
        columns,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
    )


if __name__ == "__main__":
    cli.run(main, parser())
