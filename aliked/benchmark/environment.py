"""What a number depends on besides the code: hardware, versions, settings, the code's commit."""

import os
import platform
import subprocess
from pathlib import Path

import pynvml

from aliked import gpu
from aliked.doctor import PACKAGES
from aliked.nvml import Gpu
from aliked.versions import installed_versions

ROOT = Path(__file__).resolve().parents[2]
CODE = ("aliked", "custom_ops", "measure_timings.py")  # what decides a number


def versions() -> dict[str, str]:
    """Versions of Python and of every package that takes part; CUDA and cuDNN as PyTorch has."""
    import torch

    found = installed_versions((*PACKAGES, "torch-tensorrt", "triton"))
    installed = {name: version for name, version in found.items() if version}
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return installed | {"cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)}


def machine(device: str) -> dict:
    """The processor, and the GPU where `device` is one."""
    import torch

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


def settings() -> dict:
    """The switches that decide what "float32" and "fast" mean, as they are during the runs."""
    import torch

    from aliked.patches import form_in_use

    cudnn = torch.backends.cudnn
    return {
        "tf32": False,  # every backend switches it off
        "gradients": False,
        "garbage_collector": "off in timed runs",
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "get_patches": form_in_use(),
    }


def git_commit() -> str | None:
    """The project's commit, with "+changes" where the code differs from it.

    Where the code was copied without its history: `$ALIKED_COMMIT`, or None.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "-uno", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALIKED_COMMIT")
