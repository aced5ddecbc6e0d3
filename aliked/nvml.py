"""What NVIDIA's management library says of a GPU: memory per process, clocks, driver.

It counts what the driver has given to a process, the CUDA context and libraries included, which
no framework's own allocator knows.
"""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pynvml

from aliked import gpu

MIB = 2**20
SLOWDOWNS = {
    pynvml.nvmlClocksThrottleReasonSwPowerCap: "power limit",
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "heat (hardware)",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "heat (driver)",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}


class Gpu:
    """One GPU, by its CUDA number. What it or this system does not tell is None."""

    def __init__(self, index: int):
        """`pynvml.NVMLError` where the library is missing or knows no such GPU."""
        pynvml.nvmlInit()  # never shut down: the process ends with it
        # NVML numbers GPUs in an order of its own.
        self.handle = pynvml.nvmlDeviceGetHandleByPciBusId(_pci_bus_id(index))

    def facts(self) -> dict:
        """Driver version, power limit in W and highest SM and memory clocks in MHz."""
        power = self._ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": power and power / 1000,
            "max_sm_mhz": self._ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
            "max_memory_mhz": self._ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
        }

    def clocks(self) -> dict:
        """SM and memory clocks in MHz, temperature in degrees C, and what holds the clocks down."""
        reasons = self._ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
        sensor = pynvml.NVML_TEMPERATURE_GPU
        return {
            "sm_mhz": self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_mhz": self._ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            "temperature_c": self._ask(pynvml.nvmlDeviceGetTemperature, sensor),
            "held_down_by": [name for bit, name in SLOWDOWNS.items() if reasons & bit],
        }

    def memory_by_process(self) -> dict[int, int | None]:
        """MiB of every process with a CUDA context, by process id."""
        processes = self._ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or []
        return {p.pid: p.usedGpuMemory and p.usedGpuMemory // MIB for p in processes}

    def memory_in_use(self) -> int | None:
        """MiB in use on the whole GPU."""
        memory = self._ask(pynvml.nvmlDeviceGetMemoryInfo)
        return memory and memory.used // MIB

    def _ask(self, function: Callable, *args: Any) -> Any:
        try:
            return function(self.handle, *args)
        except pynvml.NVMLError:
            return None


class ProcessMemory:
    """GPU memory of this process. Make it before the process has a CUDA context."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.others = set(gpu.memory_by_process())
        self.before = gpu.memory_in_use()

    def read(self) -> tuple[int | None, str]:
        """MiB, and how they were found: "process", or "difference" of the whole GPU's memory.

        Inside a container NVML may know this process by another id: it is the one that came since.
        Where NVML does not tell (Windows, Jetson, some virtual machines), what the whole GPU has
        in use now is compared with before, which is right while nobody else uses it.
        """
        processes = self.gpu.memory_by_process()
        new = [pid for pid in processes if pid not in self.others]
        own = [os.getpid()] if os.getpid() in new else new
        if len(own) == 1 and processes[own[0]] is not None:
            return processes[own[0]], "process"
        now = self.gpu.memory_in_use()
        if now is None or self.before is None:
            return None, "unknown"
        return now - self.before, "difference"


def _pci_bus_id(index: int) -> str:
    """Where the CUDA device `index` is plugged in, such as "0000:01:00.0"."""
    gpu.devices()  # loads the driver, says what is wrong where it cannot
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(32)
    library = gpu.driver()
    gpu.check(library.cuDeviceGet(ctypes.byref(handle), ctypes.c_int(index)), "cuDeviceGet")
    gpu.check(library.cuDeviceGetPCIBusId(name, ctypes.c_int(32), handle), "cuDeviceGetPCIBusId")
    return name.value.decode()
