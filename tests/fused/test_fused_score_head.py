"""The half-precision score head against its twin, its CUDA source run on the CPU."""

import pytest
import torch

from aliked.configs import Selection
from aliked.fused import cuda_source, reference, score_head, weights
from tests.helpers import cuda_on_host
from tests.helpers.fused_models import random_model

# Of scores in [0, 1]: three layers, each input rounded to half precision.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = cuda_source.text(score_head.SOURCE, score_head.CONSTANTS)
    return cuda_on_host.build(source, tmp_path_factory.mktemp("score_head"))


def shares(batch, height, width):
    sizes = [(batch, height // part, width // part, 8) for part in (1, 2, 8, 32)]
    return [torch.randn(size).half() for size in sizes]


@pytest.mark.parametrize(
    ("batch", "padded", "frame"),
    [
        (1, (32, 32), (14, 13, 5, 6)),  # one level of a single pixel, few scores
        (2, (64, 96), (1, 3, 62, 90)),  # two tiles across, the second not full
        (1, (32, 192), (0, 0, 32, 192)),
    ],
)
def test_scores_are_those_of_the_twin(library, batch, padded, frame):
    torch.manual_seed(0)
    levels = shares(batch, *padded)
    head = weights.score_head(random_model("aliked-t16", Selection(1)))
    head = weights.convert(head, torch.float16, torch.device("cpu"))
    expected, _ = reference.score_head(*levels, *head, *frame)
    memory = torch.full((expected.numel() + 128,), float("nan"))  # with 64 before and after
    scores = memory[64:-64].view_as(expected)
    tally = torch.full((batch + 1, score_head.TALLY), -1, dtype=torch.int32)
    arguments = [*levels, head.fragments, head.first_bias, head.second_bias, scores, tally]
    grid = score_head.grid(batch, frame[2], padded[1])
    block = score_head.BLOCK
    cuda_on_host.launch(library, "score_head", grid, block, [*arguments, *padded, *frame])
    assert (scores - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.02  # there is something to see
    assert memory[:64].isnan().all() and memory[-64:].isnan().all()
    assert (tally[:batch] == 0).all() and (tally[batch] == -1).all()
