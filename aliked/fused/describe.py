"""Descriptors (SDDH, arXiv 2304.03608, section III-B) from only the pixels that they read.

The aggregated feature of a pixel, unit length over all four levels, is evaluated where it is
needed: 9 pixels around each keypoint and 4 around each sample position. The full-resolution map of
all channels never exists. A pixel's four quarters (one per level) stay apart from each other until
a matrix product adds them up. Half precision is CUDA C++ (`describe.cu`), float32 is Triton.
"""

import torch
import triton
import triton.language as tl

from aliked.fused import cuda_source, launches
from aliked.fused.common import add_product, load_matrix, operator, padded, product, selu, tile_for
from aliked.fused.cuda_source import float_bits
from aliked.fused.score_map import level_geometry, upsampled

SOURCE = "describe.cu"
KEYPOINTS = launches.number("KEYPOINTS")  # that a block samples
SHARE = launches.number("SHARE")  # sample positions of each of them


def constants(x1: torch.Tensor, f2: torch.Tensor, positions: int) -> tuple:
    """The definitions before `describe.cu`."""
    shapes = {"C1": x1.shape[3], "QUARTER": f2.shape[3], "POSITIONS": positions}
    return launches.build("describe", **shapes)


def map_arguments(x1: torch.Tensor, *levels: torch.Tensor) -> list:
    """The maps as arguments of the kernels of `describe.cu`, which take no floats."""
    geometry = level_geometry(x1, *levels)
    geometry = [float_bits(g) if isinstance(g, float) else g for g in geometry]
    return [x1, *levels, *x1.shape[1:3], *geometry]


@triton.jit
def pixel_features(
    x1, x1_weight, f2, f3, f4, y, x, inside, padded_height, padded_width,
    height2, width2, scale_y2, scale_x2, height3, width3, scale_y3, scale_x3,
    height4, width4, scale_y4, scale_x4,
    C1: tl.constexpr, C1P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The features of M pixels (y, x) of the padded frame: four [M, Q], and 1 / length [M].

    The reciprocal length is zero for pixels that are not `inside` the image.
    """
    y = tl.minimum(tl.maximum(y, 0), padded_height - 1)
    x = tl.minimum(tl.maximum(x, 0), padded_width - 1)
    c, q = tl.arange(0, C1P), tl.arange(0, Q)
    offsets = (y * padded_width + x)[:, None] * C1 + c[None, :]
    values = tl.load(x1 + offsets, mask=inside[:, None] & (c < C1)[None, :], other=0)
    q1 = selu(product(values, load_matrix(x1_weight, C1, Q, c, q)))
    q2 = upsampled(f2, y, x, height2, width2, scale_y2, scale_x2, q, Q)
    q3 = upsampled(f3, y, x, height3, width3, scale_y3, scale_x3, q, Q)
    q4 = upsampled(f4, y, x, height4, width4, scale_y4, scale_x4, q, Q)
    squares = tl.sum(q1 * q1 + q2 * q2 + q3 * q3 + q4 * q4, axis=1)
    scale = tl.where(inside, 1 / tl.maximum(tl.sqrt(squares), 1e-6), 0)
    return q1, q2, q3, q4, scale


@triton.jit
def _sample_offsets(
    keypoints, x1, x1_weight, f2, f3, f4, patch_weight, patch_bias, offset_weight, offset_bias,
    patches, out, k, height, width, top, left, limit, padded_height, padded_width,
    height2, width2, scale_y2, scale_x2, height3, width3, scale_y3, scale_x3,
    height4, width4, scale_y4, scale_x4,
    C1: tl.constexpr, C1P: tl.constexpr, Q: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * M
    D: tl.constexpr = 4 * Q
    dtype = patch_weight.dtype.element_ty
    q = tl.arange(0, Q)
    # As in `deformed`: one row per keypoint and tap into this program's own memory, then a product.
    patches += (b * tl.num_programs(0) + tl.program_id(0)) * M * 9 * D
    for start in range(0, 9 * M, R):
        r = start + tl.arange(0, R)
        i, tap = first + r // 9, r % 9
        used = (r < 9 * M) & (i < k)
        point = keypoints + (b * k + i) * 2
        # Truncated, not rounded: the patch is centred as the weights were trained.
        x = tl.load(point, mask=used, other=0).to(tl.int32) + tap % 3 - 1
        y = tl.load(point + 1, mask=used, other=0).to(tl.int32) + tap // 3 - 1
        inside = used & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        q1, q2, q3, q4, scale = pixel_features(
            x1 + b * padded_height * padded_width * C1, x1_weight,
            f2 + b * height2 * width2 * Q, f3 + b * height3 * width3 * Q,
            f4 + b * height4 * width4 * Q, y + top, x + left, inside, padded_height,
            padded_width, height2, width2, scale_y2, scale_x2, height3, width3, scale_y3,
            scale_x3, height4, width4, scale_y4, scale_x4, C1, C1P, Q,
        )  # fmt: skip
        for quarter in tl.static_range(4):
            values = q1 if quarter == 0 else q2 if quarter == 1 else q3 if quarter == 2 else q4
            at = patches + r[:, None] * D + (quarter * Q + q)[None, :]
            tl.store(at, (values * scale[:, None]).to(dtype), mask=(r < 9 * M)[:, None])
    tl.debug_barrier()

    n, m = tl.arange(0, N), tl.arange(0, M)
    acc = tl.zeros([M, N], tl.float32)
    for start in tl.range(0, 9 * D, K, num_stages=STAGES):
        channel = start + tl.arange(0, K)
        values = load_matrix(patches, M, 9 * D, m, channel)
        acc = add_product(values, load_matrix(patch_weight, 9 * D, N, channel, n), acc)
    acc = selu(acc + tl.load(patch_bias + n)[None, :])
    offsets = product(acc.to(dtype), load_matrix(offset_weight, N, N, n, n))
    offsets += tl.load(offset_bias + n)[None, :]
    offsets = tl.minimum(tl.maximum(offsets, -limit), limit)
    i = first + m
    tl.store(out + (b * k + i)[:, None] * N + n[None, :], offsets, mask=(i < k)[:, None])


def _allocate_offsets(
    keypoints, x1, x1_weight, f2, f3, f4, patch_weight, patch_bias, offset_weight, offset_bias,
    level_fragments, patch_fragments, top, left, height, width,
):  # fmt: skip
    batch, k = keypoints.shape[:2]
    parts = keypoints.new_zeros(triton.cdiv(batch * k, KEYPOINTS), dtype=torch.int32)
    return keypoints.new_empty((batch, k, offset_weight.shape[1])), parts


@operator(_allocate_offsets)
def sample_offsets(
    keypoints: torch.Tensor, x1: torch.Tensor, x1_weight: torch.Tensor,
    f2: torch.Tensor, f3: torch.Tensor, f4: torch.Tensor,
    patch_weight: torch.Tensor, patch_bias: torch.Tensor,
    offset_weight: torch.Tensor, offset_bias: torch.Tensor,
    level_fragments: torch.Tensor, patch_fragments: torch.Tensor,
    top: int, left: int, height: int, width: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Where each keypoint's descriptor is sampled: float32 [B, K, 2 * M] pixels, M dx then M dy.

    keypoints: [B, K, 2] in the image of [height, width] at (left, top) of the padded maps x1
    [B, H, W, C1], not yet projected, and f2..f4 [B, ., ., D / 4]. patch_weight: [9 * D,
    2 * M] (tap, channel); offset_weight: [2 * M, 2 * M]; fragments: see `weights.Offsets`.
    Also returns the zeros that `sample_descriptors` counts its finished parts with.
    """
    if x1.dtype == torch.float16:
        return sample_offsets_half(
            keypoints, x1, f2, f3, f4, patch_bias, offset_bias, level_fragments, patch_fragments,
            top, left, height, width,
        )  # fmt: skip
    out, parts = _allocate_offsets(
        keypoints, x1, x1_weight, f2, f3, f4, patch_weight, patch_bias, offset_weight, offset_bias,
        level_fragments, patch_fragments, top, left, height, width,
    )  # fmt: skip
    batch, k = keypoints.shape[:2]
    tile = tile_for("sample_offsets", x1)
    programs = triton.cdiv(k, tile["M"])
    patches = x1.new_empty((batch, programs, tile["M"], patch_weight.shape[0]))
    _sample_offsets[(programs, batch)](
        keypoints, x1, x1_weight, f2, f3, f4, patch_weight, patch_bias, offset_weight, offset_bias,
        patches, out, k, height, width, top, left, max(height, width) / 4, *x1.shape[1:3],
        *level_geometry(x1, f2, f3, f4), C1=x1.shape[3], C1P=padded(x1.shape[3]),
        Q=f2.shape[3], N=out.shape[2], **tile,
    )  # fmt: skip
    return out, parts


def sample_offsets_half(
    keypoints, x1, f2, f3, f4, patch_bias, offset_bias, level_fragments, patch_fragments, *frame
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_offsets` by `describe.cu`, which also writes the zeros."""
    batch, k = keypoints.shape[:2]
    rows, values = batch * k, len(offset_bias)
    out = keypoints.new_empty((batch, k, values))
    parts = keypoints.new_empty(triton.cdiv(rows, KEYPOINTS), dtype=torch.int32)
    definitions = constants(x1, f2, values // 2)
    run = cuda_source.compiled(SOURCE, "sample_offsets", definitions, x1.device)
    weights = [level_fragments, patch_fragments, patch_bias, offset_bias]
    arguments = [keypoints, *map_arguments(x1, f2, f3, f4), *weights, out, parts, rows, k, *frame]
    grid = launches.grid("sample_offsets", definitions, rows=rows)
    run(grid, launches.threads("sample_offsets"), arguments)
    return out, parts


@triton.jit
def corner_sums(values, weights, POSITIONS: tl.constexpr, Q: tl.constexpr):
    """Weighted sums over the four consecutive rows of each position: [POSITIONS, Q]."""
    return tl.sum(tl.reshape(values * weights[:, None], [POSITIONS, 4, Q]), axis=1)


@triton.jit
def _sample_features(
    keypoints, offsets, x1, x1_weight, f2, f3, f4, weight, out,
    k, height, width, top, left, padded_height, padded_width,
    height2, width2, scale_y2, scale_x2, height3, width3, scale_y3, scale_x3,
    height4, width4, scale_y4, scale_x4,
    C1: tl.constexpr, C1P: tl.constexpr, Q: tl.constexpr,
    POSITIONS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, 4 * M)  # four corners of each position
    at, corner = tl.program_id(0) * M + r // 4, r % 4
    used = at < k * POSITIONS
    i, position = at // POSITIONS, at % POSITIONS
    point = keypoints + (b * k + i) * 2
    offset = offsets + (b * k + i) * (2 * POSITIONS) + position
    x = tl.load(point, mask=used, other=0) + tl.load(offset, mask=used, other=0)
    y = tl.load(point + 1, mask=used, other=0)
    y += tl.load(offset + POSITIONS, mask=used, other=0)
    x0, y0 = tl.floor(x), tl.floor(y)
    share_x = tl.where(corner % 2 > 0, x - x0, 1 - (x - x0))
    share_y = tl.where(corner // 2 > 0, y - y0, 1 - (y - y0))
    x, y = x0.to(tl.int32) + corner % 2, y0.to(tl.int32) + corner // 2
    inside = used & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    q1, q2, q3, q4, scale = pixel_features(
        x1 + b * padded_height * padded_width * C1, x1_weight,
        f2 + b * height2 * width2 * Q, f3 + b * height3 * width3 * Q,
        f4 + b * height4 * width4 * Q, y + top, x + left, inside, padded_height, padded_width,
        height2, width2, scale_y2, scale_x2, height3, width3, scale_y3, scale_x3,
        height4, width4, scale_y4, scale_x4, C1, C1P, Q,
    )  # fmt: skip

    scale *= share_x * share_y
    dtype = weight.dtype.element_ty
    n, q = tl.arange(0, 4 * Q), tl.arange(0, Q)
    acc = tl.zeros([M, 4 * Q], tl.float32)
    for quarter in tl.static_range(4):
        values = q1 if quarter == 0 else q2 if quarter == 1 else q3 if quarter == 2 else q4
        values = corner_sums(values, scale, M, Q).to(dtype)
        matrix = load_matrix(weight + quarter * Q * 4 * Q, Q, 4 * Q, q, n)
        acc = add_product(values, matrix, acc)
    at = tl.program_id(0) * M + tl.arange(0, M)
    out += (b * k * POSITIONS + at)[:, None] * (4 * Q) + n[None, :]
    tl.store(out, selu(acc).to(dtype), mask=(at < k * POSITIONS)[:, None])


def sample_features(
    keypoints, offsets, x1, x1_weight, f2, f3, f4, weight, top, left, height, width
) -> torch.Tensor:
    """SELU of the projected features at every sample position, [B, K, M * D]; zero outside."""
    batch, k = keypoints.shape[:2]
    positions = offsets.shape[2] // 2
    out = x1.new_empty((batch, k, positions * weight.shape[1]))
    tile = tile_for("sample_features", x1)
    _sample_features[(triton.cdiv(k * positions, tile["M"]), batch)](
        keypoints, offsets, x1, x1_weight, f2, f3, f4, weight, out,
        k, height, width, top, left, *x1.shape[1:3], *level_geometry(x1, f2, f3, f4),
        C1=x1.shape[3], C1P=padded(x1.shape[3]), Q=f2.shape[3], POSITIONS=positions, **tile,
    )  # fmt: skip
    return out


@triton.jit
def _aggregate(
    sampled, weight, out, rows,
    DEPTH: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    n, k = tl.arange(0, D), tl.arange(0, K)
    acc = tl.zeros([M, D], tl.float32)
    for start in tl.range(0, DEPTH, K, num_stages=STAGES):
        at = i[:, None] * DEPTH + (start + k)[None, :]
        values = tl.load(sampled + at, mask=(i < rows)[:, None], other=0)
        matrix = tl.load(weight + (start + k)[:, None] * D + n[None, :])
        acc = add_product(values, matrix, acc)
    length = tl.sqrt(tl.sum(acc * acc, axis=1))
    acc = acc / tl.maximum(length, 1e-12)[:, None]
    tl.store(out + i[:, None] * D + n[None, :], acc, mask=(i < rows)[:, None])


def aggregate(sampled: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Unit-length sums over positions and channels: [B, K, M * D] to float32 [B, K, D]."""
    out = sampled.new_empty((*sampled.shape[:2], weight.shape[1]), dtype=torch.float32)
    rows = sampled.shape[0] * sampled.shape[1]
    tile = tile_for("aggregate", sampled)
    _aggregate[(triton.cdiv(rows, tile["M"]),)](
        sampled, weight, out, rows, DEPTH=weight.shape[0], D=weight.shape[1], **tile
    )
    return out


def _allocate_descriptors(
    keypoints, offsets, parts, x1, x1_weight, f2, f3, f4, project_weight, aggregate_weight,
    level_fragments, sample_fragments, top, left, height, width,
):  # fmt: skip
    shape = (*keypoints.shape[:2], project_weight.shape[1])
    return keypoints.new_empty(shape)


@operator(_allocate_descriptors, mutates=("parts",))
def sample_descriptors(
    keypoints: torch.Tensor, offsets: torch.Tensor, parts: torch.Tensor, x1: torch.Tensor,
    x1_weight: torch.Tensor, f2: torch.Tensor, f3: torch.Tensor, f4: torch.Tensor,
    project_weight: torch.Tensor, aggregate_weight: torch.Tensor,
    level_fragments: torch.Tensor, sample_fragments: torch.Tensor,
    top: int, left: int, height: int, width: int,
) -> torch.Tensor:  # fmt: skip
    """Unit-length descriptors, float32 [B, K, D], from the features at every sample position.

    project_weight: [D, D], with a SELU behind it; aggregate_weight: [M * D, D]; the rest as
    `sample_offsets` takes and returns it.
    """
    frame = (top, left, height, width)
    if x1.dtype == torch.float16:
        return sample_descriptors_half(
            keypoints, offsets, parts, x1, f2, f3, f4, level_fragments, sample_fragments, *frame
        )
    maps = (x1, x1_weight, f2, f3, f4)
    return aggregate(
        sample_features(keypoints, offsets, *maps, project_weight, *frame), aggregate_weight
    )


def sample_descriptors_half(
    keypoints, offsets, parts, x1, f2, f3, f4, level_fragments, sample_fragments, *frame
) -> torch.Tensor:
    """`sample_descriptors` by `describe.cu`."""
    batch, k = keypoints.shape[:2]
    positions, dim = offsets.shape[2] // 2, 4 * f2.shape[3]
    shares = positions // SHARE
    sums = keypoints.new_empty((len(parts), shares, KEYPOINTS, dim))
    out = keypoints.new_empty((batch, k, dim))
    definitions = constants(x1, f2, positions)
    run = cuda_source.compiled(SOURCE, "sample_descriptors", definitions, x1.device)
    weights = [level_fragments, sample_fragments]
    arguments = [keypoints, offsets, *map_arguments(x1, f2, f3, f4), *weights, sums, parts, out]
    grid = launches.grid("sample_descriptors", definitions, rows=batch * k)
    run(grid, launches.threads("sample_descriptors"), [*arguments, batch * k, k, *frame])
    return out
