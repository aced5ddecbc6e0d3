"""The training losses on cases worked by hand, and where their gradients go."""

import math

import pytest
import torch

from aliked.model import ALIKED
from training import losses
from training.geometry import ViewPairs, project
from training.objective import detect_for_training, pair_losses
from training.settings import Losses

SETTINGS = Losses(
    reprojection=1,
    dispersity=1,
    reliability=1,
    descriptor=1,
    detected=20,
    random=10,
    match_radius=3,
    exclusion_radius=4,
    temperature=0.1,
)


def points(*xy):
    return torch.tensor([xy], dtype=torch.float32)


def everything(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_reprojection_loss_is_the_mean_distance_of_mutually_nearest_keypoints():
    first, second = points((10, 10), (50, 50)), points((10, 11), (52, 50), (90, 90))
    # The identity relates the images: distances of 1 and 2 pixels, and a keypoint without partner.
    loss = losses.reprojection_loss(
        first, second, first, second, (everything(1, 2), everything(1, 3)), radius=3
    )
    assert loss == pytest.approx(1.5)


def test_reprojection_loss_averages_both_directions():
    # A magnification by 2: what is 2 pixels off in the second image is 1 pixel off in the first.
    first, second = points((10, 10)), points((22, 20))
    loss = losses.reprojection_loss(
        first, second, 2 * first, second / 2, (everything(1, 1), everything(1, 1)), radius=3
    )
    assert loss == pytest.approx(1.5)


@pytest.mark.parametrize("visible", [True, False])
def test_reprojection_loss_leaves_out_far_and_hidden_keypoints(visible):
    first, second = points((10, 10)), points((10, 14 if visible else 11))
    mask = torch.tensor([[visible]])
    loss = losses.reprojection_loss(first, second, first, second, (mask, mask), radius=3)
    assert loss == 0


def test_of_two_keypoints_at_one_point_only_the_nearer_is_paired():
    first, second = points((10, 10), (10, 12)), points((10, 10.5))
    loss = losses.reprojection_loss(
        first, second, first, second, (everything(1, 2), everything(1, 1)), radius=3
    )
    assert loss == pytest.approx(0.5)


def test_dispersity_loss_is_the_mean_over_keypoints():
    loss = losses.dispersity_loss(
        torch.tensor([[0.2, 0.4, 9.0]]), torch.tensor([[True, True, False]])
    )
    assert loss == pytest.approx(0.3)


def test_a_peak_has_less_dispersity_than_a_plateau():
    score_map = torch.full((1, 1, 20, 40), 0.5)
    score_map[0, 0, 10, 10] = 1.0  # over 0.5: e^5 times the weight of each of its 24 neighbours
    score_map[0, 0, 10, 30] = 0.5 + 1e-6
    found = detect_for_training(ALIKED("aliked-t16").eval(), score_map, 2)
    # Over 5x5 pixels dx^2 and dy^2 have a mean of 2 each; in units of a radius of 2 that is 1.
    assert found.dispersity[0, 1] == pytest.approx(1, rel=1e-4)
    assert found.dispersity[0, 0] == pytest.approx(25 / (24 + math.exp(5)), rel=1e-4)


def test_sparse_nre_is_the_cross_entropy_of_the_right_match():
    own = torch.tensor([[[1.0, 0], [0, 1]]])
    other = torch.tensor([[[1.0, 0], [-1, 0]]])  # similarities 1, -1 and 0, 0
    log_probability = losses.matching_log_probability(
        own, other, torch.zeros(1, 2, 2, dtype=torch.bool), temperature=0.5
    )
    expected = (math.log(1 + math.exp(-4)) + math.log(2)) / 2
    loss = losses.sparse_nre_loss(log_probability, everything(1, 2))
    assert loss == pytest.approx(expected, abs=1e-6)
    first_only = losses.sparse_nre_loss(log_probability, torch.tensor([[True, False]]))
    assert first_only == pytest.approx(math.log(1 + math.exp(-4)), abs=1e-6)


def test_an_ignored_point_is_no_wrong_match():
    own, other = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 0], [1, 0]]])
    ignored = torch.tensor([[[False, True], [False, False]]])
    log_probability = losses.matching_log_probability(own, other, ignored, temperature=0.1)
    assert log_probability[0, 0, 0] == 0
    assert log_probability[0, 1, 1] == pytest.approx(math.log(0.5))


def test_reliability_loss_weighs_by_the_product_of_both_scores():
    scores, others = torch.tensor([[0.5, 1.0, 1.0]]), torch.tensor([[0.5, 0.75, 1.0]])
    reliability = torch.tensor([[0.0, 1.0, 0.0]])
    visible = torch.tensor([[True, True, False]])
    # Weights 0.25 and 0.75, over their sum 1.
    loss = losses.reliability_loss(scores, others, reliability, visible)
    assert loss == pytest.approx(0.25)


def test_reliability_loss_raises_scores_that_match_well_and_lowers_the_others():
    scores = torch.tensor([[0.5, 0.5]], requires_grad=True)
    others, reliability = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    losses.reliability_loss(scores, others, reliability, everything(1, 2)).backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]


def test_losses_of_nothing_visible_are_zero_and_have_finite_gradients():
    own = torch.nn.functional.normalize(torch.randn(1, 4, 8), dim=2).requires_grad_()
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    log_probability = losses.matching_log_probability(
        own, own.detach(), ~torch.eye(4, dtype=torch.bool)[None], temperature=0.1
    )
    loss = losses.sparse_nre_loss(log_probability, nothing)
    loss.backward()
    assert loss == 0 and own.grad.isfinite().all()


def test_a_keypoint_moves_towards_what_raises_its_score_map():
    score_map = torch.full((1, 1, 24, 24), 0.3)
    score_map[0, 0, 9, 12] = 0.8
    found = detect_for_training(ALIKED("aliked-t16").eval(), score_map.requires_grad_(), 1)
    found.keypoints[0, 0, 0].backward()
    assert score_map.grad[0, 0, 9, 14] > 0 > score_map.grad[0, 0, 9, 10]


def test_every_weight_is_trained_by_a_pair():
    torch.manual_seed(0)
    model = ALIKED("aliked-t16")
    first = torch.rand(2, 3, 64, 64)
    pair = ViewPairs(
        first, first.flip(3), torch.tensor([[-1.0, 0, 63], [0, 1, 0], [0, 0, 1]]).repeat(2, 1, 1)
    )
    parts = pair_losses(model, pair, SETTINGS, torch.Generator().manual_seed(0))
    assert parts.keys() == {"reprojection", "dispersity", "reliability", "descriptor"}
    sum(parts.values()).backward()
    untrained = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert untrained == []


def test_project_knows_what_lies_behind_the_horizon():
    homography = torch.tensor([[[1.0, 0, 5], [0, 1, 0], [-0.02, 0, 1]]])
    image, ahead = project(points((10, 20), (100, 0)), homography)
    assert image[0, 0].tolist() == pytest.approx([15 / 0.8, 20 / 0.8])
    assert ahead.tolist() == [[True, False]]
