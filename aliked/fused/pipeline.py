"""The whole extractor as a straight line of operators."""

from types import ModuleType
from typing import NamedTuple

import torch

from aliked.configs import STRIDE, Selection
from aliked.fused.weights import Weights
from aliked.model import Output
from aliked.pyramid import Frame


class Levels(NamedTuple):
    """Features of the padded frame: level 1 not yet projected, the others [B, ., ., D / 4]."""

    x1: torch.Tensor
    f2: torch.Tensor
    f3: torch.Tensor
    f4: torch.Tensor


def encode(
    images: torch.Tensor, frame: Frame, weights: Weights, ops: ModuleType
) -> tuple[Levels, torch.Tensor, torch.Tensor]:
    """uint8 [B, h, w, 3] to features, scores [B, h, w] and a tally of none of their maxima."""
    height, width = frame.height + -frame.height % STRIDE, frame.width + -frame.width % STRIDE
    convs, deforms, levels = weights.convs, weights.deforms, weights.levels
    packed, place = weights.blocks, (height, width, frame.top, frame.left)
    x1, below, s1 = ops.block1(images, *convs[0], *convs[1], *levels[0], packed[0], *place)
    shortcut = weights.shortcuts[0]
    f2, below, s2 = ops.block2(below, *convs[2], *convs[3], shortcut, *levels[1], packed[1])
    x = ops.deform(below, *deforms[0])
    f3, below, s3 = ops.deform_level(x, *deforms[1], below, weights.shortcuts[1], *levels[2], 4)
    x = ops.deform(below, *deforms[2])
    f4, _, s4 = ops.deform_level(x, *deforms[3], below, weights.shortcuts[2], *levels[3], 1)
    scores, tally = ops.score_head(s1, s2, s3, s4, *weights.score_head, *frame)
    return Levels(x1, f2, f3, f4), scores, tally


def detect(
    scores: torch.Tensor, tally: torch.Tensor, selection: Selection, ops: ModuleType
) -> tuple:
    """Keypoints [B, K, 2] and [B, K] each: scores, scores at the maxima, dispersities."""
    keys = ops.find_maxima(scores, tally)
    height, width = scores.shape[1:]
    k = selection.rows(height, width)
    means = _means(scores, selection) if selection.by_threshold else None
    chosen = ops.select(keys, tally, means, k, selection.scores_th)
    return ops.refine(chosen, tally, scores, k)


def _means(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    """What `select` takes in the threshold's place where no score is above that, or it is 0."""
    if not selection.strict:
        return scores.mean(dim=(1, 2))
    # No score is above 1, and each maximum is above 0.
    return scores.new_full(scores.shape[:1], 1.0 if selection.scores_th > 0 else 0.0)


def describe(
    keypoints: torch.Tensor, levels: Levels, frame: Frame, weights: Weights, ops: ModuleType
) -> torch.Tensor:
    """Unit-length descriptors [B, K, D] of keypoints [B, K, 2]."""
    head = weights.descriptor
    maps = (levels.x1, weights.levels[0].level_weight, *levels[1:])
    offsets, parts = ops.sample_offsets(keypoints, *maps, *head.offsets, *frame)
    return ops.sample_descriptors(keypoints, offsets, parts, *maps, *head.samples, *frame)


def extract(
    images: torch.Tensor, weights: Weights, selection: Selection, ops: ModuleType
) -> Output:
    """uint8 [B, H, W, 3], H and W at least 5, to `Output`, as `aliked.model.ALIKED.forward`.

    `ops` is `aliked.fused.kernels`, or `aliked.fused.reference` for its plain twin.
    """
    height, width = images.shape[1:3]
    frame = Frame(-height % STRIDE // 2, -width % STRIDE // 2, height, width)
    levels, scores, tally = encode(images, frame, weights, ops)
    keypoints, *rows = detect(scores, tally, selection, ops)
    return Output(keypoints, describe(keypoints, levels, frame, weights, ops), *rows)
