"""Differentiable keypoint detection, DKD (arXiv 2112.02906, section III-B)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from aliked.configs import RADIUS, Form
from aliked.patches import get_patches
from aliked.sampling import bilinear_sample

TEMPERATURE = 0.1  # of the soft-argmax
MAX_TOP_K = 3840  # that one TopK of TensorRT can return


class Detections(NamedTuple):
    """Keypoints of a batch; rows beyond an image's keypoints are fill-ins with zero scores."""

    keypoints: torch.Tensor  # [B, K, 2] pixels, (x, y), sub-pixel
    scores: torch.Tensor  # [B, K] score map at `keypoints`
    nms_scores: torch.Tensor  # [B, K] score map at the maximum: what selection goes by
    dispersity: torch.Tensor  # [B, K] softmax-weighted mean of (distance / 2)^2


def suppress_non_maxima(scores: torch.Tensor) -> torch.Tensor:
    """Zero every score that is not a maximum of its 5x5 window; scores: [B, 1, H, W].

    Two extra rounds recover maxima that were only suppressed by suppressed neighbours.
    """

    def window_max(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, kernel_size=2 * RADIUS + 1, stride=1, padding=RADIUS)

    maxima = scores == window_max(scores)
    for _ in range(2):
        near = window_max(maxima.to(scores.dtype)) > 0
        rest = torch.where(near, 0.0, scores)
        maxima = maxima | ((rest == window_max(rest)) & ~near)
    return torch.where(maxima, scores, 0.0)


def inner(maps: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W] without the outer `RADIUS` pixels, as [B, (H - 4) * (W - 4)]."""
    return maps[:, 0, RADIUS:-RADIUS, RADIUS:-RADIUS].flatten(1)


def select_top_k(nms_scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of [B, N] (all of them where N < k): values and indices, descending."""
    count = nms_scores.shape[1]
    # A symbolic count, in an export, must be at least k: k stays a constant of the graph.
    k = min(k, count) if isinstance(count, int) else k
    rounds = [nms_scores.topk(min(k, MAX_TOP_K), dim=1)]
    for start in range(MAX_TOP_K, k, MAX_TOP_K):
        # What one round found is out of the next: scores are not negative.
        nms_scores = nms_scores.scatter(1, rounds[-1].indices, -1.0)
        rounds.append(nms_scores.topk(min(k - start, MAX_TOP_K), dim=1))
    values, indices = zip(*rounds, strict=True)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def above(nms_scores: torch.Tensor, mean_score: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which of [B, N] are above `threshold`, or above the image's `mean_score` [B, 1].

    The mean decides where `threshold` <= 0 and, unlike in the official code for each image of a
    batch as if alone, where nothing passes.
    """
    if threshold <= 0:
        return nms_scores > mean_score
    passed = nms_scores > threshold
    return passed | ((nms_scores > mean_score) & ~passed.any(dim=1, keepdim=True))


def select_above(
    nms_scores: torch.Tensor, passed: torch.Tensor, n_limit: int, row_by_row: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `n_limit` that `passed` [B, N], as fixed-size values and indices of [B, N].

    In descending order, or, with `row_by_row`, so only where more than `n_limit` passed and else
    in the order of [B, N], as in the official code. Rows beyond the selection have value 0.
    """
    values, indices = select_top_k(torch.where(passed, nms_scores, 0.0), n_limit)
    if not row_by_row:
        return values, indices
    beyond = nms_scores.shape[1]
    raster = torch.where(values > 0, indices, beyond).argsort(dim=1)
    descending = torch.arange(values.shape[1], device=values.device)
    order = torch.where(passed.sum(dim=1, keepdim=True) > n_limit, descending, raster)
    return values.gather(1, order), indices.gather(1, order)


def soft_argmax(score_map: torch.Tensor, maxima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sub-pixel shift and dispersity of each maximum over its 5x5 window.

    score_map: [B, 1, H, W]; maxima: [B, K, 2] integer pixels. Returns [B, K, 2] and [B, K].
    """
    patches = get_patches(score_map, maxima, 2 * RADIUS + 1).flatten(2)  # [B, K, 25]
    weights = torch.softmax(patches / TEMPERATURE, dim=2)
    steps = torch.arange(-RADIUS, RADIUS + 1, device=score_map.device, dtype=score_map.dtype)
    grid = torch.cartesian_prod(steps, steps).flip(1)  # [25, 2], (x, y), row by row
    shift = weights @ grid
    distance2 = ((grid - shift[:, :, None]) / RADIUS).square().sum(dim=3)  # [B, K, 25]
    return shift, (weights * distance2).sum(dim=2)


def refine(
    score_map: torch.Tensor, nms_scores: torch.Tensor, index: torch.Tensor, form: Form
) -> Detections:
    """Selected maxima, [B, K] scores and flat indices into `inner`, to sub-pixel keypoints."""
    width = score_map.shape[-1] - 2 * RADIUS
    row = index // width  # on integers: a flat index can be beyond what a float holds exactly
    maxima = torch.stack((index - row * width, row), dim=2) + RADIUS  # [B, K, 2]
    shift, dispersity = soft_argmax(score_map, maxima)
    keypoints = maxima + shift
    scores = bilinear_sample(score_map, keypoints, form.sampling)[:, 0]
    scores = torch.where(nms_scores > 0, scores, 0.0)
    return Detections(keypoints, scores, nms_scores, dispersity)


def detect(
    score_map: torch.Tensor, top_k: int, scores_th: float, n_limit: int, form: Form
) -> Detections:
    """Keypoints of a score map [B, 1, H, W] in float32, H and W at least 5.

    `top_k` > 0 selects the best `top_k`; otherwise those above `scores_th`, at most `n_limit`.
    """
    candidates = inner(suppress_non_maxima(score_map))
    if top_k > 0:
        selected = select_top_k(candidates, top_k)
    else:
        passed = above(candidates, score_map.mean(dim=(1, 2, 3))[:, None], scores_th)
        selected = select_above(candidates, passed, n_limit, form.row_by_row)
    return refine(score_map, *selected, form)
