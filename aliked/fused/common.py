"""What the kernels share: the activation, products in the chosen precision, sizes of tiles."""

import struct

import torch
import triton
import triton.language as tl

# tl.arange needs powers of two, and the matrix units at least 16 of each.
MIN_SIDE = 16


@triton.jit
def selu(x):
    """SELU in float32. The exponential of a large x is infinite, and not selected."""
    return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * (tl.exp(x) - 1))


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
    """The power of two, at least `MIN_SIDE`, that holds so many channels."""
    return max(MIN_SIDE, triton.next_power_of_2(channels))


def upsampling_scale(size: int, full_size: int) -> float:
    """Source pixels per pixel of a map of `full_size`, with aligned corners."""
    return (size - 1) / (full_size - 1)


def check_same_device(*tensors: torch.Tensor) -> torch.device:
    """The one device of all tensors; a kernel would read another device's memory as its own."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors are on several devices: {sorted(map(str, devices))}")
    return devices.pop()


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
