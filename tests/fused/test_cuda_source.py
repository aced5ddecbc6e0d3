"""Every CUDA source compiles for old and new GPUs, as NVRTC would on first use, and once.

No GPU needed.
"""

import functools

import pytest
import torch
from torch.cuda import _utils as cuda_utils

from aliked.configs import Selection
from aliked.fused import cuda_source, kernels, pipeline, weights
from tests.helpers.fused_models import random_images, random_model

TURING, HOPPER = "75", "90"  # compute capability; Turing takes other branches than the rest


@functools.cache
def compile_for(capability, file, kernel, constants):
    source = (cuda_source.FOLDER / cuda_source.HEADER).read_text()
    source += cuda_source.text(file, constants)
    ptx, _ = cuda_utils._nvrtc_compile(source, kernel, capability)
    assert ptx


@pytest.mark.parametrize("capability", [TURING, HOPPER])
@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n16", "aliked-n32"])
def test_every_kernel_of_a_model_compiles(monkeypatch, name, capability):
    try:
        cuda_utils._get_nvrtc_library()
    except OSError:
        pytest.skip("this PyTorch comes without NVRTC")
    used = set()

    def compiled(file, kernel, constants, device):
        compile_for(capability, file, kernel, constants)
        used.add(kernel)
        return lambda *launch: None

    monkeypatch.setattr(cuda_source, "compiled", compiled)
    selection = Selection(100, 0.2, 0)
    packed = weights.pack(random_model(name, selection), torch.float16, torch.device("cpu"))
    with torch.inference_mode():
        pipeline.extract(random_images(1, 64, 96), packed, selection, kernels)
    assert len(used) > 5


@pytest.fixture
def sources(tmp_path, monkeypatch) -> list[str]:
    """The sources that have been compiled: their text in capitals, which loads."""
    compiled: list[str] = []

    def compile_(source: str, name: str) -> tuple[bytes, str]:
        compiled.append(source)
        return source.upper().encode(), name

    def load(binary: bytes, names: list[str]) -> dict[str, str]:
        text = binary.decode()
        if not text.isupper():
            raise RuntimeError("CUDA error: device kernel image is invalid")
        return {name: f"{name} of {text}" for name in names}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_source, "_nvrtc_compile", compile_)
    monkeypatch.setattr(cuda_source, "_cuda_load_module", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return compiled


def test_a_kernel_is_compiled_once_for_every_source_and_gpu(sources, monkeypatch):
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
        assert cuda_source._kernel("other", "kernel") == "kernel of OTHER"
    assert sources == ["source", "other"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    cuda_source._kernel("source", "kernel")
    assert sources == ["source", "other", "source"]


def test_a_damaged_file_is_compiled_anew(sources, tmp_path):
    cuda_source._kernel("source", "kernel")
    (kept,) = (tmp_path / "cache/aliked/kernels").iterdir()
    kept.write_bytes(b"half of a file")
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
    assert sources == ["source"] * 2


def test_without_a_cache_it_is_compiled_every_time(sources, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
    assert sources == ["source"] * 2
