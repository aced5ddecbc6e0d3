"""Deformable 3x3 convolutions: offsets, sampling and product in one kernel (arXiv 1703.06211).

Half precision is CUDA C++ (`deform.cu`), float32 is Triton.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aliked.fused import cuda_source, launches
from aliked.fused.common import add_product, load_matrix, operator, product, selu, tile_for
from aliked.fused.conv import convolve, emit_level, emit_pooled


@triton.jit
def block_pixel(m, width, POOL: tl.constexpr):
    """Row and column of place m, where whole POOL x POOL blocks follow each other row by row."""
    inner, block = m % (POOL * POOL), m // (POOL * POOL)
    across = width // POOL
    return block // across * POOL + inner // POOL, block % across * POOL + inner % POOL


@triton.jit
def sample(x_map, y, x, used, height, width, c, C: tl.constexpr):
    """Bilinear samples [R, C] of a channels-last map at float (y, x) [R]; float32.

    Zero outside the map and where not `used`.
    """
    y0, x0 = tl.floor(y), tl.floor(x)
    below, right = y - y0, x - x0
    y0, x0 = y0.to(tl.int32), x0.to(tl.int32)
    acc = tl.zeros([y.shape[0], C], tl.float32)
    for corner in tl.static_range(4):
        row, column = y0 + corner // 2, x0 + corner % 2
        share = (below if corner // 2 else 1 - below) * (right if corner % 2 else 1 - right)
        inside = used & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offsets = ((row * width + column) * C)[:, None] + c[None, :]
        values = tl.load(x_map + offsets, mask=inside[:, None], other=0)
        acc += share[:, None] * values.to(tl.float32)
    return acc


@triton.jit
def deformed(
    x_map, offset_weight, offset_bias, weight, bias, offsets, samples, first, height, width,
    limit, n, CI: tl.constexpr, CO: tl.constexpr, POOL: tl.constexpr, M: tl.constexpr,
    TAPS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Deformable convolution of the M pixels from place `first` on, with bias; float32 [M, CO].

    `offsets` [M, 32] and `samples` [M, 9 * CI] are this program's own memory. Going through it
    and a barrier lets every stage lay its work out over the threads as it suits: one row per
    pixel, then one per pixel and tap, then tiles of the product.
    """
    m, j, c = tl.arange(0, M), tl.arange(0, 32), tl.arange(0, CI)
    y, x = block_pixel(first + m, width, POOL)
    # 18 offsets: (dy, dx) of each tap in turn
    wanted = convolve(
        x_map, offset_weight, offset_bias, y, x, height, width, j, CI, 18, TAPS, STAGES
    )
    wanted = tl.minimum(tl.maximum(wanted, -limit), limit)
    tl.store(offsets + m[:, None] * 32 + j[None, :], wanted)
    tl.debug_barrier()

    for start in range(0, 9 * M, R):
        r = start + tl.arange(0, R)
        used, tap = r < 9 * M, r % 9
        row, column = block_pixel(first + r // 9, width, POOL)
        offset = offsets + r // 9 * 32 + 2 * tap
        at_y = (row + tap // 3 - 1).to(tl.float32) + tl.load(offset, mask=used, other=0)
        at_x = (column + tap % 3 - 1).to(tl.float32) + tl.load(offset + 1, mask=used, other=0)
        sampled = sample(x_map, at_y, at_x, used, height, width, c, CI)
        sampled = sampled.to(samples.dtype.element_ty)
        tl.store(samples + r[:, None] * CI + c[None, :], sampled, mask=used[:, None])
    tl.debug_barrier()

    acc = tl.zeros([M, n.shape[0]], tl.float32)
    for start in tl.range(0, 9 * CI, K, num_stages=STAGES):
        k = start + tl.arange(0, K)
        values = load_matrix(samples, M, 9 * CI, m, k)
        acc = add_product(values, load_matrix(weight, 9 * CI, CO, k, n), acc)
    return acc + tl.load(bias + n, mask=n < CO, other=0)[None, :]


@triton.jit
def _deform(
    x_map, offset_weight, offset_bias, weight, bias, offsets, samples, out, height, width, limit,
    CI: tl.constexpr, CO: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    TAPS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    program = (b * tl.num_programs(2) + tl.program_id(2)) * tl.num_programs(0) + tl.program_id(0)
    first = tl.program_id(0) * M
    n = tl.program_id(2) * N + tl.arange(0, N)
    acc = deformed(
        x_map + b * height * width * CI, offset_weight, offset_bias, weight, bias,
        offsets + program * M * 32, samples + program * M * 9 * CI, first, height, width,
        limit, n, CI, CO, 1, M, TAPS, R, K, STAGES,
    )  # fmt: skip
    pixel = first + tl.arange(0, M)
    out += b * height * width * CO
    mask = (pixel < height * width)[:, None] & (n < CO)[None, :]
    values = selu(acc).to(out.dtype.element_ty)
    tl.store(out + pixel[:, None] * CO + n[None, :], values, mask=mask)


@triton.jit
def _deform_level(
    x_map, offset_weight, offset_bias, weight, bias, shortcut, shortcut_weight,
    level_weight, score_weight, offsets, samples, kept, pooled, score, height, width, limit,
    CI: tl.constexpr, CO: tl.constexpr, CS: tl.constexpr, QUARTER: tl.constexpr,
    POOL: tl.constexpr, M: tl.constexpr,
    TAPS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    program = b * tl.num_programs(0) + tl.program_id(0)
    first = tl.program_id(0) * M
    size = b * height * width
    n, q, c = tl.arange(0, CO), tl.arange(0, QUARTER), tl.arange(0, CS)
    # Asked for before the convolution, so that they are there when it is done.
    level_matrix = load_matrix(level_weight, CO, QUARTER, n, q)
    score_matrix = load_matrix(score_weight, QUARTER, 8, q, tl.arange(0, 16))
    acc = deformed(
        x_map + size * CI, offset_weight, offset_bias, weight, bias,
        offsets + program * M * 32, samples + program * M * 9 * CI, first, height, width,
        limit, n, CI, CO, POOL, M, TAPS, R, K, STAGES,
    )  # fmt: skip
    y, x = block_pixel(first + tl.arange(0, M), width, POOL)
    pixel, valid = y * width + x, y < height
    below = shortcut + size * CS + pixel[:, None] * CS + c[None, :]
    below = tl.load(below, mask=valid[:, None], other=0)
    values = selu(acc + product(below, load_matrix(shortcut_weight, CS, CO, c, n)))
    emit_level(
        values, level_matrix, score_matrix, pixel, valid, kept + size * QUARTER,
        score + size * 8, CO, CO, QUARTER, True,
    )  # fmt: skip
    if POOL > 1:
        area: tl.constexpr = POOL * POOL
        block = first // area + tl.arange(0, M // area)
        exists = block < height * width // area
        emit_pooled(values, block, exists, pooled + size // area * CO, CO, CO, POOL)


def _scratch(x: torch.Tensor, programs: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every program's own memory: offsets in float32, samples in the type of the map."""
    offsets = x.new_empty((programs, pixels, 32), dtype=torch.float32)
    return offsets, x.new_empty((programs, pixels, 9 * x.shape[3]))


def _limit(x: torch.Tensor) -> float:
    """Offsets are at most a quarter of the map's longer side, as in the trained model."""
    return max(x.shape[1:3]) / 4


class Tile(NamedTuple):
    """How `deform.cu` shares its work out; see there."""

    PIXELS: int  # of a block, or of the blocks of a cluster
    BLOCKS: int  # of a cluster, which share the channels that go in
    COLUMNS: int  # channels of a block that come out
    TILES: int  # 16 of these each, of a warp
    WARPS: int
    RESIDENT: int  # blocks that a multiprocessor should hold
    EARLY: int  # 1: weights of the product are asked for before all else
    AHEAD: int  # steps of the product whose weights a warp has asked for
    OFFSET_AHEAD: int  # the same of the offset convolution
    AT_ONCE: int  # samples whose corners a thread has asked for


SOURCE = "deform.cu"
CLUSTERS_FROM = (9, 0)  # compute capability


def has_clusters(device: torch.device) -> bool:
    """Whether blocks of this GPU can read each other's shared memory."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CLUSTERS_FROM


def choose_tile(x: torch.Tensor, wide: int, level: bool, pool: int, clusters: bool) -> Tile:
    """The row of the table for this layer and size of map.

    Small maps get many blocks; a level needs all `wide` channels, its means 16 pixels.
    """
    batch, height, width, channels = x.shape
    enough = launches.value("enough", batch=batch, height=height, width=width)
    kind = 0 if enough else 2 if clusters and pool <= 1 else 1
    shapes = {"CI": channels, "CO": wide, "LEVEL": int(level), "POOL": pool}
    row = dict(launches.build("deform", KIND=kind, **shapes))
    return Tile(*(row[field] for field in Tile._fields))


def constants(x, wide: int, tile: Tile, shortcut=None, quarter: int = 0, pool: int = 0) -> tuple:
    """The definitions before `deform.cu`."""
    shapes = {"CI": x.shape[3], "CO": wide, "LEVEL": int(shortcut is not None), "POOL": pool}
    shapes |= {"CS": 0 if shortcut is None else shortcut.shape[3], "QUARTER": quarter}
    return (*shapes.items(), *tile._asdict().items())


def grid(x: torch.Tensor, wide: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks: along a row (and the channels of each tile), rows, images."""
    batch, height, width = x.shape[:3]
    names = (*tile._asdict().items(), ("CO", wide))
    return launches.grid("deform", names, batch=batch, height=height, width=width)


def _run(x, wide: int, tile: Tile, definitions: tuple, arguments: list) -> None:
    """Launch `deform.cu` on map `x`."""
    run = cuda_source.compiled(SOURCE, "deform", definitions, x.device)
    run(grid(x, wide, tile), (32 * tile.WARPS, 1, 1), [*arguments, *x.shape[1:3]])


def _allocate(x, offset_weight, offset_bias, weight, bias, fragments):
    return x.new_empty((*x.shape[:3], weight.shape[1]))


@operator(_allocate)
def deform(
    x: torch.Tensor, offset_weight: torch.Tensor, offset_bias: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, fragments: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """SELU of a deformable 3x3 convolution without mask: [B, H, W, CI] to [B, H, W, CO].

    offset_weight: [9 * CI, 18], weight: [9 * CI, CO] (row, column, channel); biases float32. CI and
    CO are powers of two, at least 16. fragments: the weights again, from `fragments.deform`.
    """
    out = _allocate(x, offset_weight, offset_bias, weight, bias, fragments)
    batch, height, width, channels = x.shape
    wide = out.shape[3]
    if x.dtype == torch.float16:
        tile = choose_tile(x, wide, False, 0, has_clusters(x.device))
        arguments = [x, fragments, offset_bias, bias, out]
        _run(x, wide, tile, constants(x, wide, tile), arguments)
        return out
    tile = tile_for("deform", x)
    grid = (triton.cdiv(height * width, tile["M"]), batch, triton.cdiv(wide, tile["N"]))
    _deform[grid](
        x, offset_weight, offset_bias, weight, bias, *_scratch(x, math.prod(grid), tile["M"]),
        out, height, width, _limit(x), CI=channels, CO=wide, **tile,
    )  # fmt: skip
    return out


def _allocate_level(
    x, offset_weight, offset_bias, weight, bias, fragments,
    shortcut, shortcut_weight, level_weight, score_weight, pool,
):  # fmt: skip
    batch, height, width = x.shape[:3]
    pooled = (height // pool, width // pool) if pool > 1 else (0, 0)
    return (
        x.new_empty((batch, height, width, level_weight.shape[1])),
        x.new_empty((batch, *pooled, weight.shape[1])),
        x.new_empty((batch, height, width, 8)),
    )


@operator(_allocate_level)
def deform_level(
    x: torch.Tensor, offset_weight: torch.Tensor, offset_bias: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, fragments: torch.Tensor,
    shortcut: torch.Tensor, shortcut_weight: torch.Tensor,
    level_weight: torch.Tensor, score_weight: torch.Tensor, pool: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The end of a deformable block and everything that reads its output at the same pixel.

    As `conv3x3_level`: returns the level [B, H, W, D / 4], the means over `pool` x `pool` pixels
    (empty where `pool` is 1) and the share of the score head [B, H, W, 8]. H and W are multiples
    of `pool`, which is 1 or 4.
    """
    outputs = _allocate_level(
        x, offset_weight, offset_bias, weight, bias, fragments,
        shortcut, shortcut_weight, level_weight, score_weight, pool,
    )  # fmt: skip
    kept, pooled, score = outputs
    batch, height, width, channels = x.shape
    wide, quarter = level_weight.shape
    if x.dtype == torch.float16:
        tile = choose_tile(x, wide, True, pool, has_clusters(x.device))
        arguments = [x, fragments, offset_bias, bias, kept, shortcut, score_weight, pooled, score]
        _run(x, wide, tile, constants(x, wide, tile, shortcut, quarter, pool), arguments)
        return outputs
    tile = tile_for("deform_level", x)
    grid = (triton.cdiv(height * width, tile["M"]), batch)
    _deform_level[grid](
        x, offset_weight, offset_bias, weight, bias, shortcut, shortcut_weight,
        level_weight, score_weight, *_scratch(x, math.prod(grid), tile["M"]), *outputs,
        height, width, _limit(x), CI=channels, CO=wide, CS=shortcut.shape[3],
        QUARTER=quarter, POOL=pool, **tile,
    )  # fmt: skip
    return outputs
