"""The fused operators against their twins; `test_fused.py` runs this file in its own process."""

import pytest
import torch

from custom_ops.fused import kernels, pipeline, reference, trace
from tests.fused_models import random_images, record

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}  # of the largest value: a few roundings
IN_CUDA_CPP = {"find_maxima"}  # on the CPU: test_fused_maxima.py


@pytest.mark.parametrize(
    ("name", "dtype", "size", "selection"),
    [
        ("aliked-t16", torch.float32, (2, 20, 40), pipeline.Selection(20, 0.2, 0)),
        ("aliked-n16", torch.float16, (1, 32, 32), pipeline.Selection(-1, 0.5, 40)),
    ],
)
def test_every_operator_gives_the_results_of_its_twin(name, dtype, size, selection):
    images = random_images(*size).to(HERE)
    with torch.inference_mode():
        for call in record(name, selection, images, dtype):
            if call.name in IN_CUDA_CPP and HERE.type == "cpu":
                continue
            errors = trace.differences(call, kernels)
            assert max(errors) <= TOLERANCE[dtype], (call.name, errors)


@pytest.mark.parametrize("selection", [(3, False), (40, False), (0, True)])
def test_selection_of_equal_scores_prefers_the_first_in_the_image(selection):
    k, by_threshold = selection
    scores = torch.full((1, 12, 14), 0.25, device=HERE)  # flat: every pixel is a maximum
    keys, tally = reference.find_maxima(scores)
    keys = keys[:, torch.randperm(keys.shape[1])].contiguous()
    k = k or keys.shape[1]
    means = scores.mean(dim=(1, 2)) - 0.01 if by_threshold else None
    chosen = kernels.select(keys, tally, means, k, 0.9)
    keypoints, _, nms_scores, _ = kernels.refine(chosen, tally, scores, k)
    inside = torch.cartesian_prod(torch.arange(2, 10), torch.arange(2, 12)).flip(1)
    assert torch.equal(keypoints[0].round().long().cpu(), inside[:k])
    assert (nms_scores == 0.25).all()
