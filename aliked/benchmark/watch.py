"""Memory and clocks of the device while a row runs."""

import itertools
from collections.abc import Iterable

import pynvml

from aliked import gpu, nvml
from aliked.benchmark.memory import host_peak_mib


def span(values: Iterable[float]) -> list[float] | None:
    """The lowest and the highest; None of none."""
    values = list(values)
    return [min(values), max(values)] if values else None


class Watch:
    """What NVML tells of the row's GPU; on the CPU the host's memory and no clocks.

    Make it before anything has touched the GPU.
    """

    def __init__(self, device: str):
        self.on_cpu = device == "cpu"
        self.samples: list[dict] = []
        self.gpu = self.memory = None
        if self.on_cpu:
            return
        try:
            self.gpu = nvml.Gpu(gpu.device(device)[0])
        except pynvml.NVMLError:
            return  # such as on a Jetson: the record then says "unknown"
        self.memory = nvml.ProcessMemory(self.gpu)

    def look(self) -> None:
        """Note the clocks."""
        if self.gpu:
            self.samples.append(self.gpu.clocks())

    def clocks_seen(self) -> dict | None:
        """Lowest and highest of what was noted, and what held the clocks down at any time."""
        if not self.samples:
            return None
        seen = {}
        for name in ("sm_mhz", "memory_mhz", "temperature_c"):
            seen[name] = span(s[name] for s in self.samples if s[name] is not None)
        reasons = itertools.chain.from_iterable(s["held_down_by"] for s in self.samples)
        return seen | {"held_down_by": sorted(set(reasons))}

    def memory_mib(self) -> tuple[float | None, str]:
        """Memory of this process, MiB, and what was measured."""
        if self.on_cpu:
            return host_peak_mib(), "host peak"
        return self.memory.read() if self.memory else (None, "unknown")
