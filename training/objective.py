"""From a pair of views to the losses: detect in both, describe, compare."""

from typing import NamedTuple

import torch

from aliked.configs import RADIUS
from aliked.detection import Detections, inner, refine, select_top_k, suppress_non_maxima
from aliked.model import ALIKED
from aliked.sampling import bilinear_sample
from training import losses
from training.geometry import ViewPairs, inside, inverse, project, uniform
from training.settings import Losses


class Points(NamedTuple):
    """The same points in both views, row by row."""

    first: torch.Tensor  # [B, N, 2] pixels
    second: torch.Tensor  # [B, N, 2]
    visible: torch.Tensor  # [B, N]: both views show it


def detect_for_training(model: ALIKED, score_map: torch.Tensor, count: int) -> Detections:
    """The `count` best keypoints of [B, 1, H, W], differentiable in the score map.

    Which pixels are selected is no function of the scores that could be differentiated: gradients
    flow through the soft-argmax, its dispersity and the scores, as in ALIKE.
    """
    with torch.no_grad():
        maxima = inner(suppress_non_maxima(score_map))
        values, index = select_top_k(maxima, count)
    return refine(score_map, values, index, model.form)


def common_points(
    pair: ViewPairs, found: tuple[Detections, Detections], count: int, generator: torch.Generator
) -> Points:
    """Both views' keypoints and `count` random points, each where either view shows it."""
    size = pair.first.shape[-1]
    first, second = (detections.keypoints.detach() for detections in found)
    extra = uniform(len(first), RADIUS, size - 1 - RADIUS, generator, (count, 2))
    own = torch.cat((first, extra), dim=1)
    there, ahead = project(own, pair.homography)
    here, back = project(second, inverse(pair.homography))
    visible = torch.cat(
        (ahead & inside(there, size, RADIUS), back & inside(here, size, RADIUS)), dim=1
    )
    limit = size - 1.0  # an invisible point may be anywhere, but sampling wants finite places
    return Points(
        torch.cat((own, here.clamp(0, limit)), dim=1),
        torch.cat((there.clamp(0, limit), second), dim=1),
        visible,
    )


def keypoint_losses(
    pair: ViewPairs, found: tuple[Detections, Detections], settings: Losses
) -> dict[str, torch.Tensor]:
    """The losses of where keypoints are: `reprojection` and `dispersity`."""
    size = pair.first.shape[-1]
    first, second = (detections.keypoints for detections in found)
    there, ahead = project(first, pair.homography)
    here, back = project(second, inverse(pair.homography))
    visible = ahead & inside(there, size), back & inside(here, size)
    dispersity = torch.cat([detections.dispersity for detections in found], dim=1)
    kept = torch.cat([detections.nms_scores for detections in found], dim=1) > 0
    return {
        "reprojection": losses.reprojection_loss(
            first, second, there, here, visible, settings.match_radius
        ),
        "dispersity": losses.dispersity_loss(dispersity, kept),
    }


def near_pairs(pair: ViewPairs, points: Points, radius: float) -> torch.Tensor:
    """Which points of the two views are closer than `radius`, true matches left out; [B, N, N]."""
    projected, _ = project(points.first, pair.homography)
    near = losses.pixel_distances(projected, points.second) < radius
    return near & ~torch.eye(near.shape[1], dtype=torch.bool, device=near.device)


def descriptor_losses(
    pair: ViewPairs,
    points: Points,
    descriptors: tuple[torch.Tensor, torch.Tensor],
    scores: tuple[torch.Tensor, torch.Tensor],
    settings: Losses,
) -> dict[str, torch.Tensor]:
    """The losses of how points are described and ranked: `descriptor` and `reliability`.

    Both directions count the same. A point is compared with all points that both views show,
    except those so close to its match that they are hardly wrong.
    """
    near = near_pairs(pair, points, settings.exclusion_radius)
    hidden = ~points.visible[:, None]
    first, second = descriptors
    forwards, backwards = (
        losses.matching_log_probability(own, other, ignored | hidden, settings.temperature)
        for own, other, ignored in ((first, second, near), (second, first, near.mT))
    )
    probability = sum(q.detach().diagonal(dim1=1, dim2=2).exp() for q in (forwards, backwards)) / 2
    nre = sum(losses.sparse_nre_loss(q, points.visible) for q in (forwards, backwards)) / 2
    reliability = losses.reliability_loss(*scores, probability, points.visible)
    return {"descriptor": nre, "reliability": reliability}


def pair_losses(
    model: ALIKED,
    pair: ViewPairs,
    settings: Losses,
    generator: torch.Generator,
    half_precision: bool = False,
) -> dict[str, torch.Tensor]:
    """Each loss of a batch of pairs, unweighted, by name.

    With `half_precision` convolutions and products run in float16; score map, keypoints and
    losses stay float32.
    """
    count = len(pair.first)
    images = torch.cat((pair.first, pair.second))
    with torch.autocast(images.device.type, torch.float16, enabled=half_precision):
        features, score_map = model.dense(images)
    detected, random = (
        round(share * images.shape[-1]) for share in (settings.detected, settings.random)
    )
    both = detect_for_training(model, score_map, detected)
    found = (
        Detections(*(rows[:count] for rows in both)),
        Detections(*(rows[count:] for rows in both)),
    )
    points = common_points(pair, found, random, generator)
    places = torch.cat((points.first, points.second))
    with torch.autocast(images.device.type, torch.float16, enabled=half_precision):
        descriptors = model.desc_head(features, places, model.form)
    scores = bilinear_sample(score_map, places)[:, 0]
    return keypoint_losses(pair, found, settings) | descriptor_losses(
        pair, points, descriptors.split(count), scores.split(count), settings
    )


def weighted_sum(parts: dict[str, torch.Tensor], settings: Losses) -> torch.Tensor:
    """What training minimises: the losses by the weights of the same names."""
    return sum(getattr(settings, name) * value for name, value in parts.items())
