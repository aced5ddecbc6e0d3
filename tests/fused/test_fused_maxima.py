"""The suppression kernel against the plain model, its CUDA source run on the CPU."""

import pytest
import torch

from aliked.fused import cuda_source, maxima, reference
from aliked.fused.trace import sorted_keys
from tests.helpers import cuda_on_host


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = cuda_source.text(maxima.SOURCE, maxima.CONSTANTS)
    return cuda_on_host.build(source, tmp_path_factory.mktemp("maxima"))


def find_maxima(library, scores):
    batch, height, width = scores.shape
    tally = torch.zeros(batch, maxima.TALLY, dtype=torch.int32)
    keys = torch.full((batch, (height - 4) * (width - 4)), -1)
    grid = maxima.grid(batch, height, width)
    arguments = [scores, keys, tally, height, width]
    cuda_on_host.launch(library, "find_maxima", grid, maxima.BLOCK, arguments)
    return sorted_keys(keys, tally[:, maxima.BINS, None], keys.shape[1]), tally


def smooth(*shape):
    noise = torch.rand(shape[0], 1, *shape[1:])
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1)[:, 0].contiguous()


@pytest.mark.parametrize(
    "scores",
    [
        smooth(2, 75, 140),
        smooth(1, 5, 5),
        smooth(1, 33, 200).square().square(),
        (smooth(1, 64, 64) * 8).floor() / 8,  # many equal scores
        torch.full((1, 40, 70), 0.25),
        torch.zeros(1, 40, 70),
        torch.rand(1, 70, 70) * 1e-12,  # below the lowest bin
    ],
)
def test_the_maxima_are_those_of_the_plain_model(library, scores):
    keys, tally = find_maxima(library, scores)
    expected_tally = torch.zeros_like(tally)
    expected_keys = reference.find_maxima(scores, expected_tally)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(tally, expected_tally)
