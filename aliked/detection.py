"""Differentiable keypoint detection, DKD (arXiv 2112.02906, section III-B)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from aliked.patches import get_patches
from aliked.sampling import bilinear_sample

RADIUS = 2  # of the suppression and refinement windows, and of the border that is dropped
TEMPERATURE = 0.1  # of the soft-argmax


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
    return nms_scores.topk(min(k, count) if isinstance(count, int) else k, dim=1)


def select_above(
    nms_scores: torch.Tensor, mean_score: torch.Tensor, threshold: float, n_limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of [B, N] above `threshold`, at most `n_limit`, as fixed-size values and indices.

    Where nothing passes, or `threshold` <= 0, the image's `mean_score` [B, 1] is the threshold.
    The order is row by row where all fit, else descending (as in the official code, but every
    image of a batch is treated as if alone). Rows beyond the selection have value 0.
    """
    passed = nms_scores > threshold
    if threshold > 0:
        fall_back = (nms_scores > mean_score) & ~passed.any(dim=1, keepdim=True)
        passed = passed | fall_back
    else:
        passed = nms_scores > mean_score
    count = passed.sum(dim=1, keepdim=True)
    values, indices = select_top_k(torch.where(passed, nms_scores, 0.0), n_limit)
    last = nms_scores.shape[1]
    raster = torch.where(values > 0, indices, last).argsort(dim=1)
    best_first = torch.arange(values.shape[1], device=values.device)
    order = torch.where(count > n_limit, best_first, raster)
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


def refine(score_map: torch.Tensor, nms_scores: torch.Tensor, index: torch.Tensor) -> Detections:
    """Selected maxima, [B, K] scores and flat indices into `inner`, to sub-pixel keypoints."""
    width = score_map.shape[-1] - 2 * RADIUS
    row = index // width  # on integers: a flat index can be beyond what a float holds exactly
    maxima = torch.stack((index - row * width, row), dim=2) + RADIUS  # [B, K, 2]
    shift, dispersity = soft_argmax(score_map, maxima)
    keypoints = maxima + shift
    scores = bilinear_sample(score_map, keypoints)[:, 0]
    scores = torch.where(nms_scores > 0, scores, 0.0)
    return Detections(keypoints, scores, nms_scores, dispersity)


def detect(score_map: torch.Tensor, top_k: int, scores_th: float, n_limit: int) -> Detections:
    """Keypoints of a score map [B, 1, H, W] in float32, H and W at least 5.

    `top_k` > 0 selects the best `top_k`; otherwise those above `scores_th`, at most `n_limit`.
    """
    candidates = inner(suppress_non_maxima(score_map))
    if top_k > 0:
        return refine(score_map, *select_top_k(candidates, top_k))
    mean_score = score_map.mean(dim=(1, 2, 3))[:, None]
    return refine(score_map, *select_above(candidates, mean_score, scores_th, n_limit))
