"""Put the stand-in where the project looks for TensorRT, for the length of a test."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from aliked import gpu
from aliked.backends import cuda_memory, tensorrt
from tests.helpers.fake_tensorrt import HostMemory, Machine, make_tensorrt


def install(
    monkeypatch: pytest.MonkeyPatch, version: str, machine: Machine | None = None
) -> Machine:
    """Both packages of TensorRT `version` on `machine`, whose memory takes PyTorch's name."""
    machine = machine or Machine()
    for lean in (False, True):
        module = make_tensorrt(version, machine, lean)
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    tensorrt.logger.cache_clear()
    tensorrt.journal.cache_clear()
    monkeypatch.setattr(gpu, "driver", lambda: machine.driver)
    monkeypatch.setitem(cuda_memory.MEMORIES, "torch", lambda index: HostMemory(machine))
    return machine
