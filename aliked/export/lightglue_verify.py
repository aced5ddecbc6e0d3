"""Is an exported matcher still LightGlue? ONNX Runtime beside PyTorch float32."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aliked.backends.lightglue_onnxruntime import (
    ColmapMatcher,
    ONNXRuntimeMatcher,
    ONNXRuntimePair,
)
from aliked.export.lightglue_export import MatcherOptions
from aliked.features import Features
from aliked.lightglue import LightGlue
from aliked.match_parity import (
    MATCH_FP16,
    MATCH_FP32,
    PAIR_FP32,
    MatchParity,
    compare_matches,
    in_terms_of,
    judge_matches,
)
from aliked.matches import Size
from aliked.model import ALIKED
from aliked.parity import Verdict


class Pair(NamedTuple):
    """Features of two images."""

    name: str
    features0: Features
    features1: Features
    size0: Size  # (width, height), pixels
    size1: Size


def with_fewer(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Each pair as it is, and with so few keypoints that a file must mask the rest."""
    for pair in pairs:
        yield pair
        half = len(pair.features1) // 2
        for count0, count1 in ((len(pair.features0), half), (half, 7), (1, half), (0, half)):
            yield pair._replace(
                name=f"{pair.name}, the best {count0} and {count1}",
                features0=best(pair.features0, count0),
                features1=best(pair.features1, count1),
            )


def best(features: Features, count: int) -> Features:
    """The first `count` keypoints, which in top-k mode are the best."""
    return Features(
        features.keypoints[:count], features.scores[:count], features.descriptors[:count]
    )


def verify_matcher(
    path: Path, reference: LightGlue, precision: str, options: MatcherOptions, pairs: Iterable[Pair]
) -> Verdict:
    """Compare the file's matches with those of `reference`, the float32 matcher, pair by pair.

    `precision` ("fp32" or "fp16") is that of the file and chooses the tolerance.
    """
    colmap = options.io == "colmap"
    other = (ColmapMatcher if colmap else ONNXRuntimeMatcher)(path, device="cpu")
    parities = {
        name: compare_matches(reference.match(*pair), other.match(*pair))
        for name, *pair in with_fewer(pairs)
    }
    return judge_matches(parities, MATCH_FP16 if precision == "fp16" else MATCH_FP32)


def verify_pair(
    path: Path,
    model: ALIKED,
    matcher: LightGlue,
    precision: str,
    pairs: Iterable[tuple[str, np.ndarray, np.ndarray]],
) -> Verdict:
    """Compare a file's matches of two images with those of the float32 `model` and `matcher`.

    `pairs` are a name and two images, uint8 [H, W, 3] RGB. The keypoints of both are paired first,
    so that a keypoint which the file finds elsewhere loses its match.
    """
    run = ONNXRuntimePair(path, device="cpu")
    parities = {
        name: _compare_pair(run, model, matcher, image0, image1) for name, image0, image1 in pairs
    }
    return judge_matches(parities, MATCH_FP16 if precision == "fp16" else PAIR_FP32)


def _compare_pair(
    run: ONNXRuntimePair, model: ALIKED, matcher: LightGlue, image0: np.ndarray, image1: np.ndarray
) -> MatchParity:
    features = [model.extract(image) for image in (image0, image1)]
    sizes = [image.shape[1::-1] for image in (image0, image1)]
    found = run(image0, image1)
    matches = in_terms_of(
        (features[0].keypoints, features[1].keypoints),
        (found.keypoints0, found.keypoints1),
        found.matches,
    )
    return compare_matches(matcher.match(*features, *sizes), matches)
