"""Memory of this process: on the GPU by NVML, in PyTorch's allocator, on the host."""

import sys
from pathlib import Path
from typing import Any

from aliked.nvml import MIB


def host_peak_mib() -> float | None:
    """Largest resident memory of this process so far, MiB; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum starts at that of the process that started this one.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(fields["VmHWM"].split()[0]) / 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return None


class AllocatorPeak:
    """How far PyTorch's CUDA allocator rises above what is allocated now."""

    def __init__(self, device: Any):
        import torch

        self.device, self.cuda = device, torch.cuda
        self.cuda.reset_peak_memory_stats(device)
        self.loaded = self.cuda.memory_allocated(device)

    def above_mib(self) -> float:
        """MiB."""
        return (self.cuda.max_memory_allocated(self.device) - self.loaded) / MIB
