"""What is installed here, which backends can run, and what the others lack.

usage: python -m aliked.doctor
"""

from aliked import gpu
from aliked.backends import BACKENDS, load_backend
from aliked.versions import installed_versions

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
    return {name: reason_against(name) or "available" for name in BACKENDS}


def custom_operators() -> dict[str, str]:
    """Every operator that can be compiled: which form of it is in use."""
    try:
        from aliked import patches  # here, because the doctor also runs without PyTorch
    except ModuleNotFoundError as error:
        return {"get_patches": missing(error)}
    return {"get_patches": patches.form_in_use()}


def missing(error: ModuleNotFoundError) -> str:
    """What is not installed, and how to install it."""
    return f"the package {error.name} is not installed; pip install {error.name}"


def reason_against(name: str) -> str | None:
    """Why backend `name` cannot run here, or None."""
    try:
        module = load_backend(name)
    except ModuleNotFoundError as error:
        return missing(error)
    return module.unavailable()


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
