"""Of two pixels with nearly one score, rounding decides which one a keypoint is refined from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aliked.features import drop_fill_ins
from aliked.images import load_image
from aliked.model import ALIKED, to_tensor
from aliked.parity import FP32, compare_features, judge
from aliked.ties import TIE, find_ties

FRAME = Path("assets/sequence_640x480/000002.jpg")


@pytest.fixture(scope="module")
def model(weights_dir):
    return ALIKED.from_pretrained("aliked-t16", top_k=2000, weights=weights_dir)


def test_the_other_side_of_a_tie_is_within_tolerance_only_where_the_tie_is_known(model):
    image = load_image(FRAME)
    ties = find_ties(model, image)
    assert [459, 181] in ties.tolist()  # ahead of (459, 182) by 3.6e-7
    with torch.inference_mode():
        features, scores = model.dense(to_tensor(torch.from_numpy(image[None])))
        window = scores[0, 0, 179:184, 457:462].flatten()
        first, second = window.topk(2).indices
        assert window[first] - window[second] < TIE
        scores[0, 0, 179 + second // 5, 457 + second % 5] += TIE
        other = model.describe(features, model.detect(scores))
    other = drop_fill_ins(*(rows[0].numpy() for rows in other[:3]))
    known = compare_features(model(image), other, ties=ties)
    assert 1 <= known.undecided <= 3  # of 2000
    assert judge({"": known}, FP32).passed, judge({"": known}, FP32).text
    unknown = judge({"": compare_features(model(image), other)}, FP32)
    assert any("max |dxy|" in reason for reason in unknown.reasons)


def test_a_flat_image_has_no_tie_that_matters(model):
    """Its maxima are nowhere ahead, and score below what parity counts."""
    image = np.full((64, 64, 3), 128, np.uint8)
    assert find_ties(model, image).shape[1] == 2
    assert judge({"": compare_features(model(image), model(image))}, FP32).passed
