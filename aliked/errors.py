"""The one exception that a script turns into a sentence and exit status 2."""

import importlib.metadata
import reprlib

# Which extra of this package brings a module that not every part of it needs.
EXTRAS = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "pycuda": "pycuda",
    "matplotlib": "evaluate",
    "msgspec": "evaluate",
    "pynvml": "evaluate",
    "h5py": "extract",
    "PIL": "extract",
    "pycolmap": "extract",
    "ray": "ray",
    "tritonclient": "serve",
    "skimage": "train",
    "sklearn": "train",
}
# What every part of it needs, by module: as pip has it.
REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
}


class InputError(ValueError):
    """Bad input from the user: one sentence that names the thing, the reason and the cure."""


def shown(value: object) -> str:
    """A value as a sentence names it: in one line, and not all of a long one."""
    return " ".join(reprlib.repr(value).split())[:80]


def first_line(error: BaseException) -> str:
    """What a library's error says first, in at most 300 characters: some quote a whole file."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (line or type(error).__name__)[:300].rstrip(" .:")


def how_to_install(module: str) -> str:
    """Return the `pip install` that brings `module`, for this package installed or a checkout."""
    package, installed = module.partition(".")[0], own_version() is not None
    if package in EXTRAS:
        extra = EXTRAS[package]
        return f'pip install "aliked[{extra}]"' if installed else f'pip install -e ".[{extra}]"'
    if package in REQUIRED and not installed:
        return "pip install -e ."  # more of them may be missing
    return f"pip install {REQUIRED.get(package, package)}"


def own_version() -> str | None:
    """The version of this package; None in a checkout that is not installed."""
    try:
        return importlib.metadata.version("aliked")
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_package(error: ModuleNotFoundError) -> str:
    """Say in one sentence which package an import did not find, and how to install it."""
    return f"the package {error.name} is not installed; {how_to_install(error.name or '')}"
