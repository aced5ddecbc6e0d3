"""What a number depends on besides the code: hardware, versions, settings, the code's commit."""

import contextlib
import ctypes
import gc
import hashlib
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch

from aliked import gpu
from aliked.backends import get_backend
from aliked.doctor import PACKAGES, installed_versions
from aliked.features import Extractor
from aliked.transfer import choose_device
from benchmark.timing import Progress

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
        """Return what every process with a CUDA context holds, MiB by process id."""
        processes = self._ask(pynvml.nvmlDeviceGetComputeRunningProcesses) or []
        return {p.pid: p.usedGpuMemory and p.usedGpuMemory // MIB for p in processes}

    def memory_in_use(self) -> int | None:
        """Return what is in use on the whole GPU, MiB."""
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
        """Return MiB, and how they were found: "process", or "difference" of the GPU's memory.

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


ROOT = Path(__file__).resolve().parents[1]
CODE = ("aliked", "benchmark", "custom_ops", "evaluation", "*.py")  # what decides a number


def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part; CUDA and cuDNN as PyTorch has."""
    found = installed_versions((*PACKAGES, "torch-tensorrt", "triton"))
    installed = {name: version for name, version in found.items() if version}
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return installed | {"cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)}


def machine(device: str) -> dict:
    """The processor, and the GPU where `device` is one."""
    facts = {
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device != "cpu":
        index, found = gpu.device(device)
        facts |= {
            "gpu": found.name,
            "gpu_memory_mib": found.memory // 2**20,
            "compute_capability": found.compute_capability,
            **_driver_facts(index),
        }
    return facts


def _driver_facts(index: int) -> dict:
    try:
        return Gpu(index).facts()
    except pynvml.NVMLError as error:  # such as on a Jetson
        return {"driver": None, "nvml": str(error)}


def cpu_name() -> str:
    """The processor as its maker calls it, or else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Describe:
    """Say what this machine is: its hardware and versions, and which backends cannot run on it.

    `device` may be "auto", and is then the one that this means here.
    """

    device: str
    backends: tuple[str, ...]

    def run(self, progress: Progress) -> dict:
        """Return it by the names of `Run`'s fields."""
        device = str(choose_device(self.device))
        return {
            "device": device,
            "machine": machine(device),
            "versions": versions(),
            "unavailable": {name: unavailable(name, device) for name in self.backends},
        }


def unavailable(backend: str, device: str) -> str | None:
    """Return why a backend cannot run where `device` is the device, or None."""
    only_gpus = "cpu" not in get_backend(backend).devices
    if device == "cpu" and only_gpus and torch.cuda.is_available():
        return "it runs on a GPU only, and the device is the CPU; pass --device cuda"
    return get_backend(backend).unavailable()


def switches() -> dict[str, bool]:
    """Return PyTorch's switches that decide what "float32" and "fast" mean, as they are now."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "tf32": cudnn.allow_tf32 or matmul.allow_tf32,
        "gradients": torch.is_grad_enabled(),
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
    }


@contextlib.contextmanager
def observed(extractor: Extractor) -> Iterator[dict[str, bool]]:
    """Yield `switches` as they are inside of the runs of this block; none but PyTorch's has any."""
    inside: dict[str, bool] = {}
    forward = getattr(extractor, "forward", None)
    if forward is None:
        yield inside
        return

    def noting(*batch: Any) -> Any:
        inside.update(switches())
        return forward(*batch)

    extractor.forward = noting
    try:
        yield inside
    finally:
        extractor.forward = forward


def tf32_of(extractor: Extractor) -> bool | None:
    """Return whether a runtime other than PyTorch may round to TF32; None if it does not say."""
    if manifest := getattr(extractor, "manifest", None):  # of an engine
        return manifest["tf32"]
    session = getattr(extractor, "session", None)
    if not hasattr(session, "get_provider_options"):
        return None
    options = session.get_provider_options()
    if any("tensorrt" in name.lower() for name in options):
        return None
    return any(own.get("use_tf32", "0") == "1" for own in options.values())


def git_commit(root: Path = ROOT) -> str | None:
    """Return the project's commit, with "+dirty." and a hash of the difference where it has one.

    Where the code was copied without its history: `$ALIKED_COMMIT`, or None.
    """

    def git(*args: str) -> bytes:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD", "--binary", "--", *CODE)
        new = git("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE).split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALIKED_COMMIT")
    digest = hashlib.sha256(changes)
    for name in filter(None, new):
        digest.update(name + b"\0" + (root / os.fsdecode(name)).read_bytes())
    return commit + (f"+dirty.{digest.hexdigest()[:12]}" if changes or any(new) else "")


def host_peak_mib() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum starts at that of the process that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in fields:  # not every sandbox of containers has it
            return int(fields["VmHWM"].split()[0]) / 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return None


class AllocatorPeak:
    """How far PyTorch's CUDA allocator rises above what is allocated now."""

    def __init__(self, device: Any):
        self.device, self.cuda = device, torch.cuda
        self.cuda.reset_peak_memory_stats(device)
        self.loaded = self.cuda.memory_allocated(device)

    def above_mib(self) -> float:
        """Return how far it has risen since, MiB."""
        return (self.cuda.max_memory_allocated(self.device) - self.loaded) / MIB


def span(values: Iterable[float]) -> list[float] | None:
    """The lowest and the highest; None of none."""
    values = list(values)
    return [min(values), max(values)] if values else None


class Monitor:
    """What NVML says of the row's GPU; on the CPU the host's memory and no clocks.

    Make it before anything has touched the GPU.
    """

    def __init__(self, device: str):
        self.on_cpu = device == "cpu"
        self.samples: list[dict] = []
        self.collects_garbage = False
        self.gpu = self.memory = None
        if self.on_cpu:
            return
        try:
            self.gpu = Gpu(gpu.device(device)[0])
        except pynvml.NVMLError:
            return  # such as on a Jetson: the record then says "unknown"
        self.memory = ProcessMemory(self.gpu)

    def note(self) -> None:
        """Note the clocks, and whether Python collects garbage, as they are now."""
        self.collects_garbage |= gc.isenabled()
        if self.gpu:
            self.samples.append(self.gpu.clocks())

    def clocks_seen(self) -> dict | None:
        """Return the lowest and highest noted, and what held the clocks down at any time."""
        if not self.samples:
            return None
        seen = {}
        for name in ("sm_mhz", "memory_mhz", "temperature_c"):
            seen[name] = span(s[name] for s in self.samples if s[name] is not None)
        reasons = itertools.chain.from_iterable(s["held_down_by"] for s in self.samples)
        return seen | {"held_down_by": sorted(set(reasons))}

    def memory_mib(self) -> tuple[float | None, str]:
        """Return the memory of this process, MiB, and what was measured."""
        if self.on_cpu:
            return host_peak_mib(), "host peak"
        return self.memory.read() if self.memory else (None, "unknown")
