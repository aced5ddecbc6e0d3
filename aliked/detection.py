"""Differentiable keypoint detection, DKD (arXiv 2112.02906, section III-B)."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from aliked.configs import MAX_TOP_K, RADIUS, Form
from aliked.patches import get_patches
from aliked.sampling import bilinear_sample

WINDOW = 2 * RADIUS + 1
WHOLE = 8  # half-precision values that a product loads at once: rows of others are slow
TEMPERATURE = 0.1  # of the soft-argmax
# Values that TensorRT sorts in one block; a TopK of twice as many takes four times as long.
GROUP = 4096
MAX_PAIRS = 8  # of lists that are merged at once: an operator each


class Detections(NamedTuple):
    """Keypoints of a batch; rows beyond an image's keypoints are fill-ins with zero scores."""

    keypoints: torch.Tensor  # [B, K, 2] pixels, (x, y), sub-pixel
    scores: torch.Tensor  # [B, K] score map at `keypoints`
    nms_scores: torch.Tensor  # [B, K] score map at the maximum: what selection goes by
    dispersity: torch.Tensor  # [B, K] softmax-weighted mean of (distance / 2)^2


def window_max(scores: torch.Tensor, exported: bool) -> torch.Tensor:
    """Maximum of the 5x5 window around every pixel of scores [B, 1, H, W], which are >= 0."""
    if not exported:
        return F.max_pool2d(scores, kernel_size=WINDOW, stride=1, padding=RADIUS)
    # TensorRT runs this twenty times as fast as a MaxPool of one channel.
    padded = F.pad(scores, [RADIUS] * 4)
    ends = [start - WINDOW + 1 or None for start in range(WINDOW)]
    rows = functools.reduce(torch.maximum, (padded[:, :, i:j] for i, j in enumerate(ends)))
    return functools.reduce(torch.maximum, (rows[..., i:j] for i, j in enumerate(ends)))


def near_any(maxima: torch.Tensor, bands: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Which pixels of [B, 1, H, W] have a positive value in the 5x5 window around them.

    `bands` are the two `band` matrices of an exported graph.
    """
    if bands is None:
        return window_max(maxima, exported=False) > 0
    # Counting by two products is exact in half precision, and keeps TensorRT from fusing the
    # windows before and after into one kernel that evaluates them 25 times.
    vertical, horizontal = bands
    return vertical @ ((maxima > 0).half() @ horizontal) > 0


def band(length: int, device: torch.device) -> torch.Tensor:
    """[length, length] of ones up to `RADIUS` from the diagonal, zeros elsewhere."""
    pixel = torch.arange(length, device=device)
    return ((pixel[:, None] - pixel).abs() <= RADIUS).half()


def suppress_non_maxima(scores: torch.Tensor, form: Form | None = None) -> torch.Tensor:
    """Zero every score that is not a maximum of its 5x5 window; scores: [B, 1, H, W].

    Two extra rounds recover maxima that were only suppressed by suppressed neighbours. Exported for
    known sizes, the map is filled up with zeros until its rows are whole for the products.
    """
    if form is None or not form.exported:
        return found_in_rounds(scores, None)
    height, width = scores.shape[-2:]
    below, right = (-int(height) % WHOLE, -int(width) % WHOLE) if form.static else (0, 0)
    filled = F.pad(scores, (0, right, 0, below)) if below or right else scores
    bands = tuple(band(side, scores.device) for side in filled.shape[-2:])
    return found_in_rounds(filled, bands)[..., :height, :width]


def found_in_rounds(
    scores: torch.Tensor, bands: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """`suppress_non_maxima` of a map as it is; for `bands` see `near_any`."""
    exported = bands is not None
    rest = scores  # without what is near a maximum
    maxima = found = torch.where(rest == window_max(rest, exported), rest, 0.0)
    for _ in range(2):
        rest = torch.where(near_any(maxima, bands), 0.0, rest)
        maxima = torch.where(rest == window_max(rest, exported), rest, 0.0)
        found = torch.maximum(found, maxima)
    return found


def inner(maps: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] without the outer `RADIUS` pixels, as [B, (H - 4) * (W - 4)]."""
    return maps[:, 0, RADIUS:-RADIUS, RADIUS:-RADIUS].flatten(1)


def select_top_k(
    nms_scores: torch.Tensor, k: int, grouped: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of [B, N] (all of them where N < k): values and indices, descending.

    `grouped` finds the same by several small top-k in place of a large one.
    """
    count = nms_scores.shape[1]
    # A symbolic count, in an export, must be at least k: k stays a constant of the graph.
    k = min(k, count) if isinstance(count, int) else k
    if grouped and 2 * k > GROUP:
        return top_k_in_parts(nms_scores, k)
    top_k = top_k_of_groups if grouped else torch.topk
    rounds = [top_k(nms_scores, min(k, MAX_TOP_K), 1)]
    for start in range(MAX_TOP_K, k, MAX_TOP_K):
        # What one round found is out of the next: scores are not negative.
        nms_scores = nms_scores.scatter(1, rounds[-1][1], -1.0)
        rounds.append(top_k(nms_scores, min(k - start, MAX_TOP_K), 1))
    values, indices = zip(*rounds, strict=True)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def top_k_of_groups(values: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`values.topk(k, dim)` of [B, N] along N, a known number, for a k of up to half a `GROUP`.

    Groups are sorted, and what can be among the best of all is left of some together, until that
    is one group. Equal values may come in another order.
    """
    count = int(values.shape[dim])  # a number also where the model is traced
    if count <= GROUP:
        return values.topk(k, dim=1)
    kept = k + k % 2  # lists are halved below
    merged = lists_to_merge(-(-count // GROUP), min(2 * GROUP // kept - 1, MAX_PAIRS))
    groups = math.prod(merged)
    length = -(-count // groups)
    values = F.pad(values, (0, groups * length - count), value=-1.0)  # below every score
    values, index = values.unflatten(dim, (groups, length)).topk(kept, dim=2)
    index = index + torch.arange(groups, device=values.device)[:, None] * length
    for lists in merged:
        values, index = contenders(values, index, lists)
        groups //= lists
        values, winners = values.topk(kept if groups > 1 else k, dim=2)
        index = index.gather(2, winners)
    return values[:, 0], index[:, 0]


def lists_to_merge(count: int, pairs: int) -> list[int]:
    """How many lists become one in each round, at most `pairs` pairs, for `count` or a few more."""
    rounds = next(n for n in itertools.count(1) if (2 * pairs) ** n >= count)
    merged = []
    for left in range(rounds, 0, -1):
        merged.append(2 * math.ceil(count ** (1 / left) / 2 - 1e-9))
        count = -(-count // merged[-1])
    return merged


def contenders(
    values: torch.Tensor, index: torch.Tensor, lists: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the K best of every `lists` are among, of descending lists [B, G, K].

    Of two lists, one of them turned round, the better at each place are the K best of both. They
    fall and then rise, so that the better of each place in their two halves are the better half
    (K. E. Batcher, Sorting networks and their applications, 1968). Of all worse halves together
    one is left: a value below one of another worse half is below both better halves as well.
    """
    both = [x.unflatten(1, (-1, 2, lists // 2)) for x in (values, index)]
    best, _ = compare([x[:, :, 0] for x in both], [x[:, :, 1].flip(3) for x in both])
    halves = [x.unflatten(3, (2, -1)) for x in best]  # [B, G / lists, lists / 2, 2, K / 2]
    upper, lower = compare(*([x[:, :, :, half] for x in halves] for half in (0, 1)))
    rest = [x[:, :, 0] for x in lower]
    for other in range(1, lists // 2):
        rest, _ = compare(rest, [x[:, :, other] for x in lower])
    values, index = (torch.cat((x.flatten(2), y), 2) for x, y in zip(upper, rest, strict=True))
    return values, index


def top_k_in_parts(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`values.topk(k, 1)` of [B, N], N a known number, for a k of more than half a `GROUP`.

    Lists of K are two, four or more parts, each sorted by itself. They are put together from parts,
    and then two become one until one is left. Equal values may come in another order.
    """
    count = int(values.shape[1])
    parts = 2 ** max(1, math.ceil(math.log2(k / MAX_TOP_K)))
    length = -(-k // parts)
    lists = even_for_long(-(-count // (parts * length)))
    values = F.pad(values, (0, lists * parts * length - count), value=-1.0)  # below every score
    values, index = values.unflatten(1, (lists * parts, length)).topk(length, dim=2)
    index = index + torch.arange(lists * parts, device=values.device)[:, None] * length
    for size, all_of_both in pairings(lists, parts):
        values, index = of_pairs(values, index, size, all_of_both)
        values, order = values.topk(length, dim=2)
        index = index.gather(2, order)
    return values.flatten(1)[:, :k], index.flatten(1)[:, :k]


def even_for_long(count: int) -> int:
    """`count` lists or up to an eighth more, so that only the last 16 can be an odd number."""
    step = 2 ** max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def pairings(lists: int, parts: int) -> Iterator[tuple[int, bool]]:
    """For every time that lists become half as many: their parts, and whether to keep all parts."""
    for doubled in range(parts.bit_length() - 1):
        yield 2**doubled, True
    for _ in range((lists - 1).bit_length()):
        yield parts, False


def of_pairs(
    values: torch.Tensor, index: torch.Tensor, size: int, all_of_both: bool
) -> list[torch.Tensor]:
    """The better half, or all, of every two lists of `size` parts each, which are [B, P, L].

    Parts come out in order but not sorted. As in `contenders`, the better and the worse at each
    place of two lists fall and rise, and so do those of their halves, down to single parts. An odd
    list stays as it is.
    """
    pairs = int(values.shape[1]) // (2 * size)
    end = 2 * pairs * size
    both = [x[:, :end].unflatten(1, (2, pairs, size)).flatten(3) for x in (values, index)]
    halves = compare([x[:, 0] for x in both], [x[:, 1].flip(2) for x in both])
    done = in_turn(halves if all_of_both else halves[:1])
    for _ in range(size.bit_length() - 1):
        both = [x.unflatten(2, (2, -1)) for x in done]
        done = in_turn(compare(*([x[:, :, half] for x in both] for half in (0, 1))))
    if end == int(values.shape[1]):
        return done
    return [torch.cat((x, y[:, end:]), dim=1) for x, y in zip(done, (values, index), strict=True)]


def in_turn(halves: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Values and indices of halves, each [B, P, L], with those of a part one behind the other."""
    return [torch.stack(x, dim=2).flatten(1, 2) for x in zip(*halves, strict=True)]


def compare(
    one: list[torch.Tensor], other: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The better and the worse at each place, of values and their indices."""
    first = one[0] >= other[0]
    better = [torch.maximum(one[0], other[0]), torch.where(first, one[1], other[1])]
    return better, [torch.minimum(one[0], other[0]), torch.where(first, other[1], one[1])]


def above_or_mean(
    nms_scores: torch.Tensor, mean_score: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Which of [B, N] are above `threshold`, or above the image's `mean_score` [B, 1].

    The mean decides where `threshold` <= 0 and, unlike in the official code for each image of a
    batch as if alone, where nothing passes.
    """
    if threshold <= 0:
        return nms_scores > mean_score
    passed = nms_scores > threshold
    return passed | ((nms_scores > mean_score) & ~passed.any(dim=1, keepdim=True))


def select_above(
    nms_scores: torch.Tensor, passed: torch.Tensor, n_limit: int, form: Form
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `n_limit` that `passed` [B, N], as fixed-size values and indices of [B, N].

    In descending order if exported; otherwise only where more than `n_limit` passed, and else in
    the order of [B, N], as in the official code. Rows beyond the selection have value 0.
    """
    values, indices = select_top_k(torch.where(passed, nms_scores, 0.0), n_limit, form.static)
    if form.exported:
        return values, indices
    beyond = nms_scores.shape[1]
    raster = torch.where(values > 0, indices, beyond).argsort(dim=1)
    descending = torch.arange(values.shape[1], device=values.device)
    order = torch.where(passed.sum(dim=1, keepdim=True) > n_limit, descending, raster)
    return values.gather(1, order), indices.gather(1, order)


def soft_argmax(
    score_map: torch.Tensor, maxima: torch.Tensor, exported: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sub-pixel shift and dispersity of each maximum over its 5x5 window.

    score_map: [B, 1, H, W]; maxima: [B, K, 2] integer pixels. Returns [B, K, 2] and [B, K].
    """
    patches = get_patches(score_map, maxima, WINDOW)
    # In numbers: in a file that finds nothing, a size left open (`flatten`) is one of 0 / 0.
    patches = patches.reshape(*maxima.shape[:2], WINDOW**2)  # [B, K, 25]
    weights = torch.softmax(patches / TEMPERATURE, dim=2)
    steps = torch.arange(-RADIUS, RADIUS + 1, device=score_map.device, dtype=score_map.dtype)
    grid = torch.cartesian_prod(steps, steps).flip(1)  # [25, 2], (x, y), row by row
    # Not a product of matrices: TensorRT has none in float32 for Turing.
    shift = (weights[..., None] * grid).sum(dim=2) if exported else weights @ grid
    distance2 = ((grid - shift[:, :, None]) / RADIUS).square().sum(dim=3)  # [B, K, 25]
    return shift, (weights * distance2).sum(dim=2)


def refine(
    score_map: torch.Tensor, nms_scores: torch.Tensor, index: torch.Tensor, form: Form
) -> Detections:
    """Selected maxima, [B, K] scores and flat indices into `inner`, to sub-pixel keypoints."""
    width = score_map.shape[-1] - 2 * RADIUS
    row = index // width  # on integers: a flat index can be beyond what a float holds exactly
    maxima = torch.stack((index - row * width, row), dim=2) + RADIUS  # [B, K, 2]
    shift, dispersity = soft_argmax(score_map, maxima, form.exported)
    keypoints = maxima + shift
    scores = bilinear_sample(score_map, keypoints, form.sampling)[:, 0]
    scores = torch.where(nms_scores > 0, scores, 0.0)
    return Detections(keypoints, scores, nms_scores, dispersity)


def detect(
    score_map: torch.Tensor,
    top_k: int,
    scores_th: float,
    n_limit: int,
    form: Form,
    strict: bool = False,
) -> Detections:
    """Keypoints of a score map [B, 1, H, W] in float32, H and W at least 5.

    `top_k` > 0 selects the best `top_k`; otherwise those above `scores_th`, at most `n_limit`. An
    image in which none is has no keypoint if `strict`, else those above its mean score.
    """
    candidates = inner(suppress_non_maxima(score_map, form))
    if top_k > 0:
        selected = select_top_k(candidates, top_k, form.static)
    else:
        if strict:
            passed = candidates > scores_th
        else:
            passed = above_or_mean(candidates, score_map.mean(dim=(1, 2, 3))[:, None], scores_th)
        selected = select_above(candidates, passed, n_limit, form)
    return refine(score_map, *selected, form)
