"""The score head at full resolution: shares of the four levels added up, then the last layer.

The head's first 1x1 convolution commutes with bilinear upsampling, since both are linear: each
level's share of it (8 channels) is upsampled instead of the level itself.
"""

import torch
import triton
import triton.language as tl

from aliked.fused.common import operator, selu, tile_for, upsampling_scale


@triton.jit
def upsampled(level, y, x, height, width, scale_y, scale_x, c, C: tl.constexpr):
    """Rows [M, C] of a level at pixels (y, x) of the full map, corners aligned; float32."""
    source_y, source_x = y.to(tl.float32) * scale_y, x.to(tl.float32) * scale_x
    top, left = source_y.to(tl.int32), source_x.to(tl.int32)
    below, right = (source_y - top)[:, None], (source_x - left)[:, None]
    top, left = top * width, left  # row offsets
    bottom = tl.minimum(top + width, (height - 1) * width)
    beside = tl.minimum(left + 1, width - 1)
    c = c[None, :]
    v00 = tl.load(level + (top + left)[:, None] * C + c).to(tl.float32)
    v01 = tl.load(level + (top + beside)[:, None] * C + c).to(tl.float32)
    v10 = tl.load(level + (bottom + left)[:, None] * C + c).to(tl.float32)
    v11 = tl.load(level + (bottom + beside)[:, None] * C + c).to(tl.float32)
    upper, lower = v00 + right * (v01 - v00), v10 + right * (v11 - v10)
    return upper + below * (lower - upper)


@triton.jit
def _blend(
    s1, s2, s3, s4, out, height, width,
    height2, width2, scale_y2, scale_x2, height3, width3, scale_y3, scale_x3,
    height4, width4, scale_y4, scale_x4, M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    valid = (pixel < height * width)[:, None]
    at = tl.minimum(pixel, height * width - 1)
    y, x = at // width, at % width
    c = tl.arange(0, 8)
    offsets = pixel[:, None] * 8 + c[None, :]
    full = b * height * width * 8
    acc = tl.load(s1 + full + offsets, mask=valid, other=0).to(tl.float32)
    s2 += b * height2 * width2 * 8
    s3 += b * height3 * width3 * 8
    s4 += b * height4 * width4 * 8
    acc += upsampled(s2, y, x, height2, width2, scale_y2, scale_x2, c, 8)
    acc += upsampled(s3, y, x, height3, width3, scale_y3, scale_x3, c, 8)
    acc += upsampled(s4, y, x, height4, width4, scale_y4, scale_x4, c, 8)
    tl.store(out + full + offsets, selu(acc).to(out.dtype.element_ty), mask=valid)


def level_geometry(full: torch.Tensor, *levels: torch.Tensor) -> list:
    """Height, width and upsampling scales of each level, for a kernel's arguments."""
    height, width = full.shape[1:3]
    return [
        value
        for level in levels
        for value in (
            *level.shape[1:3],
            upsampling_scale(level.shape[1], height),
            upsampling_scale(level.shape[2], width),
        )
    ]


def _allocate_blend(s1, s2, s3, s4):
    return torch.empty_like(s1)


@operator(_allocate_blend)
def blend(s1: torch.Tensor, s2: torch.Tensor, s3: torch.Tensor, s4: torch.Tensor) -> torch.Tensor:
    """SELU of the sum of all shares at full resolution, [B, H, W, 8]; s2..s4 are upsampled."""
    out = _allocate_blend(s1, s2, s3, s4)
    batch, height, width = s1.shape[:3]
    tile = tile_for("blend", s1)
    grid = (triton.cdiv(height * width, tile["M"]), batch)
    _blend[grid](s1, s2, s3, s4, out, height, width, *level_geometry(s1, s2, s3, s4), **tile)
    return out


@triton.jit
def _score_map(
    x_map, weight, out, padded_height, padded_width, top, left, height, width, M: tl.constexpr
):
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    valid = pixel < height * width
    y, x = pixel // width + top, pixel % width + left
    c = tl.arange(0, 4)
    x_map += b * padded_height * padded_width * 4
    acc = tl.zeros([M, 4], tl.float32)
    for tap in tl.static_range(9):
        row, column = y + (tap // 3 - 1), x + (tap % 3 - 1)
        inside = (row >= 0) & (row < padded_height) & (column >= 0) & (column < padded_width)
        offsets = (row * padded_width + column)[:, None] * 4 + c[None, :]
        values = tl.load(x_map + offsets, mask=inside[:, None] & valid[:, None], other=0)
        taps = tl.load(weight + tap * 4 + c).to(tl.float32)
        acc += values.to(tl.float32) * taps[None, :]
    scores = tl.sigmoid(tl.sum(acc, axis=1))
    tl.store(out + b * height * width + pixel, scores, mask=valid)


def _allocate_score_map(x, weight, top, left, height, width):
    return x.new_empty((x.shape[0], height, width), dtype=torch.float32)


@operator(_allocate_score_map)
def score_map(
    x: torch.Tensor, weight: torch.Tensor, top: int, left: int, height: int, width: int
) -> torch.Tensor:
    """The last 3x3 convolution, 4 channels to 1, and the sigmoid, on the image without padding.

    x: [B, H, W, 4]; weight: [36, 1]; returns float32 [B, height, width] in [0, 1], from row `top`
    and column `left` on.
    """
    out = _allocate_score_map(x, weight, top, left, height, width)
    tile = tile_for("score_map", x)
    grid = (triton.cdiv(height * width, tile["M"]), x.shape[0])
    _score_map[grid](x, weight, out, *x.shape[1:3], top, left, height, width, **tile)
    return out
