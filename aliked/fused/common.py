"""What the kernels share: the activation, products in the chosen precision, sizes of tiles."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from aliked.fused.fragments import SELU_ALPHA, SELU_SCALE

# tl.arange needs powers of two, and the matrix units at least 16 of each.
MIN_SIDE = 16
# Tile sizes and warps by kernel, then by the channels that go in: the entry of the largest number
# that is not above them. Chosen by trial on an H200.
TILES = {
    "stem": {0: {"ROWS": 4, "COLUMNS": 32, "num_warps": 4}},
    "conv3x3": {
        0: {"ROWS": 4, "COLUMNS": 16, "TAPS": 3, "STAGES": 1, "num_warps": 2},
        8: {"ROWS": 8, "COLUMNS": 16, "TAPS": 3, "STAGES": 1, "num_warps": 4},
        16: {"ROWS": 8, "COLUMNS": 16, "TAPS": 1, "STAGES": 3, "num_warps": 4},
    },
    "conv3x3_level": {
        0: {"ROWS": 8, "COLUMNS": 8, "TAPS": 3, "STAGES": 1, "num_warps": 2},
        16: {"ROWS": 8, "COLUMNS": 16, "TAPS": 1, "STAGES": 3, "num_warps": 4},
        32: {"ROWS": 8, "COLUMNS": 8, "TAPS": 1, "STAGES": 1, "num_warps": 2},
    },
    "deform": {0: {"M": 16, "N": 32, "TAPS": 1, "R": 64, "K": 16, "STAGES": 3, "num_warps": 4}},
    "deform_level": {0: {"M": 16, "TAPS": 1, "R": 64, "K": 16, "STAGES": 1, "num_warps": 8}},
    "blend": {0: {"M": 128, "num_warps": 2}},
    "score_map": {0: {"M": 512, "num_warps": 4}},
    "sample_offsets": {0: {"M": 8, "R": 32, "K": 32, "STAGES": 3, "num_warps": 8}},
    "sample_features": {0: {"M": 16, "num_warps": 4}},
    "aggregate": {0: {"M": 16, "K": 64, "STAGES": 3, "num_warps": 4}},
}


@triton.jit
def selu(x, scale: tl.constexpr = SELU_SCALE, alpha: tl.constexpr = SELU_ALPHA):
    """SELU in float32. The exponential of a large x is infinite, and not selected."""
    return scale * tl.where(x > 0, x, alpha * (tl.exp(x) - 1))


@triton.jit
def add_product(a, b, acc):
    """acc + a @ b: half precision on the matrix units, or float32 as it is (no TF32)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(a, b):
    """a @ b in float32."""
    return add_product(a, b, tl.zeros([a.shape[0], b.shape[1]], tl.float32))


@triton.jit
def load_matrix(matrix, rows, columns, row, column):
    """Elements (row, column) of a row-major [rows, columns] matrix, zero outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0)


def padded(channels: int) -> int:
    """The power of two, at least `MIN_SIDE`, that holds this many channels."""
    return max(MIN_SIDE, triton.next_power_of_2(channels))


def upsampling_scale(size: int, full_size: int) -> float:
    """Source pixels per pixel of a map of `full_size`, with aligned corners."""
    return (size - 1) / (full_size - 1)


def tile_for(kernel: str, x: torch.Tensor) -> dict[str, int]:
    """Return the tile sizes and warps of `kernel` for a map or matrix `x` [..., channels]."""
    by_channels = TILES[kernel]
    return by_channels[max(channels for channels in by_channels if channels <= x.shape[-1])]


def operator(allocate: Callable, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Make a function an operator of PyTorch; `allocate` has its arguments and makes what it fills.

    `torch.library.custom_op` does so too, but its first call imports the compiler, which takes
    seconds of every process.
    """

    def register(function: Callable) -> Callable:
        name = f"aliked::{function.__name__}"
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", function)
        torch.library.register_fake(name, allocate)
        overload = getattr(torch.ops.aliked, function.__name__).default
        return functools.wraps(function)(lambda *args, **kwargs: overload(*args, **kwargs))

    return register
