"""The fused operators against their twins; `test_fused.py` runs this file in its own process."""

import pytest
import torch

from aliked.configs import Selection
from aliked.fused import kernels, trace
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
