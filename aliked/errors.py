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
    package = module.partition(".")[0]
    if package not in EXTRAS:
        return f"pip install {package}"
    try:
        importlib.metadata.version("aliked")
    except importlib.metadata.PackageNotFoundError:
        return f'pip install -e ".[{EXTRAS[package]}]"'
    return f'pip install "aliked[{EXTRAS[package]}]"'


def missing_package(error: ModuleNotFoundError) -> str:
    """Say in one sentence which package an import did not find, and how to install it."""
    return f"the package {error.name} is not installed; {how_to_install(error.name or '')}"
