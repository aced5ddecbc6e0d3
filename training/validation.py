"""How well a model matches views that training never saw."""

from dataclasses import dataclass, fields

import torch

from aliked.detection import detect
from aliked.features import Features
from aliked.matching import match_mutual
from aliked.model import ALIKED
from training.appearance import change_appearance
from training.geometry import ViewPairs, inside, project, random_pairs
from training.pool import VALIDATE, make_pool
from training.settings import Settings

CORRECT = 3.0  # pixels


@dataclass(frozen=True)
class Scores:
    """Means over pairs."""

    accuracy: float  # share of the matches that are correct: mean matching accuracy
    correct: float  # correct matches per pair
    repeated: float  # share of the keypoints both views show with another's within 3 px
    error: float  # pixels: median distance of correct matches


def make_pairs(settings: Settings, device: torch.device) -> list[ViewPairs]:
    """The validation pairs: the same for a seed on the same kind of device; uint8 views of one."""
    pool = make_pool(VALIDATE, settings.run.seed, settings.validation_pool)
    generator = torch.Generator(device).manual_seed(settings.run.seed)
    sizes = settings.validation.image_sizes
    pairs = []
    for index in range(settings.validation.pairs):
        source = torch.from_numpy(pool[index % len(pool)]).to(device)[None]
        pair = random_pairs(
            source.permute(0, 3, 1, 2) / 255,
            sizes[index % len(sizes)],
            settings.geometry,
            1.0,
            generator,
        )
        views = (change_appearance(v, settings.appearance, generator) for v in pair[:2])
        pairs.append(ViewPairs(*views, pair.homography))
    return pairs


@torch.inference_mode()
def extract(model: ALIKED, image: torch.Tensor, top_k: int) -> Features:
    """The `top_k` best features of one image [1, 3, H, W]; the model is in evaluation mode."""
    features, score_map = model.dense(image)
    output = model.describe(features, detect(score_map, top_k, 0.0, 0, model.form))
    return Features(
        *(getattr(output, name)[0].cpu().numpy() for name in ("keypoints", "scores", "descriptors"))
    )


def pair_scores(first: Features, second: Features, pair: ViewPairs) -> Scores:
    """`Scores` of one pair of views."""
    size = pair.first.shape[-1]
    own, other = (torch.from_numpy(f.keypoints)[None].double() for f in (first, second))
    there, ahead = project(own, pair.homography.cpu().double())
    matches = torch.from_numpy(match_mutual(first.descriptors, second.descriptors, -1.0))
    error = torch.linalg.vector_norm(there[0, matches[:, 0]] - other[0, matches[:, 1]], dim=1)
    correct = error[(error < CORRECT) & ahead[0, matches[:, 0]]]
    visible = (ahead & inside(there, size))[0]
    nearest = torch.cdist(there[0, visible], other[0]).amin(dim=1)
    return Scores(
        accuracy=len(correct) / max(len(error), 1),
        correct=float(len(correct)),
        repeated=float((nearest < CORRECT).double().mean()) if len(nearest) else 0.0,
        error=float(correct.median()) if len(correct) else CORRECT,
    )


def validate(model: ALIKED, pairs: list[ViewPairs], top_k: int) -> Scores:
    """Mean `Scores` over all pairs."""
    scores = [
        pair_scores(extract(model, pair.first, top_k), extract(model, pair.second, top_k), pair)
        for pair in pairs
    ]
    names = [field.name for field in fields(Scores)]
    return Scores(**{n: sum(getattr(s, n) for s in scores) / len(scores) for n in names})
