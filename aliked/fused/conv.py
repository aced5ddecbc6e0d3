"""3x3 convolutions of the first two blocks and of the score head, with what follows them."""

import torch
import triton
import triton.language as tl

from aliked.fused.common import add_product, load_matrix, operator, padded, product, selu, tile_for


@triton.jit
def tile_pixels(tile, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POOL: tl.constexpr):
    """Rows and columns of a tile's pixels, each POOL x POOL block in consecutive places."""
    m = tl.arange(0, ROWS * COLUMNS)
    inner, block = m % (POOL * POOL), m // (POOL * POOL)
    blocks_across: tl.constexpr = COLUMNS // POOL
    tiles_across = width // COLUMNS
    y = tile // tiles_across * ROWS + block // blocks_across * POOL + inner // POOL
    x = tile % tiles_across * COLUMNS + block % blocks_across * POOL + inner % POOL
    return y, x


@triton.jit
def convolve(
    x_map, weight, bias, y, x, height, width, n,
    CI: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """3x3 convolution of a channels-last map at the pixels (y, x), with bias; float32.

    TAPS of the nine taps (1, 3 or 9) go into one product: more suit fewer channels.
    """
    K: tl.constexpr = TAPS * CI
    k = tl.arange(0, max(16, triton.next_power_of_2(K)))
    acc = tl.zeros([y.shape[0], n.shape[0]], tl.float32)
    for step in tl.range(0, 9 // TAPS, num_stages=STAGES):
        tap = step * TAPS + k // CI
        row, column = tap // 3 - 1, tap % 3 - 1
        at_y, at_x = y[:, None] + row[None, :], x[:, None] + column[None, :]
        inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width) & (k < K)[None, :]
        offsets = ((y * width + x) * CI)[:, None] + ((row * width + column) * CI + k % CI)[None, :]
        a = tl.load(x_map + offsets, mask=inside, other=0)
        acc = add_product(a, load_matrix(weight + step * K * CO, K, CO, k, n), acc)
    return acc + tl.load(bias + n, mask=n < CO, other=0)[None, :]


@triton.jit
def _conv3x3(
    x_map, weight, bias, out, height, width,
    CI: tl.constexpr, CO: tl.constexpr, COP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    y, x = tile_pixels(tl.program_id(0), width, ROWS, COLUMNS, 1)
    n = tl.arange(0, COP)
    x_map += b * height * width * CI
    acc = convolve(x_map, weight, bias, y, x, height, width, n, CI, CO, TAPS, STAGES)
    offsets = (y * width + x)[:, None] * CO + n[None, :]
    out += b * height * width * CO
    tl.store(out + offsets, selu(acc).to(out.dtype.element_ty), mask=(n < CO)[None, :])


@triton.jit
def emit_level(
    values, level_matrix, score_matrix, pixel, valid, kept, score,
    C: tl.constexpr, CP: tl.constexpr, QUARTER: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """Store a block's output, or its projection, and its share of the score head's first layer.

    values: [M, CP] float32 at the pixels `pixel`; only those that are `valid` are stored.
    """
    dtype = kept.dtype.element_ty
    c, q, s = tl.arange(0, CP), tl.arange(0, QUARTER), tl.arange(0, 16)
    level = selu(product(values.to(dtype), level_matrix)).to(dtype)
    share = product(level, score_matrix)
    if PROJECT:
        tl.store(kept + pixel[:, None] * QUARTER + q[None, :], level, mask=valid[:, None])
    else:
        offsets = pixel[:, None] * C + c[None, :]
        tl.store(kept + offsets, values.to(dtype), mask=valid[:, None] & (c < C)[None, :])
    offsets = pixel[:, None] * 8 + s[None, :]
    tl.store(score + offsets, share.to(dtype), mask=valid[:, None] & (s < 8)[None, :])


@triton.jit
def emit_pooled(
    values, block, valid, pooled, C: tl.constexpr, CP: tl.constexpr, POOL: tl.constexpr
):
    """Store the mean of every POOL * POOL consecutive rows of `values` at its place `block`."""
    area: tl.constexpr = POOL * POOL
    c = tl.arange(0, CP)
    means = tl.sum(tl.reshape(values, [values.shape[0] // area, area, CP]), axis=1) / area
    offsets = block[:, None] * C + c[None, :]
    means = means.to(pooled.dtype.element_ty)
    tl.store(pooled + offsets, means, mask=valid[:, None] & (c < C)[None, :])


@triton.jit
def _conv3x3_level(
    x_map, weight, bias, shortcut, shortcut_weight, level_weight, score_weight,
    kept, pooled, score, height, width,
    CI: tl.constexpr, CO: tl.constexpr, COP: tl.constexpr,
    CS: tl.constexpr, CSP: tl.constexpr, QUARTER: tl.constexpr, POOL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    y, x = tile_pixels(tl.program_id(0), width, ROWS, COLUMNS, POOL)
    n, q, c = tl.arange(0, COP), tl.arange(0, QUARTER), tl.arange(0, CSP)
    # Asked for before the convolution, so that they are there when it is done.
    level_matrix = load_matrix(level_weight, CO, QUARTER, n, q)
    score_matrix = load_matrix(score_weight, QUARTER, 8, q, tl.arange(0, 16))
    size = b * height * width
    acc = convolve(x_map + size * CI, weight, bias, y, x, height, width, n, CI, CO, TAPS, STAGES)
    pixel = y * width + x
    if CS > 0:
        offsets = pixel[:, None] * CS + c[None, :]
        below = tl.load(shortcut + size * CS + offsets, mask=(c < CS)[None, :], other=0)
        acc += product(below, load_matrix(shortcut_weight, CS, CO, c, n))
    values = selu(acc)
    valid = pixel >= 0
    kept_channels: tl.constexpr = QUARTER if CS > 0 else CO
    emit_level(
        values, level_matrix, score_matrix, pixel, valid, kept + size * kept_channels,
        score + size * 8, CO, COP, QUARTER, CS > 0,
    )  # fmt: skip
    y, x = tile_pixels(tl.program_id(0), width // POOL, ROWS // POOL, COLUMNS // POOL, 1)
    block = y * (width // POOL) + x
    emit_pooled(values, block, block >= 0, pooled + size // (POOL * POOL) * CO, CO, COP, POOL)


def _allocate(x, weight, bias):
    return x.new_empty((*x.shape[:3], weight.shape[1]))


def _grid(x: torch.Tensor, tile: dict) -> tuple[int, int]:
    batch, height, width = x.shape[:3]
    return height // tile["ROWS"] * (width // tile["COLUMNS"]), batch


@operator(_allocate)
def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SELU of a 3x3 convolution: [B, H, W, CI] to [B, H, W, CO], H and W multiples of 16.

    weight: [9 * CI, CO] (row, column, channel); bias: [CO], float32.
    """
    out = _allocate(x, weight, bias)
    tile = tile_for("conv3x3", x)
    height, width, channels = x.shape[1:]
    _conv3x3[_grid(x, tile)](
        x, weight, bias, out, height, width,
        CI=channels, CO=out.shape[3], COP=padded(out.shape[3]), **tile,
    )  # fmt: skip
    return out


def _allocate_level(x, weight, bias, shortcut, shortcut_weight, level_weight, score_weight, pool):
    batch, height, width = x.shape[:3]
    kept = weight.shape[1] if shortcut is None else level_weight.shape[1]
    return (
        x.new_empty((batch, height, width, kept)),
        x.new_empty((batch, height // pool, width // pool, weight.shape[1])),
        x.new_empty((batch, height, width, 8)),
    )


@operator(_allocate_level)
def conv3x3_level(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    shortcut: torch.Tensor | None, shortcut_weight: torch.Tensor | None,
    level_weight: torch.Tensor, score_weight: torch.Tensor, pool: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The end of a convolutional block and everything that reads its output at the same pixel.

    values = SELU(conv3x3(x) + bias + shortcut @ shortcut_weight), [B, H, W, CO]
    level  = SELU(values @ level_weight), [B, H, W, D / 4]

    Returns `level`, or `values` where there is no shortcut (the first block: its projection is
    cheaper to repeat where it is needed than to store); the mean of `values` over `pool` x `pool`
    pixels; and level @ score_weight, [B, H, W, 8]. H and W are multiples of 16.
    """
    outputs = _allocate_level(
        x, weight, bias, shortcut, shortcut_weight, level_weight, score_weight, pool
    )
    tile = tile_for("conv3x3_level", x)
    height, width, channels = x.shape[1:]
    below = 0 if shortcut is None else shortcut.shape[3]
    _conv3x3_level[_grid(x, tile)](
        x, weight, bias, shortcut, shortcut_weight, level_weight, score_weight, *outputs,
        height, width, CI=channels, CO=weight.shape[1], COP=padded(weight.shape[1]),
        CS=below, CSP=padded(below), QUARTER=level_weight.shape[1], POOL=pool, **tile,
    )  # fmt: skip
    return outputs
