"""The first convolution, straight from the image: conversion, padding, 3 channels in, SELU."""

import torch
import triton
import triton.language as tl

from aliked.fused.common import load_matrix, operator, padded, product, selu, tile_for


@triton.jit
def _stem(
    image, weight, bias, out, height, width, padded_height, padded_width, top, left,
    CO: tl.constexpr, COP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    across = padded_width // COLUMNS
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = tile // across * ROWS + tl.arange(0, ROWS)
    columns = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, 32)  # 27 values under the kernel: row, column, colour
    y, x = rows[:, None] + k[None, :] // 9 - 1, columns[:, None] + k[None, :] // 3 % 3 - 1
    # Outside the padded frame is zero; between the frame and the image, the image's border.
    inside_y = (y >= 0) & (y < padded_height)
    inside_x = (x >= 0) & (x < padded_width) & (k[None, :] < 27)
    y = tl.minimum(tl.maximum(y - top, 0), height - 1)
    x = tl.minimum(tl.maximum(x - left, 0), width - 1)
    offsets = (y * (width * 3))[:, None, :] + (x * 3 + k[None, :] % 3)[None, :, :]
    inside = inside_y[:, None, :] & inside_x[None, :, :]
    values = tl.load(image + b * height * width * 3 + offsets, mask=inside, other=0)
    dtype = out.dtype.element_ty
    values = tl.reshape(values.to(dtype), [ROWS * COLUMNS, 32])

    n = tl.arange(0, COP)
    acc = product(values, load_matrix(weight, 27, CO, k, n))
    # Levels 0..255 are exact in half precision; dividing after the product keeps them so.
    acc = selu(acc / 255 + tl.load(bias + n, mask=n < CO, other=0)[None, :])
    pixels = rows[:, None] * padded_width + columns[None, :]
    pixels = tl.reshape(pixels, [ROWS * COLUMNS])
    out += b * padded_height * padded_width * CO
    tl.store(out + pixels[:, None] * CO + n[None, :], acc.to(dtype), mask=(n < CO)[None, :])


def _allocate(images, weight, bias, height, width, top, left):
    return weight.new_empty((images.shape[0], height, width, weight.shape[1]))


@operator(_allocate)
def stem(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    height: int, width: int, top: int, left: int,
) -> torch.Tensor:  # fmt: skip
    """uint8 [B, h, w, 3] in a frame of [height, width], border replicated, to [B, H, W, CO].

    weight: [27, CO] (row, column, colour); bias: [CO], float32. The image starts at row `top`
    and column `left` of the frame, whose sides are multiples of 32.
    """
    out = _allocate(images, weight, bias, height, width, top, left)
    tile = tile_for("stem", out)
    grid = (height // tile["ROWS"] * (width // tile["COLUMNS"]), images.shape[0])
    channels = weight.shape[1]
    _stem[grid](
        images, weight, bias, out, *images.shape[1:3], height, width, top, left,
        CO=channels, COP=padded(channels), **tile,
    )  # fmt: skip
    return out
