"""Which versions of which packages are installed."""

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from aliked import gpu
from aliked.backends import BACKENDS


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of `packages`, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


PACKAGES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-lean",
    "pycuda",
    "nvidia-ml-py",
    "opencv-python-headless",
    "numpy",
    "aliked-custom-ops",
)


def packages() -> dict[str, str]:
    """Version of Python and of every package that a part of the project can use."""
    versions = installed_versions(PACKAGES)
    return {name: found or "not installed" for name, found in versions.items()}


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


def custom_operators() -> dict[str, str]:
    """Every operator that can be compiled: which form of it is in use."""
    try:
        from aliked import patches  # here, because the doctor also runs without PyTorch
    except ModuleNotFoundError as error:
        return {"get_patches": f"needs the package {error.name}; pip install {error.name}"}
    return {"get_patches": patches.form_in_use()}


def main() -> None:
    """Print all of it."""
    sections = {
        "Installed": packages(),
        "Devices": graphics_cards(),
        "Backends": backends(),
        "Operators": custom_operators(),
    }
    for title, rows in sections.items():
        print(f"{title}:")
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"  {name.ljust(width)}  {text}")


if __name__ == "__main__":
    main()
