"""Tile sizes and warps of the Triton kernels, which run in float32 only.

Defaults, and what was found faster on this very GPU.

Found settings live in one JSON file per GPU model and Triton version, in the user's cache folder
or `$ALIKED_CACHE_DIR`: {"<kernel> <type> <map shape> <channels>": {"ROWS": 8, ...}}.
"""

import functools
import json
import os
import re
from pathlib import Path

import torch
import triton

# By kernel, then by the channels that go in: the entry of the largest number that is not above
# them. Most were chosen in half precision on an H200, when that still was Triton.
DEFAULTS = {
    "stem": {0: {"ROWS": 4, "COLUMNS": 32, "num_warps": 4}},
    "conv3x3": {
        0: {"ROWS": 4, "COLUMNS": 16, "TAPS": 3, "STAGES": 1, "num_warps": 2},
        8: {"ROWS": 8, "COLUMNS": 16, "TAPS": 3, "STAGES": 1, "num_warps": 4},
        16: {"ROWS": 8, "COLUMNS": 16, "TAPS": 1, "STAGES": 3, "num_warps": 4},
    },
    "conv3x3_level": {
        0: {"ROWS": 8, "COLUMNS": 8, "TAPS": 3, "STAGES": 1, "num_warps": 2},
        16: {"ROWS": 8, "COLUMNS": 16, "TAPS": 1, "STAGES": 3, "num_warps": 4},
        # Two warps: in half precision Triton 3.6 gave wrong results on Hopper with four.
        32: {"ROWS": 8, "COLUMNS": 8, "TAPS": 1, "STAGES": 1, "num_warps": 2},
    },
    "deform": {0: {"M": 16, "N": 32, "TAPS": 1, "R": 64, "K": 16, "STAGES": 3, "num_warps": 4}},
    "deform_level": {0: {"M": 16, "TAPS": 1, "R": 64, "K": 16, "STAGES": 1, "num_warps": 8}},
    "blend": {0: {"M": 128, "num_warps": 2}},
    "score_map": {0: {"M": 512, "num_warps": 4}},
    "sample_offsets": {0: {"M": 8, "R": 128, "K": 64, "STAGES": 3, "num_warps": 8}},
    "sample_features": {0: {"M": 16, "num_warps": 4}},
    "aggregate": {0: {"M": 16, "K": 64, "STAGES": 3, "num_warps": 4}},
}
# Numbers of four bytes on the arithmetic units: smaller products.
FLOAT32 = {
    "sample_offsets": {"R": 32, "K": 32},
}


def describe(kernel: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    """The key of a launch in the file of settings; the batch size does not matter."""
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{kernel} {dtype} {'x'.join(map(str, x.shape[1:]))} {weight.shape[-1]}"


def defaults(kernel: str, x: torch.Tensor) -> dict:
    """Settings that are right everywhere and good on most GPUs."""
    by_channels = DEFAULTS[kernel]
    tile = by_channels[max(channels for channels in by_channels if channels <= x.shape[-1])]
    return tile | (FLOAT32.get(kernel, {}) if x.dtype == torch.float32 else {})


def settings_file(device: torch.device) -> Path:
    """Where the settings of this GPU model and Triton version are kept."""
    folder = os.environ.get("ALIKED_CACHE_DIR") or Path.home() / ".cache" / "aliked"
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(folder) / f"fused-{gpu}-triton-{triton.__version__}.json"


@functools.cache
def found(device: torch.device) -> dict[str, dict]:
    """The settings found for this device; none on a CPU, where kernels are only interpreted."""
    if device.type != "cuda" or not settings_file(device).is_file():
        return {}
    return json.loads(settings_file(device).read_text())


def choose(kernel: str, x: torch.Tensor, weight: torch.Tensor) -> dict:
    """The settings for one launch of `kernel` on map `x` with `weight`."""
    return found(x.device).get(describe(kernel, x, weight)) or defaults(kernel, x)
