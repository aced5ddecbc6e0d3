"""Put the stand-in where the project looks for TensorRT, for the length of a test."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from aliked import gpu
from aliked.backends import cuda_memory
from tests.helpers.fake_tensorrt import RTX_VERSION, HostMemory, Machine, make_tensorrt


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    machine: Machine | None = None,
    rtx: str = RTX_VERSION,
) -> Machine:
    """TensorRT `version` and TensorRT for RTX `rtx` on `machine`, whose memory is PyTorch's."""
    machine = machine or Machine()
    versions = {"tensorrt": version, "tensorrt_lean": version, "tensorrt_rtx": rtx}
    for name, number in versions.items():
        module = make_tensorrt(number, machine, name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gpu, "driver", lambda: machine.driver)
    monkeypatch.setitem(cuda_memory.MEMORIES, "torch", lambda index: HostMemory(machine))
    return machine
