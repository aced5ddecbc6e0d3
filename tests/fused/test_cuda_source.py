"""Every CUDA source compiles for old and new GPUs, as NVRTC would on first use; no GPU needed."""

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
