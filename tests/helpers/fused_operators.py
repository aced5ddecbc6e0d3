"""The fused operators against their twins; `test_fused.py` runs this file in its own process."""

import pytest
import torch

from aliked.configs import Selection
from aliked.fused import kernels, trace
from aliked.fused.lightglue import FusedLightGlue
from aliked.lightglue import LightGlue
from tests.helpers.fused_models import random_images, record

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3}  # of the largest value: a few roundings
# On the CPU: test_fused_<file>.py.
IN_CUDA_CPP = {"find_maxima", "select", "refine"}
HALVES_IN_CUDA_CPP = IN_CUDA_CPP | {"block1", "block2", "deform", "deform_level", "score_head"}
HALVES_IN_CUDA_CPP |= {"sample_offsets", "sample_descriptors"}


@pytest.mark.parametrize(
    ("name", "dtype", "size", "selection"),
    [
        ("aliked-t16", torch.float32, (2, 20, 40), Selection(20, 0.2, 0)),
        ("aliked-n16", torch.float16, (1, 32, 32), Selection(-1, 0.5, 40)),
    ],
)
def test_every_operator_gives_the_results_of_its_twin(name, dtype, size, selection):
    images = random_images(*size).to(HERE)
    with torch.inference_mode():
        for call in record(name, selection, images, dtype):
            in_cuda_cpp = HALVES_IN_CUDA_CPP if dtype == torch.float16 else IN_CUDA_CPP
            if call.name in in_cuda_cpp and HERE.type == "cpu":
                continue
            errors = trace.differences(call, kernels)
            assert max(errors) <= TOLERANCE[dtype], (call.name, errors)


def half_precision_matcher(kind: type[LightGlue]) -> LightGlue:
    """Random weights, in which a keypoint is still most similar to itself."""
    torch.manual_seed(0)
    matcher = kind(descriptor_dim=32, dim=128, heads=2, layers=1).eval().requires_grad_(False)
    matcher.input_proj.weight *= 10
    for assignment in matcher.log_assignment:
        assignment.final_proj.weight *= 2
        assignment.matchability.bias += 4
    return matcher.set_precision("fp16").to(HERE)


@pytest.mark.parametrize(("counts", "masked"), [((40, 40), True), ((50, 37), False)])
def test_merged_lightglue_matches_as_lightglue_does(counts, masked):
    """Two pairs: the second image holds keypoints of the first, moved, in another order."""
    torch.manual_seed(1)
    common, first = min(counts), counts[0]
    keypoints0, descriptors0 = torch.rand(2, first, 2) * 400, torch.randn(2, first, 32)
    descriptors0 /= descriptors0.norm(dim=2, keepdim=True)
    order = torch.randperm(first)[:common]
    keypoints1 = keypoints0[:, order] + 3
    descriptors1 = descriptors0[:, order] + 0.02 * torch.randn(2, common, 32)
    masks = []
    if masked:
        keypoints0[0, 31:], descriptors1[0, 31:] = torch.nan, torch.nan
        masks = [torch.arange(count) < torch.tensor([[31], [count]]) for count in counts]
    sizes = [torch.tensor([size] * 2) for size in ((640.0, 480.0), (500.0, 400.0))]
    inputs = [keypoints0, descriptors0, keypoints1, descriptors1, *sizes, *masks]
    inputs = [rows.to(HERE) for rows in inputs]
    with torch.inference_mode():
        expected = half_precision_matcher(LightGlue)(*inputs)
        found = half_precision_matcher(FusedLightGlue)(*inputs)
    assert (expected.matches0 >= 0).sum() >= common
    assert torch.equal(found.matches0, expected.matches0)
    torch.testing.assert_close(found.scores0, expected.scores0, atol=5e-3, rtol=0)
