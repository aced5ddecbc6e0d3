"""A stand-in for the part of PyCUDA that the project uses, on a make-believe machine."""

from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

from tests.helpers.fake_tensorrt.machine import HostBuffer, Machine


class CudaMemoryError(Exception):
    """`pycuda.driver.MemoryError`, which is not Python's."""


class GPUArray(HostBuffer):
    """`pycuda.gpuarray.GPUArray`: `gpudata` is its address."""

    def __init__(self, machine: Machine, shape, dtype) -> None:
        try:
            super().__init__(machine, shape, dtype)
        except MemoryError as error:
            raise CudaMemoryError(str(error)) from error
        self.gpudata = self.address
        self.flags = SimpleNamespace(c_contiguous=True)


class Stream:
    """`pycuda.driver.Stream`."""

    def __init__(self, machine: Machine) -> None:
        assert machine.current, "no context is current"
        self.machine, self.handle = machine, 500 + len(machine.streams)
        machine.streams[self.handle] = []

    def synchronize(self) -> None:
        self.machine.synchronize(self.handle)


class Context:
    """A device's primary context."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def push(self) -> None:
        self.machine.current += 1

    def pop(self) -> None:
        assert self.machine.current, "the context stack is empty"
        self.machine.current -= 1


def make_pycuda(machine: Machine) -> dict[str, ModuleType]:
    """The modules `pycuda`, `pycuda.driver` and `pycuda.gpuarray` by name."""
    modules = {name: ModuleType(name) for name in ("pycuda", "pycuda.driver", "pycuda.gpuarray")}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    package, driver, gpuarray = modules.values()
    package.driver, package.gpuarray = driver, gpuarray

    driver.init = lambda: None
    driver.Device = lambda index: SimpleNamespace(retain_primary_context=lambda: Context(machine))
    driver.Stream = lambda: Stream(machine)
    driver.MemoryError = CudaMemoryError
    driver.pagelocked_empty = machine.pinned
    gpuarray.GPUArray = GPUArray
    gpuarray.empty = lambda shape, dtype: GPUArray(machine, shape, dtype)
    return modules
