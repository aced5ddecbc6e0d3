"""On a CUDA device the model is what it is on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aliked.backends import Spec, create_extractor
from aliked.images import list_images, load_image
from aliked.model import ALIKED
from aliked.parity import FP16, FP32, compare_features, judge

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n16rot"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("fp16", FP16)])
def test_features_on_cuda_are_those_of_the_cpu_in_float32(name, precision, tolerance, weights_dir):
    reference = ALIKED.from_pretrained(name, top_k=1000, weights=weights_dir)
    on_cuda = ALIKED.from_pretrained(
        name, top_k=1000, weights=weights_dir, device="cuda", precision=precision
    )
    parities = {}
    for path in list_images("assets/sequence_1241x376")[::4]:
        image = load_image(path)
        parities[path.name] = compare_features(reference(image), on_cuda(image))
    verdict = judge(parities, tolerance)
    assert verdict.passed, verdict.text


def test_forward_does_not_wait_for_the_device(weights_dir):
    model = ALIKED.from_pretrained("aliked-t16", top_k=500, weights=weights_dir, device="cuda")
    images = torch.rand(2, 3, 120, 160, device="cuda")
    with torch.inference_mode():
        model(images)
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = model(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(output.descriptors.cpu().numpy()).all()


@pytest.mark.parametrize("backend", ["pytorch", "pytorch-cudagraph", "pytorch-compile"])
def test_what_runs_beside_the_default_stream_is_still_the_model(backend, weights_dir):
    """A kernel that is launched on the default stream would be missing from a CUDA graph."""
    images = [load_image(path) for path in list_images("assets/sequence_640x480")[::6]]
    reference = ALIKED.from_pretrained("aliked-t16", top_k=500, weights=weights_dir)
    spec = Spec("aliked-t16", top_k=500, weights=weights_dir, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        extract = create_extractor(backend, spec)
        extract(images[0])
        found = [extract(image) for image in images]
    pairs = enumerate(zip(images, found, strict=True))
    parities = {str(i): compare_features(reference(image), f) for i, (image, f) in pairs}
    verdict = judge(parities, FP32)
    assert verdict.passed, verdict.text


def test_every_golden_output_is_reproduced_on_cuda(shared, weights_dir):
    """The same limits as on the CPU; the official outputs were made on a CPU."""
    command = [sys.executable, shared / "goldens" / "check_goldens.py"]
    command += ["--adapter", "goldens_adapter:extract", "--weights", weights_dir]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ALIKED_TEST_DEVICE": "cuda"}
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "helpers", env=environment, capture_output=True, text=True
    )
    assert "41 of 41 goldens pass" in done.stdout, done.stdout + done.stderr
