"""What the fused kernels are launched with, for the smallest and the largest images."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from aliked.configs import Selection
from aliked.fused import cuda_source, kernels, pipeline, weights
from tests.helpers.fused_models import random_model

MAX_INT = 2**31 - 1
MAX_GRID = (MAX_INT, 65535, 65535)  # on every CUDA device
MAX_THREADS = 1024


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 32, 32), (64, 3072, 4096)])
@pytest.mark.parametrize("top_k", [1000, 20000])
@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n32"])
def test_grids_and_arguments_are_within_the_limits_of_cuda(monkeypatch, name, top_k, shape):
    launches = []

    def compiled(file, kernel, constants, device):
        return lambda grid, block, arguments: launches.append((kernel, grid, block, arguments))

    monkeypatch.setattr(cuda_source, "compiled", compiled)
    selection = Selection(top_k, 0.2, 0)
    device = torch.device("meta")
    packed = weights.pack(random_model(name, selection), torch.float16, device)
    images = torch.empty(*shape, 3, dtype=torch.uint8, device=device)
    # The functions behind the operators: on a device without data these are only asked for shapes.
    ops = SimpleNamespace(**{op: getattr(kernels, op).__wrapped__ for op in kernels.__all__})
    output = pipeline.extract(images, packed, selection, ops)
    assert output.descriptors.shape[:2] == output.keypoints.shape[:2]
    assert len(launches) == 12
    for kernel, grid, block, arguments in launches:
        assert all(0 < g <= most for g, most in zip(grid, MAX_GRID, strict=True)), kernel
        assert block[0] * block[1] * block[2] <= MAX_THREADS, kernel
        assert all(a <= MAX_INT for a in arguments if isinstance(a, int)), kernel
        for tensor in (a for a in arguments if isinstance(a, torch.Tensor)):
            # Kernels count in 32 bits inside one image, in 64 from image to image.
            assert tensor[:1].numel() <= MAX_INT, kernel


@pytest.mark.parametrize("file", sorted(cuda_source.FOLDER.glob("*.cu")), ids=lambda f: f.name)
def test_every_kernel_waits_for_the_one_before_it(file):
    source = file.read_text()
    assert source.count("__global__") == source.count("await_previous_kernel();") > 0


def test_an_early_launch_passes_the_driver_what_it_was_given(monkeypatch):
    seen = {}

    def launch(configuration, function, addresses, extra):
        launch = configuration._obj
        seen["sizes"] = [*launch.grid, *launch.block, launch.stream, launch.attribute_count]
        seen["attribute"] = (launch.attributes[0].id, launch.attributes[0].value)
        seen["integer"] = ctypes.cast(addresses[1], ctypes.POINTER(ctypes.c_int))[0]
        seen["pointer"] = ctypes.cast(addresses[0], ctypes.POINTER(ctypes.c_void_p))[0]
        return 0

    driver = SimpleNamespace(cuLaunchKernelEx=launch)
    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    tensor = torch.zeros(3)
    cuda_source.launch_early(ctypes.c_void_p(1), (4, 5, 6), (32, 2, 1), [tensor, -9])
    assert seen["sizes"] == [4, 5, 6, 32, 2, 1, 7, 1]
    assert seen["attribute"] == (6, 1)  # programmatic stream serialization, allowed
    assert (seen["pointer"], seen["integer"]) == (tensor.data_ptr(), -9)
    # As in cuda.h on 64-bit systems.
    assert ctypes.sizeof(cuda_source.Attribute) == 72
    assert ctypes.sizeof(cuda_source.Launch) == 56
