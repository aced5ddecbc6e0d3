"""The fused extractor's operators and pipeline against the plain model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aliked.backends import Spec, create_extractor
from aliked.configs import Selection
from aliked.errors import InputError
from aliked.fused import kernels, pipeline, reference, trace, weights
from aliked.model import Output, to_tensor
from tests.helpers.fused_models import random_images, random_model, record


@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n32"])
@pytest.mark.parametrize(
    ("selection", "size"),
    [
        (Selection(30, 0.2, 0), (2, 45, 70)),
        (Selection(5000, 0.2, 0), (1, 33, 40)),  # more than there are: fill-ins
        (Selection(-1, 0.5, 2000), (2, 64, 64)),
        (Selection(-1, 0.5, 7), (1, 64, 40)),  # more pass than the limit
        (Selection(-1, 1.0, 2000), (1, 40, 40)),  # none passes
        (Selection(10, 0.2, 0), (1, 5, 7)),
    ],
)
def test_the_pipeline_finds_and_describes_what_the_plain_model_does(name, selection, size):
    model, images = random_model(name, selection), random_images(*size)
    with torch.inference_mode():
        expected = model(to_tensor(images))
        packed = weights.pack(model, torch.float32, images.device)
        got = pipeline.extract(images, packed, selection, reference)
    real = expected.nms_scores > 0  # fill-ins are any pixels
    assert torch.equal(got.nms_scores > 0, real)
    for field in Output._fields:
        values = [getattr(output, field)[real] for output in (got, expected)]
        torch.testing.assert_close(*values, atol=1e-4, rtol=0)  # sums in another order


def test_fake_implementations_have_the_shapes_and_types_of_the_results():
    images = random_images(1, 33, 40)
    for call in record("aliked-t16", Selection(20, 0.2, 0), images, torch.float16):
        with FakeTensorMode() as mode:
            arguments = [
                mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in call.arguments
            ]
            fakes = trace.as_tuple(getattr(kernels, call.name)(*arguments))
        for fake, real in zip(fakes, call.outputs, strict=True):
            assert fake.dtype == real.dtype
            if call.name != "select":  # the twin keeps no more than k
                assert fake.shape == real.shape


def test_every_operator_gives_the_results_of_its_twin():
    """On the GPU, or interpreted on the CPU: Triton must be told so before it is imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/helpers/fused_operators.py",
        ],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | interpret,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


PROBE = """
import sys
import torch
from aliked.fused.common import operator

@operator(lambda x, tally: torch.empty_like(x), mutates=("tally",))
def probe(x: torch.Tensor, tally: torch.Tensor) -> torch.Tensor:
    tally += 1
    return 2 * x

x, tally = torch.ones(3), torch.zeros(1)
assert torch.equal(probe(x, tally), 2 * x) and tally == 1
assert "torch._dynamo" not in sys.modules
tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
torch.library.opcheck(torch.ops.aliked.probe.default, (x, tally), test_utils=tests)
compiled = torch.compile(lambda *args: probe(*args) + 1, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(x, tally), 2 * x + 1) and tally == 2
"""


def test_an_operator_can_be_compiled_and_runs_without_the_compiler():
    """Which takes seconds to import, in every process that extracts."""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_the_backend_says_so():
    with pytest.raises(InputError, match="no CUDA device"):
        create_extractor("fused", Spec())
