"""Windows around keypoints, by PyTorch or by a compiled operator."""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from aliked.errors import InputError


def is_traced() -> bool:
    """Whether `torch.compile`, `torch.export` or `torch.jit.trace` is looking on."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


PACKAGE = "aliked_custom_ops"  # what `pip install ./custom_ops` installs
VARIABLE = "ALIKED_CUSTOM_OPS"  # unset, "build" or "off"


def get_patches(maps: torch.Tensor, centres: torch.Tensor, size: int) -> torch.Tensor:
    """`plain_patches`, by the compiled operator where it is built for the device of `maps`.

    Whatever traces the model sees the plain form: compilers fuse it, ONNX knows its operators, and
    what they write then runs where nothing is installed.
    """
    if is_traced():
        return plain_patches(maps, centres, size)
    operator = compiled()
    if operator is None or maps.device.type not in operator.DEVICES:
        return plain_patches(maps, centres, size)
    return operator.get_patches(maps, centres, size)


def plain_patches(maps: torch.Tensor, centres: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a `size` x `size` window around every centre out of its map.

    maps: [B, C, H, W]; centres: [B, N, 2] integers, pixels, (x, y). A window of even size has
    one pixel more to the right and below. Returns [B, N, C, size, size] of the type of `maps`,
    zero wherever the window leaves the map (ALIKED, arXiv 2304.03608, section IV-B).
    """
    channels, height, width = maps.shape[1:]
    steps = torch.arange(size, device=maps.device) - (size - 1) // 2
    x = (centres[:, :, None, 0] + steps)[:, :, None, :]  # [B, N, 1, size]
    y = (centres[:, :, None, 1] + steps)[:, :, :, None]  # [B, N, size, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # [B, N, size, size]
    # Clamping into the map and zeroing afterwards avoids a padded copy of the whole map.
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    index = index.flatten(1)[:, None].expand(-1, channels, -1)  # [B, C, N * size * size]
    values = maps.flatten(2).gather(2, index).unflatten(2, (-1, size, size))
    return (values * inside[:, None]).transpose(1, 2)


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled operator: a module with `get_patches` and `DEVICES`, or None.

    The installed one is taken without being asked for. With ALIKED_CUSTOM_OPS=build one is
    compiled where none is installed, with ALIKED_CUSTOM_OPS=off there is none. Raises `InputError`
    where what is installed cannot be loaded, or what was asked for cannot be compiled.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "build", "off"):
        raise InputError(f"{VARIABLE} is {wish!r}; set it to build or off, or leave it unset")
    if wish == "off":
        return None
    if importlib.util.find_spec(PACKAGE):
        return _installed()
    return _built() if wish == "build" else None


def _installed() -> ModuleType:
    try:
        return importlib.import_module(PACKAGE)
    except (ImportError, OSError) as error:
        raise InputError(
            f"the installed {PACKAGE} cannot be loaded ({error}); install it again with "
            f"pip install --force-reinstall --no-deps ./custom_ops, or set {VARIABLE}=off"
        ) from error


def _built() -> ModuleType:
    from custom_ops.get_patches import toolchain  # here, as it loads setuptools

    try:
        return toolchain.build()
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            "get_patches cannot be compiled here; python -m custom_ops.get_patches.toolchain "
            f"says why (it needs g++ and ninja), or leave {VARIABLE} unset"
        ) from error


def form_in_use() -> str:
    """Which form `get_patches` takes on this machine, and what decides, for people."""
    try:
        operator = compiled()
    except InputError as error:
        return str(error)
    if operator:
        devices = " and ".join(device.upper() for device in operator.DEVICES)
        return f"compiled for {devices} ({operator.__name__})"
    if os.environ.get(VARIABLE) == "off":
        return f"plain PyTorch, as {VARIABLE} is off"
    return "plain PyTorch; pip install ./custom_ops compiles it"
