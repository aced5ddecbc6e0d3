"""The compiled `get_patches` for tests, and inputs that reach every corner of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from aliked import patches

LAYOUTS = {
    "contiguous": lambda maps: maps,
    "channels_last": lambda maps: maps.to(memory_format=torch.channels_last),
    "transposed": lambda maps: maps.transpose(2, 3),
    "cropped": lambda maps: maps[:, 1:, 2:-1, 1::2],
    "expanded": lambda maps: maps[:, :1].expand(-1, 5, -1, -1),
}


def build(folder):
    """The compiled operator: the installed one, or one compiled into `folder`."""
    if not (shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")):
        pytest.skip("no C++ compiler and ninja to compile get_patches")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        environment.setenv("ALIKED_CUSTOM_OPS", "build")
        return patches.compiled.__wrapped__()  # past the cache, which the other tests use


@contextlib.contextmanager
def without_operator() -> Iterator[None]:
    """`get_patches` takes the plain form until the end of the block."""
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(patches, "compiled", lambda: None)
        yield


def random_maps(dtype, device="cpu", shape=(2, 6, 9, 11)):
    return (torch.randn(shape, device=device) * 50).to(dtype)


def random_centres(maps, count=40):
    """In and around maps [B, C, H, W]: some windows lie outside as a whole."""
    return torch.randint(-8, 20, (len(maps), count, 2), device=maps.device)
