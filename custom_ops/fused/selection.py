"""Which maxima become keypoints, their order, and their refinement to sub-pixel positions."""

import struct

import torch
import triton
import triton.language as tl

from custom_ops.fused import tuning
from custom_ops.fused.maxima import BIN_SHIFT, BINS, INDEX_BITS, LOWEST_BIN, RADIUS, TALLY

SLACK = 1024  # keys that may pass beside the k best: ranking them is cheaper than finding the k-th
CHUNK = tl.constexpr(4096)  # keys that a program counts together
SHARE = tl.constexpr(1024)  # keys that it filters together
PROGRAMS = 24  # that share the filtering: most images have fewer keys than all shares together


@triton.jit
def count_from(keys, total, low):
    """How many of the first `total` keys are at least `low`, which is above 0."""
    counts = tl.zeros([CHUNK], tl.int32)
    for start in range(0, total, CHUNK):
        i = start + tl.arange(0, CHUNK)
        key = tl.load(keys + i, mask=i < total, other=0)
        counts += (key >= low).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def lowest_of_best(keys, tally, total, k, slack):
    """The smallest key to keep so that at least k, and at most k + slack, are kept."""
    bins = tl.arange(0, BINS)
    counts = tl.load(tally + bins)
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts  # keys in this bin and above
    at_least = tl.where(bins == 0, total, at_least)
    best = tl.max(tl.where(at_least >= k, bins, 0))
    kept = tl.sum(tl.where(bins == best, at_least, 0))
    first = (best + LOWEST_BIN).to(tl.int64) << (BIN_SHIFT + INDEX_BITS)
    low = tl.where(best == 0, 1, first)
    high = first + (tl.full([], 1, tl.int64) << (BIN_SHIFT + INDEX_BITS))
    # Many scores in one bin, as on a flat image: halve the range of keys. Keys differ, so it ends.
    while kept > k + slack:
        middle = low + (high - low) // 2
        count = count_from(keys, total, middle)
        if count >= k:
            low = middle
            kept = count
        else:
            high = middle
    return low


@triton.jit
def lowest_above(keys, total, threshold_bits, mean_bits):
    """The smallest key whose score is above the threshold; above the mean where none is."""
    one = tl.full([], 1, tl.int64)
    low = (threshold_bits + one) << INDEX_BITS
    if (threshold_bits < 0) | (count_from(keys, total, low) == 0):
        low = (mean_bits + one) << INDEX_BITS
    return low


@triton.jit
def _select(
    keys, tally, means, chosen, capacity, room, k, slack, threshold_bits, THRESHOLD: tl.constexpr
):
    # Every program finds the same smallest key, then keeps its share of the keys.
    b = tl.program_id(1).to(tl.int64)
    keys += b * capacity
    tally += b * TALLY
    total = tl.load(tally + BINS)
    raster = 0
    low = tl.full([], 1, tl.int64)
    if THRESHOLD:
        mean_bits = tl.load(means + b).to(tl.int32, bitcast=True)
        passing = lowest_above(keys, total, threshold_bits, mean_bits)
        if count_from(keys, total, passing) <= k:
            low = passing
            raster = 1
        else:
            low = lowest_of_best(keys, tally, total, k, slack)
    elif total > k:
        low = lowest_of_best(keys, tally, total, k, slack)

    tl.store(tally + BINS + 2, raster)
    for start in range(tl.program_id(0) * SHARE, total, tl.num_programs(0) * SHARE):
        i = start + tl.arange(0, SHARE)
        key = tl.load(keys + i, mask=i < total, other=0)
        keep = (key >= low).to(tl.int32)
        first = tl.atomic_add(tally + BINS + 1, tl.sum(keep), sem="relaxed")
        place = first + tl.cumsum(keep) - keep
        tl.store(chosen + b * room + place, key, mask=(keep > 0) & (place < room))


def float_bits(value: float) -> int:
    """The bits of a float32 as an integer; -1 for a threshold that no score can be below."""
    return struct.unpack("<i", struct.pack("<f", value))[0] if value > 0 else -1


def _allocate_select(keys, tally, means, k, threshold):
    return keys.new_empty((len(keys), min(k + SLACK, keys.shape[1])))


@torch.library.custom_op("aliked::select", mutates_args=("tally",))
def select(
    keys: torch.Tensor, tally: torch.Tensor, means: torch.Tensor | None, k: int, threshold: float
) -> torch.Tensor:
    """Keep the k best keys of each image, and up to `SLACK` more; all of them where k is more.

    With `means`, float32 [B], the mean score of each image: keep those above `threshold` if they
    are at most k. Where none is, or the threshold is not above 0, the mean takes its place.
    Returns keys, int64 [B, room], in no order. The last two values of each image's `tally`, zero
    before, become how many there are and whether the order to bring them into is that of the
    image (1) or of the scores (0).
    """
    chosen = _allocate_select(keys, tally, means, k, threshold)
    _select[(PROGRAMS, len(keys))](
        keys, tally, means, chosen, keys.shape[1], chosen.shape[1], k, chosen.shape[1] - k,
        float_bits(threshold), THRESHOLD=means is not None, **tuning.choose("select", keys, keys),
    )  # fmt: skip
    return chosen


select.register_fake(_allocate_select)


@triton.jit
def score_at(scores, y, x, height, width):
    """Bilinear sample of a map at float positions (y, x), zero outside."""
    y0, x0 = tl.floor(y), tl.floor(x)
    below, right = y - y0, x - x0
    y0, x0 = y0.to(tl.int32), x0.to(tl.int32)
    acc = tl.zeros_like(y)
    for corner in tl.static_range(4):
        row, column = y0 + corner // 2, x0 + corner % 2
        share = (below if corner // 2 else 1 - below) * (right if corner % 2 else 1 - right)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        acc += share * tl.load(scores + row * width + column, mask=inside, other=0)
    return acc


@triton.jit
def _refine(
    chosen, tally, scores, keypoints, refined, nms_scores, dispersity, height, width, room, k,
    M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    tally += b * TALLY + BINS
    count, raster = tl.load(tally + 1), tl.load(tally + 2)
    i = tl.program_id(0) * M + tl.arange(0, M)
    chosen += b * room
    key = tl.load(chosen + i, mask=i < count, other=0)
    order = tl.where(raster > 0, key & 0xFFFFFFFF, key)
    rank = tl.zeros([M], tl.int32)
    for start in range(0, count, 256):
        j = start + tl.arange(0, 256)
        others = tl.load(chosen + j, mask=j < count, other=0)
        others = tl.where(raster > 0, others & 0xFFFFFFFF, others)
        rank += tl.sum((others[None, :] > order[:, None]).to(tl.int32), axis=1)

    # Rows beyond the keypoints are fill-ins: the first pixels, with a score of zero.
    real = i < count
    row = tl.where(real, rank, i)
    pixel = (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
    inner = width - 2 * RADIUS
    y = tl.where(real, pixel // width, i // inner + RADIUS)
    x = tl.where(real, pixel % width, i % inner + RADIUS)
    nms_score = (key >> INDEX_BITS).to(tl.int32).to(tl.float32, bitcast=True)
    valid = row < k

    n = tl.arange(0, 32)  # 25 pixels of the window
    step_y, step_x = n // 5 - RADIUS, n % 5 - RADIUS
    offsets = (y * width + x)[:, None] + (step_y * width + step_x)[None, :]
    scores += b * height * width
    window = tl.load(scores + offsets, mask=valid[:, None] & (n < 25)[None, :], other=-1)
    weights = tl.exp((window - tl.max(window, axis=1)[:, None]) / 0.1)
    weights = tl.where((n < 25)[None, :], weights, 0)
    weights = weights / tl.sum(weights, axis=1)[:, None]
    step_y, step_x = step_y.to(tl.float32)[None, :], step_x.to(tl.float32)[None, :]
    shift_y, shift_x = tl.sum(weights * step_y, axis=1), tl.sum(weights * step_x, axis=1)
    from_y, from_x = (step_y - shift_y[:, None]) / RADIUS, (step_x - shift_x[:, None]) / RADIUS
    spread = tl.sum(weights * (from_y * from_y + from_x * from_x), axis=1)
    y, x = y + shift_y, x + shift_x
    score = tl.where(real, score_at(scores, y, x, height, width), 0)

    row += b * k
    tl.store(keypoints + 2 * row, x, mask=valid)
    tl.store(keypoints + 2 * row + 1, y, mask=valid)
    tl.store(refined + row, score, mask=valid)
    tl.store(nms_scores + row, nms_score, mask=valid)
    tl.store(dispersity + row, spread, mask=valid)


def _allocate_refine(chosen, tally, scores, k):
    def rows(*last):
        return scores.new_empty((len(scores), k, *last))

    return rows(2), rows(), rows(), rows()


@torch.library.custom_op("aliked::refine", mutates_args=())
def refine(
    chosen: torch.Tensor, tally: torch.Tensor, scores: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank what `select` kept, take the first k and refine them by the soft-argmax of the window.

    Returns float32 keypoints [B, k, 2] in pixels, (x, y), and [B, k] each: the score there, the
    score at the maximum, the dispersity (DKD, arXiv 2112.02906, section III-B).
    """
    outputs = _allocate_refine(chosen, tally, scores, k)
    batch, height, width = scores.shape
    tile = tuning.choose("refine", scores, scores)
    grid = (triton.cdiv(chosen.shape[1], tile["M"]), batch)
    _refine[grid](chosen, tally, scores, *outputs, height, width, chosen.shape[1], k, **tile)
    return outputs


refine.register_fake(_allocate_refine)
