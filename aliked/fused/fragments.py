"""Weights in the order in which a warp's matrix products read them (mma.m16n8k16).

A fragment is the right operand [16, 8] of one product: lane 4g + t has rows 2t, 2t + 1, 2t + 8 and
2t + 9 of column g. Two fragments side by side, where there are two, alternate lane by lane, so that
a lane reads both at once.
"""

import math

import torch
import torch.nn.functional as F

# Blocks 1 and 2: a product gives x log2(e), whose power of two SELU needs, and what only the next
# product reads is SELU(x) / UNIT, in which positive values are x log2(e).
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
LOG2E = math.log2(math.e)
UNIT = SELU_SCALE / LOG2E


def lane_order(channels: int) -> torch.Tensor:
    """Which channel each column of a product computes.

    A lane holds columns 2t and 2t + 1 of every eight; these become `channels` / 4 neighbouring
    channels, which it stores at once.
    """
    return torch.arange(channels).reshape(4, -1, 2).transpose(0, 1).flatten()


def fragments(matrix: torch.Tensor) -> torch.Tensor:
    """[K, N] to [K / 16 * N / 8, 128], rows filled up with zeros to a multiple of 16."""
    matrix = F.pad(matrix, (0, 0, 0, -matrix.shape[0] % 16))
    tiles = matrix.shape[1] // 8
    pair = min(tiles, 2)
    # step, half of 8 rows, t, row of two, pairs of tiles, tile of the pair, g
    split = matrix.reshape(-1, 2, 4, 2, tiles // pair, pair, 8)
    return split.permute(0, 4, 6, 2, 5, 1, 3).reshape(-1, 128)


def level(level_weight: torch.Tensor, score_weight: torch.Tensor) -> list[torch.Tensor]:
    """Both projections of a block's output: each reads results as the last product left them."""
    channels, quarter = (lane_order(size) for size in level_weight.shape)
    first = level_weight[channels][:, quarter] * LOG2E
    return [fragments(first), fragments(score_weight[quarter])]


def block1(stem_weight, weight, level_weight, score_weight) -> torch.Tensor:
    """What the CUDA kernel `block1` reads. A row of the stem's kernel: 4 pixels of 4 channels."""
    order = lane_order(weight.shape[1])
    stem = F.pad(stem_weight.unflatten(0, (3, 3, 3)), (0, 0, 0, 1, 0, 1)).flatten(0, 2)
    stem = stem * (LOG2E * 256 / 255)  # pixels come as level / 256
    convs = [fragments(w[:, order]) for w in (stem, weight * (UNIT * LOG2E))]
    return torch.cat([*convs, *level(level_weight, score_weight * UNIT)])


def block2(first_weight, weight, shortcut_weight, level_weight, score_weight) -> torch.Tensor:
    """What the CUDA kernel `block2` reads."""
    order = lane_order(weight.shape[1])
    scaled = first_weight * LOG2E, weight * (UNIT * LOG2E), shortcut_weight * LOG2E
    convs = [fragments(w[:, order]) for w in scaled]
    return torch.cat([*convs, *level(level_weight, score_weight)])


def by_chunks(matrix: torch.Tensor) -> torch.Tensor:
    """[K, N] to [K / 32 * N / 8, 256], filled up with zeros: two products' right operands each.

    Lane 4g + t has the 8 rows from 8t on of column g. The left operand of both products then is
    16 bytes of a row per lane, which may come straight from a map.
    """
    padded = F.pad(matrix, (0, -matrix.shape[1] % 8, 0, -matrix.shape[0] % 32))
    tiles = padded.reshape(len(padded) // 32, 4, 8, -1, 8)  # step, t, row, tile, g
    return tiles.permute(0, 3, 4, 1, 2).reshape(-1, 256)


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """[K, N] to [K / 32 * N / 16 * 2, 256], filled up with zeros: the left operands of products.

    Their right operand is 16 bytes of 32 rows per lane, as in `by_chunks`: lane 4g + t has rows
    8t + 4i + (0, 1) and 8t + 4i + (2, 3) of columns g and g + 8 for the i-th of two products.
    """
    padded = F.pad(matrix, (0, -matrix.shape[1] % 16, 0, -matrix.shape[0] % 32))
    # step, t, product, later rows, row of two, tile, later column, g
    split = padded.reshape(len(padded) // 32, 4, 2, 2, 2, -1, 2, 8)
    return split.permute(0, 5, 2, 7, 1, 3, 6, 4).reshape(-1, 256)


def in_slices(weight: torch.Tensor, below: torch.Tensor | None = None) -> torch.Tensor:
    """[9 * CI, N] and [CI / 2, N] with their rows in the order of the kernel `deform`.

    For every 16 channels: those of the 9 taps, then 8 of `below`, then zeros up to 160 rows.
    """
    slices = weight.unflatten(0, (9, -1, 16)).transpose(0, 1).flatten(1, 2)
    if below is not None:
        slices = torch.cat([slices, below.unflatten(0, (-1, 8))], dim=1)
    return F.pad(slices, (0, 0, 0, 160 - slices.shape[1])).flatten(0, 1)


def score_head(first_weight, second_weight, last_weight) -> torch.Tensor:
    """What the CUDA kernel `score_head` reads.

    A product computes neighbouring pixels at once from a row of the 4 pixels around them: 2 pixels
    of 4 channels, or, of the last layer's one, 2 pixels of 4 rows from each of 6 rows.
    """
    matrices = []
    for weight in (first_weight, second_weight):
        kernel = weight.unflatten(0, (3, 3, -1))  # [3, 3, CI, 4]
        pixels = [F.pad(kernel, (0, 0, 0, 0, i, 1 - i)) for i in range(2)]
        matrices.append(torch.stack(pixels, dim=3).reshape(-1, 8))
    kernel = last_weight.unflatten(0, (3, 3, 4))[..., 0]
    shifts = [(i, 3 - i, j, 1 - j) for i in range(4) for j in range(2)]
    pixels = [F.pad(kernel, (0, 0, left, right, up, down)) for up, down, left, right in shifts]
    matrices.append(torch.stack(pixels, dim=3).reshape(-1, 8))
    return torch.cat([fragments(matrix) for matrix in matrices])


def deform(
    offset_weight: torch.Tensor,
    weight: torch.Tensor,
    shortcut_weight: torch.Tensor | None = None,
    level_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the CUDA kernel `deform` reads."""
    parts = [transposed(in_slices(offset_weight)), transposed(in_slices(weight, shortcut_weight))]
    return torch.cat(parts if level_weight is None else [*parts, by_chunks(level_weight)])


def first_level(weight: torch.Tensor) -> torch.Tensor:
    """The first level's projection [C1, Q], a row for every lane of `describe.cu`: [32, .].

    Lane 4g + t has the C1 / 4 rows from C1 / 4 * t on of column g of every product. Times log2(e),
    for the SELU behind it.
    """
    rows, columns = weight.shape
    weight = weight[:, lane_order(columns)] * LOG2E
    split = weight.reshape(4, rows // 4, columns // 8, 8)
    return split.permute(3, 0, 2, 1).reshape(32, -1)


def quad_order(channels: int) -> torch.Tensor:
    """The channels of a pixel as the rows of `by_chunks`: lane t has a quarter of each level's."""
    quarter = channels // 4
    split = torch.arange(channels).reshape(-1, 32 // quarter, 4, quarter // 4)
    return split.transpose(1, 2).flatten()


def offsets(patch_weight: torch.Tensor, offset_weight: torch.Tensor) -> torch.Tensor:
    """What the CUDA kernel `sample_offsets` reads."""
    taps = patch_weight.unflatten(0, (9, -1))
    patches = taps[:, quad_order(taps.shape[1])].flatten(0, 1)
    return torch.cat([by_chunks(patches), by_chunks(offset_weight)])


def samples(project_weight: torch.Tensor, aggregate_weight: torch.Tensor) -> torch.Tensor:
    """What the CUDA kernel `sample_descriptors` reads: a warp projects to a quarter of columns.

    The projection is times log2(e), for the SELU behind it.
    """
    quarters = torch.arange(len(project_weight)).reshape(4, -1)
    order = quarters[:, lane_order(quarters.shape[1])].flatten()
    projection = project_weight[:, order] * LOG2E
    return torch.cat([fragments(projection), fragments(aggregate_weight)])
