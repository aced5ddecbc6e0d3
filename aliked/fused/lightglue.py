"""LightGlue in half precision with few kernels: projections, updates and assignment merged.

A block is four launches: projections with the rotation of queries and keys, attention by a library,
and two layers that update the rows, with the norm between them.
"""

import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from aliked.fused.common import add_product
from aliked.lightglue import Encoding, LightGlue, Output, fused_attention

# The first that takes the inputs; a mask, of fill-ins, is not for the second.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LEAST = tl.constexpr(-1e30)  # below every logarithm
# Tile sizes and warps, by kernel. Chosen by trial on an H100, for 1000 and 2048 keypoints an image.
TILES = {
    "project": {"M": 64, "N": 64, "K": 64, "STAGES": 3, "num_warps": 4},
    "hidden": {"M": 64, "N": 128, "K": 64, "STAGES": 3, "num_warps": 4},
    "update": {"M": 32, "N": 128, "K": 64, "STAGES": 3, "num_warps": 4},
    "assign": {"M": 8, "N": 256, "num_warps": 4},
}


@triton.jit
def load_rows(rows, row, count, column, WIDTH: tl.constexpr):
    """Elements (row, column) of a matrix [count, WIDTH], zero below it."""
    inside = (row < count)[:, None]
    return tl.load(rows + row[:, None] * WIDTH + column[None, :], mask=inside, other=0)


@triton.jit
def add_linear(
    acc, rows, row, count, weight, output, first,
    IN: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + rows @ weight.T, for the rows [M] of [count, IN] and the outputs [N] of a layer.

    The layer's weight is [., WIDTH]; the rows meet its columns from `first` on.
    """
    for step in tl.range(0, IN // K, num_stages=STAGES):
        k = step * K + tl.arange(0, K)
        a = load_rows(rows, row, count, k, IN)
        b = tl.load(weight + output[None, :] * WIDTH + (first + k)[:, None])
        acc = add_product(a, b, acc)
    return acc


@triton.jit
def _angles(
    keypoints0, keypoints1, size0, size1, frequencies, cos, sin, first, count,
    HALF: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    row, c = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, HALF)
    here, there = row < first, (row >= first) & (row < count)
    at0 = keypoints0 + (b * first + row) * 2
    at1 = keypoints1 + (b * (count - first) + row - first) * 2
    x = tl.load(at0, mask=here, other=0) + tl.load(at1, mask=there, other=0)
    y = tl.load(at0 + 1, mask=here, other=0) + tl.load(at1 + 1, mask=there, other=0)
    width = tl.where(here, tl.load(size0 + b * 2), tl.load(size1 + b * 2))
    height = tl.where(here, tl.load(size0 + b * 2 + 1), tl.load(size1 + b * 2 + 1))
    reach = tl.maximum(width, height) / 2
    x, y = (x - width / 2) / reach, (y - height / 2) / reach
    fx, fy = tl.load(frequencies + c * 2), tl.load(frequencies + c * 2 + 1)
    angle = x[:, None] * fx[None, :] + y[:, None] * fy[None, :]
    at = (b * count + row)[:, None] * HALF + c[None, :]
    tl.store(cos + at, tl.cos(angle), mask=(row < count)[:, None])
    tl.store(sin + at, tl.sin(angle), mask=(row < count)[:, None])


def encode(keypoints0, keypoints1, size0, size1, frequencies: torch.Tensor) -> Encoding:
    """The `Encoding` of keypoints [B, M, 2] and [B, N, 2] in pixels; `frequencies` [d / 2, 2]."""
    first, batch = keypoints0.shape[1], len(keypoints0)
    count, half = first + keypoints1.shape[1], len(frequencies)
    cos, sin = keypoints0.new_empty(2, batch, count, 1, 1, half)
    tensors = (t.contiguous() for t in (keypoints0, keypoints1, size0, size1, frequencies))
    _angles[(triton.cdiv(count, 32), batch)](*tensors, cos, sin, first, count, half, 32)
    return Encoding(cos, sin)


@triton.jit
def _project(
    x, weight, bias, cos, sin, out, query, count, pair, first,
    D: tl.constexpr, HALF: tl.constexpr, OUT: tl.constexpr, ROTATED: tl.constexpr,
    SWAPPED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    half = tl.program_id(1) * N + tl.arange(0, N)
    low = half // HALF * (2 * HALF) + half % HALF  # columns that rotate with those HALF further
    a, b = tl.zeros([M, N], tl.float32), tl.zeros([M, N], tl.float32)
    for step in tl.range(0, D // K, num_stages=STAGES):
        k = step * K + tl.arange(0, K)
        rows = load_rows(x, row, count, k, D)
        at = weight + low[None, :] * D + k[:, None]
        a = add_product(rows, tl.load(at), a)
        b = add_product(rows, tl.load(at + HALF * D), b)
    a += tl.load(bias + low)[None, :]
    b += tl.load(bias + low + HALF)[None, :]
    if tl.program_id(1) * 2 * N < ROTATED:
        c = load_rows(cos, row, count, half % HALF, HALF)
        s = load_rows(sin, row, count, half % HALF, HALF)
        a, b = a * c - b * s, b * c + a * s
    inside = (row < count)[:, None]
    a, b = a.to(out.dtype.element_ty), b.to(out.dtype.element_ty)
    to = row
    if SWAPPED:
        to = row // pair * pair + (row + first) % pair
        if tl.program_id(1) * 2 * N < D:
            at = query + row[:, None] * D + low[None, :]
            tl.store(at, a, mask=inside)
            tl.store(at + HALF, b, mask=inside)
    at = out + to[:, None] * OUT + low[None, :]
    tl.store(at, a, mask=inside)
    tl.store(at + HALF, b, mask=inside)


def project(
    x: torch.Tensor, layer: nn.Linear, heads: int, encoding: Encoding | None, swap: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [B, S, D] to projections [B, S, P, H, d]; with `swap` also to queries [B, S, H, d].

    With an `encoding` the first two projections are rotated by it. `swap` lets the two images, of
    equal counts, change places in all projections, and gives the first one in place as queries.
    """
    batch, pair, dim = x.shape
    count, width = batch * pair, layer.out_features
    half = dim // heads // 2
    out = x.new_empty(batch, pair, width // dim, heads, 2 * half)
    query = x.new_empty(batch, pair, heads, 2 * half) if swap else None
    cos, sin = encoding or (x, x)
    tile = TILES["project"]
    grid = (triton.cdiv(count, tile["M"]), width // (2 * tile["N"]))
    rotated = 2 * dim if encoding else 0
    _project[grid](
        x, layer.weight, layer.bias, cos, sin, out, query if swap else x, count, pair, pair // 2,
        dim, half, width, rotated, swap, **tile,
    )  # fmt: skip
    return out, query


@triton.jit
def _hidden(
    x, context, weight, bias, hidden, moments, count,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    acc = add_linear(acc, x, row, count, weight, n, 0, D, 2 * D, K, STAGES)
    acc = add_linear(acc, context, row, count, weight, n, D, D, 2 * D, K, STAGES)
    values = (acc + tl.load(bias + n)[None, :]).to(hidden.dtype.element_ty)
    at = hidden + row[:, None] * (2 * D) + n[None, :]
    tl.store(at, values, mask=(row < count)[:, None])
    values = values.to(tl.float32)
    mean = tl.sum(values, axis=1) / N
    away = values - mean[:, None]
    at = moments + (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(at, mean, mask=row < count)
    tl.store(at + 1, tl.sum(away * away, axis=1), mask=row < count)


@triton.jit
def _update(
    x, hidden, moments, gain, shift, weight, bias, out, count, eps,
    D: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * D
    row = tl.program_id(0) * M + tl.arange(0, M)
    n = tl.program_id(1) * N + tl.arange(0, N)
    # Each part's mean and squared deviations to those of the whole row.
    at = moments + (row[:, None] * PARTS + tl.arange(0, PARTS)[None, :]) * 2
    means = tl.load(at, mask=(row < count)[:, None], other=0)
    squares = tl.load(at + 1, mask=(row < count)[:, None], other=0)
    mean = tl.sum(means, axis=1) / PARTS
    away = means - mean[:, None]
    variance = tl.sum(squares + away * away * (WIDTH // PARTS), axis=1) / WIDTH
    scale = tl.rsqrt(variance + eps)
    at = row[:, None] * D + n[None, :]
    inside = (row < count)[:, None]
    acc = tl.load(x + at, mask=inside, other=0).to(tl.float32) + tl.load(bias + n)[None, :]
    for step in tl.range(0, WIDTH // K, num_stages=STAGES):
        k = step * K + tl.arange(0, K)
        values = load_rows(hidden, row, count, k, WIDTH).to(tl.float32)
        values = (values - mean[:, None]) * scale[:, None] * tl.load(gain + k)[None, :]
        values += tl.load(shift + k)[None, :]
        values = 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))  # GELU
        b = tl.load(weight + n[None, :] * WIDTH + k[:, None])
        acc = add_product(values.to(b.dtype), b, acc)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


def update(x: torch.Tensor, context: torch.Tensor, ffn: nn.Sequential) -> torch.Tensor:
    """x + ffn(x beside context), for rows [B, S, D] and what attention gathered for them.

    The first layer's kernel leaves what the norm needs to know of its rows, in parts; the second's
    takes norm and GELU along.
    """
    first, norm, _, second = ffn
    batch, pair, dim = x.shape
    count, tile = batch * pair, TILES["hidden"]
    parts = 2 * dim // tile["N"]
    hidden, out = x.new_empty(batch, pair, 2 * dim), torch.empty_like(x)
    moments = torch.empty(count, parts, 2, device=x.device)
    _hidden[(triton.cdiv(count, tile["M"]), parts)](
        x, context, first.weight, first.bias, hidden, moments, count, dim, **tile
    )
    tile = TILES["update"]
    _update[(triton.cdiv(count, tile["M"]), dim // tile["N"])](
        x, hidden, moments, norm.weight, norm.bias, second.weight, second.bias, out, count,
        norm.eps, dim, parts, **tile,
    )  # fmt: skip
    return out


@triton.jit
def load_scores(
    similarity, added, own, met, first, second, FACTOR: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Scores [M, N] of keypoints `own` [M] of one image with `met` [N] of the other.

    FACTOR times their similarity, and what is `added` [first + second] for those met; LEAST where
    one of the two is no keypoint. ROWS: `own` are of the first image, which are the matrix's rows.
    """
    count = first if ROWS else second
    others = second if ROWS else first
    valid = (own < count)[:, None] & (met < others)[None, :]
    at = own[:, None] * second + met[None, :] if ROWS else own[:, None] + met[None, :] * second
    scores = FACTOR * tl.load(similarity + at, mask=valid, other=0).to(tl.float32)
    start = first if ROWS else 0
    scores += tl.load(added + start + met, mask=met < others, other=0)[None, :]
    return tl.where(valid, scores, LEAST)


@triton.jit
def offsets_of(
    similarity, x, weight, bias, padding, offset, block, first, second, ROWS: tl.constexpr,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """For M keypoints of one image what their scores have in common, beside the similarity."""
    count = first if ROWS else second
    others = second if ROWS else first
    start = 0 if ROWS else first
    own = block * M + tl.arange(0, M)
    highest, total = tl.full([M], LEAST, tl.float32), tl.zeros([M], tl.float32)
    for at in range(0, others, N):
        met = at + tl.arange(0, N)
        values = load_scores(similarity, padding, own, met, first, second, 1, ROWS)
        higher = tl.maximum(highest, tl.max(values, axis=1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher[:, None]), axis=1)
        highest = higher
    c = tl.arange(0, D)
    rows = load_rows(x + start * D, own, count, c, D).to(tl.float32)
    logit = tl.sum(rows * tl.load(weight + c).to(tl.float32)[None, :], axis=1)
    logit += tl.load(bias).to(tl.float32)
    certainty = tl.minimum(logit, 0) - tl.log(1 + tl.exp(-tl.abs(logit)))  # log of its sigmoid
    own_padding = tl.load(padding + start + own, mask=own < count, other=0)
    value = certainty - highest - tl.log(total) + 2 * own_padding
    tl.store(offset + start + own, value, mask=own < count)


@triton.jit
def _offsets(
    similarity, x, weight, bias, padding, offset, first, second,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    b, block, blocks = tl.program_id(1), tl.program_id(0), tl.cdiv(first, M)
    similarity += b * first * second
    x += b * (first + second) * D
    padding += b * (first + second)
    offset += b * (first + second)
    if block < blocks:
        offsets_of(
            similarity, x, weight, bias, padding, offset, block, first, second, True, D, M, N
        )
    else:
        offsets_of(
            similarity, x, weight, bias, padding, offset, block - blocks, first, second, False,
            D, M, N,
        )  # fmt: skip


@triton.jit
def best_of(
    similarity, offset, best, partner, block, first, second, ROWS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """For M keypoints of one image the best score's logarithm, and whose of the other it is."""
    count = first if ROWS else second
    others = second if ROWS else first
    start = 0 if ROWS else first
    own = block * M + tl.arange(0, M)
    highest, found = tl.full([M], LEAST, tl.float32), tl.zeros([M], tl.int32)
    for at in range(0, others, N):
        met = at + tl.arange(0, N)
        values = load_scores(similarity, offset, own, met, first, second, 2, ROWS)
        value, index = tl.max(values, axis=1, return_indices=True)
        found = tl.where(value > highest, at + index, found)
        highest = tl.maximum(highest, value)
    highest += tl.load(offset + start + own, mask=own < count, other=0)
    tl.store(best + start + own, highest, mask=own < count)
    tl.store(partner + start + own, found, mask=own < count)


@triton.jit
def _best(
    similarity, offset, best, partner, first, second, M: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    b, block, blocks = tl.program_id(1), tl.program_id(0), tl.cdiv(first, M)
    similarity += b * first * second
    offset += b * (first + second)
    best += b * (first + second)
    partner += b * (first + second)
    if block < blocks:
        best_of(similarity, offset, best, partner, block, first, second, True, M, N)
    else:
        best_of(similarity, offset, best, partner, block - blocks, first, second, False, M, N)


@triton.jit
def _mutual(
    best, partner, matches, scores, first, count, threshold, M: tl.constexpr
):  # fmt: skip
    b = tl.program_id(1)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = row < first
    there = tl.load(partner + b * count + row, mask=inside, other=0)
    back = tl.load(partner + b * count + first + there, mask=inside, other=-1)
    score = tl.exp(tl.load(best + b * count + row, mask=inside, other=0))
    score = tl.where(back == row, score, 0.0)
    tl.store(scores + b * first + row, score, mask=inside)
    tl.store(matches + b * first + row, tl.where(score > threshold, there, -1), mask=inside)


def assign(
    x: torch.Tensor, assignment: nn.Module, padding: torch.Tensor, first: int, threshold: float
) -> Output:
    """The pairs of keypoints that are each other's best, of rows [B, M + N, D] after all layers.

    `padding` [B, M + N] float32 is added to the similarity of each keypoint: 0, or very little for
    what is none.
    """
    batch, count, dim = x.shape
    projected = assignment.final_proj(x)
    here, there = projected[:, :first], projected[:, first:].transpose(1, 2)
    similarity = torch.baddbmm(x.new_empty(1, 1, 1), here, there, beta=0, alpha=assignment.scale**2)
    offset, best = (torch.empty(batch, count, device=x.device) for _ in range(2))
    partner = torch.empty(batch, count, dtype=torch.int32, device=x.device)
    matches = torch.empty(batch, first, dtype=torch.int64, device=x.device)
    scores = torch.empty(batch, first, device=x.device)
    tile, second = TILES["assign"], count - first
    grid = (triton.cdiv(first, tile["M"]) + triton.cdiv(second, tile["M"]), batch)
    matchability = assignment.matchability
    _offsets[grid](
        similarity, x, matchability.weight, matchability.bias, padding, offset, first, second, dim,
        **tile,
    )  # fmt: skip
    _best[grid](similarity, offset, best, partner, first, second, **tile)
    grid = (triton.cdiv(first, 256), batch)
    _mutual[grid](best, partner, matches, scores, first, count, threshold, 256)
    return Output(matches, scores)


def library_attention(q, k, v, bias) -> torch.Tensor:
    """`fused_attention` by the first of `ATTENTION` that takes the inputs."""
    with sdpa_kernel(ATTENTION, set_priority=True):
        return fused_attention(q, k, v, bias)


class FusedLightGlue(LightGlue):
    """LightGlue on a GPU in half precision; `forward` alone, which runs all layers, is fused."""

    def __init__(self, **options: float | None) -> None:
        super().__init__(**options)
        self.attention = library_attention

    def encode(self, keypoints0, keypoints1, size0, size1, mask) -> Encoding:
        """The encoding of both images' keypoints, in float32."""
        if mask is not None:
            first = keypoints0.shape[1]
            keypoints0, keypoints1 = (
                torch.where(inside[:, :, None], keypoints, 0.0)
                for inside, keypoints in zip(
                    (mask[:, :first], mask[:, first:]), (keypoints0, keypoints1), strict=True
                )
            )
        return encode(keypoints0, keypoints1, size0, size1, self.posenc.Wr.weight)

    def run_layer(self, layer, x, encoding, pair) -> torch.Tensor:
        """Rows [B, M + N, D] to the same shape."""
        block = layer.self_block
        qkv, _ = project(x, block.project, block.heads, encoding, swap=False)
        x = update(x, pair.within(*qkv.unbind(2)), block.ffn)
        block = layer.cross_block
        kv, query = project(x, block.project, block.heads, None, swap=pair.equal)
        context = pair.across_swapped(query, kv) if pair.equal else pair.across(kv[:, :, 0], kv)
        return update(x, context, block.ffn)

    def assign(self, x, pair) -> Output:
        """Rows [B, M + N, D] after all layers to `Output`."""
        if pair.bias is None:
            padding = torch.zeros(x.shape[:2], device=x.device)
        else:
            padding = pair.bias.float()
        return assign(x, self.log_assignment[-1], padding, pair.first, self.filter_threshold)
