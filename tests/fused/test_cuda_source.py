"""Compiled kernels are kept between processes, without a GPU."""

import pytest
import torch

from aliked.fused import cuda_source


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> list[str]:
    """The sources that have been compiled: their text in capitals, which loads."""
    sources: list[str] = []

    def compile_(source: str, name: str) -> tuple[bytes, str]:
        sources.append(source)
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
    return sources


def test_a_kernel_is_compiled_once_for_every_source_and_gpu(compiled, monkeypatch):
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
        assert cuda_source._kernel("other", "kernel") == "kernel of OTHER"
    assert compiled == ["source", "other"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    cuda_source._kernel("source", "kernel")
    assert compiled == ["source", "other", "source"]


def test_a_damaged_file_is_compiled_anew(compiled, tmp_path):
    cuda_source._kernel("source", "kernel")
    (kept,) = (tmp_path / "cache/aliked/kernels").iterdir()
    kept.write_bytes(b"half of a file")
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
    assert compiled == ["source"] * 2


def test_without_a_cache_it_is_compiled_every_time(compiled, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        assert cuda_source._kernel("source", "kernel") == "kernel of SOURCE"
    assert compiled == ["source"] * 2
