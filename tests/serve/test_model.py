"""What the Python model of a repository answers, where no tritonserver is installed.

Of Triton there is only what the model calls: tensors by name, and responses.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from aliked.backends import Spec, create_extractor

ROOT = Path(__file__).resolve().parents[2]
SPEC = {"model": "aliked-t16-homography", "top_k": 50, "device": "cpu"}


@dataclass
class Tensor:
    """A name and an array."""

    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class Response:
    """Tensors, or why there are none."""

    tensors: list[Tensor]
    error: str | None = None


TRITON = SimpleNamespace(
    Tensor=Tensor,
    InferenceResponse=Response,
    TritonError=lambda sentence, code: f"{code}: {sentence}",
    get_input_tensor_by_name=lambda request, name: (
        Tensor(name, request[name]) if name in request else None
    ),
)
TRITON.TritonError.INVALID_ARG, TRITON.TritonError.INTERNAL = "own fault", "server's"


@pytest.fixture(scope="module")
def ask():
    """What the model answers to requests, each its arrays by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", TRITON)
        patch.delitem(sys.modules, "serve.model", raising=False)
        model = importlib.import_module("serve.model").TritonPythonModel()
        patch.delitem(sys.modules, "serve.model")
    spec = SPEC | {"weights": None, "model_path": None}
    settings = {"project": str(ROOT), "role": "extract", "backend": "pytorch", "threads": 2}
    text = {"settings": {"string_value": json.dumps(settings | {"spec": spec})}}
    model.initialize(
        {"model_config": json.dumps({"parameters": text}), "model_instance_kind": "CPU"}
    )
    return model.execute


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """uint8 [H, W, 3] RGB, two of one size and one of another."""
    paths = sorted((ROOT / "assets/sequence_640x480").glob("*.jpg"))[:3]
    sizes = ((160, 120), (160, 120), (128, 96))
    pixels = zip(map(str, paths), sizes, strict=True)
    return [cv2.resize(cv2.imread(path)[..., ::-1], size) for path, size in pixels]


def encoded(*images: np.ndarray | bytes) -> dict:
    """A request of the files of images, [N, 1] bytes."""
    files = [
        i if isinstance(i, bytes) else cv2.imencode(".png", i[..., ::-1])[1].tobytes()
        for i in images
    ]
    return {"image": np.array([[file] for file in files], dtype=object)}


def test_every_request_gets_the_features_of_its_own_images(ask, images):
    extractor = create_extractor("pytorch", Spec(**SPEC))
    expected = [extractor(image).keypoints for image in images]
    answers = ask([encoded(*images[:2]), {"pixels": images[2][None]}, encoded(images[2])])
    found = [answer.tensors[0].array for answer in answers]
    for keypoints, own in zip(found, (expected[:2], expected[2:], expected[2:]), strict=True):
        np.testing.assert_allclose(keypoints, own, atol=1e-2)  # of other batches, so rounded


@pytest.mark.parametrize(
    ("request_of", "sentence"),
    [
        (lambda images: encoded(images[0], b"none"), "the image is truncated, damaged"),
        (lambda images: {"pixels": images[0][None, :3]}, "both sides must be at least 5"),
        (lambda images: {}, "give either image or pixels"),
        (lambda images: encoded(images[0]) | {"pixels": images[0][None]}, "give either image or"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_others_are_not(
    request_of, sentence, ask, images
):
    refused, served = ask([request_of(images), encoded(images[1])])
    assert refused.error.startswith("own fault") and sentence in refused.error
    assert not refused.tensors
    assert served.error is None and len(served.tensors) == 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError("too large")])
def test_images_that_memory_is_short_for_fail_alone(ask, images, monkeypatch, error):
    extractor = ask.__self__._serve.extractor
    extract = extractor.extract_batch

    def short(batch):
        if batch.shape[2] == 160:
            raise error
        return extract(batch)

    monkeypatch.setattr(extractor, "extract_batch", short)
    *failed, served = ask([encoded(images[0]), encoded(images[1]), encoded(images[2])])
    assert all(f"server's: {type(error).__name__}: {error}" == one.error for one in failed)
    assert served.error is None and len(served.tensors) == 3
