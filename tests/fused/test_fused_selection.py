"""Which maxima become keypoints and where they lie, the CUDA source run on the CPU."""

import pytest
import torch

from aliked.fused import cuda_source, launches, reference, selection
from aliked.fused.maxima import BINS, TALLY
from aliked.fused.trace import sorted_keys
from tests.helpers import cuda_on_host


def build(folder, room):
    source = cuda_source.text(selection.SOURCE, selection.constants(room))
    return cuda_on_host.build(source, folder)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("few"), launches.number("FEW_KEYS"))


@pytest.fixture(scope="module")
def library_for_many(tmp_path_factory):
    return build(tmp_path_factory.mktemp("many"), launches.number("FEW_KEYS") + 1)


def maxima(scores):
    """Keys in random order, a batch's tallies, and what follows the keys."""
    tally = torch.zeros(len(scores), TALLY, dtype=torch.int32)
    keys = reference.find_maxima(scores, tally)
    for row, count in zip(keys, tally[:, BINS], strict=True):
        row[:count] = row[:count][torch.randperm(count)]
        row[count:] = torch.iinfo(torch.int64).max  # never written by `find_maxima`
    return keys, tally


def select(library, keys, tally, means, k, threshold):
    chosen = torch.full_like(selection._allocate_select(keys, tally, means, k, threshold), -1)
    launch = selection.select_launch(keys, tally, means, chosen, k, threshold)
    cuda_on_host.launch(library, "select_keys", *launch)
    return chosen


def refine(library, chosen, tally, scores, k):
    outputs = [o.fill_(torch.nan) for o in selection._allocate_refine(chosen, tally, scores, k)]
    launch = selection.refine_launch(chosen, tally, scores, outputs, k)
    cuda_on_host.launch(library, "refine_keypoints", *launch)
    return outputs


def noise(*shape):
    torch.manual_seed(0)
    return torch.rand(*shape)


SCORES = {
    "noise": noise(2, 30, 44),
    "few values": (noise(1, 40, 40) * 4).floor() / 4,
    "flat": torch.full((1, 50, 61), 0.25),  # every pixel is a maximum: more than k and the slack
    "none": torch.zeros(1, 20, 30),
    "tiny": noise(1, 30, 30) * 1e-12,  # below the lowest bin
    "smallest": noise(1, 5, 5),
}


@pytest.mark.parametrize(("k", "threshold"), [(25, None), (4000, None), (40, 0.9), (500, 0.5)])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_keypoints_are_those_of_the_twin(library, scores, k, threshold):
    keys, tally = maxima(scores)
    k = min(k, keys.shape[1])
    means = None if threshold is None else (scores.mean(dim=(1, 2)) - 0.01).clamp(min=0)
    threshold = threshold or 0.0
    expected_tally = tally.clone()
    expected = reference.select(keys, expected_tally, means, k, threshold)
    chosen = select(library, keys, tally, means, k, threshold)
    kept, expected_kept = (t[:, BINS + 1 : BINS + 3] for t in (tally, expected_tally))
    assert torch.equal(kept.clamp(max=k), expected_kept)
    orders = [sorted_keys(each, kept[:, :1], k) for each in (chosen, expected)]
    assert torch.equal(*orders)
    got = refine(library, chosen, tally, scores, k)
    want = reference.refine(expected, expected_tally, scores, k)
    for name, a, b in zip(("keypoints", "score", "nms", "dispersity"), got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, name=name: name + m)


def test_warps_that_rank_several_candidates_do_so_as_the_twin(library_for_many):
    # A block takes four times as many candidates as it is launched for: the others do nothing.
    test_keypoints_are_those_of_the_twin(library_for_many, SCORES["noise"], 100, None)


@pytest.mark.parametrize(("k", "by_threshold"), [(3, False), (40, False), (80, True)])
def test_equal_scores_come_in_the_order_of_the_image(library, k, by_threshold):
    scores = torch.full((1, 12, 14), 0.25)
    keys, tally = maxima(scores)
    means = torch.full((1,), 0.24) if by_threshold else None
    chosen = select(library, keys, tally, means, k, 0.9)
    keypoints, _, nms_scores, _ = refine(library, chosen, tally, scores, k)
    inside = torch.cartesian_prod(torch.arange(2, 10), torch.arange(2, 12)).flip(1)
    assert torch.equal(keypoints[0].round().long(), inside[:k])
    assert (nms_scores == 0.25).all()
