"""What every runtime takes and returns: arrays of another kind are refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aliked import features as module
from aliked.backends import Spec, create_extractor
from aliked.errors import InputError
from aliked.features import (
    Extractor,
    Features,
    check_features,
    check_image,
    check_images,
    check_memory,
    drop_fill_ins,
)
from aliked.matching import match_mutual
from tests.helpers.small_models import write_small_model

IMAGE = np.full((48, 64, 3), 90, np.uint8)
NO_IMAGES = {
    "a list": (IMAGE.tolist(), "a list"),
    "None": (None, "a NoneType"),
    "text": ("photo.jpg", "a str"),
    "a path": (Path("photo.jpg"), "a PosixPath"),
    "a Pillow image": (Image.fromarray(IMAGE), "a Image"),
    "channels first": (IMAGE.transpose(2, 0, 1), "uint8 [3, 48, 64]"),
    "grey": (IMAGE[..., 0], "uint8 [48, 64]"),
    "four channels": (np.dstack([IMAGE, IMAGE[..., :1]]), "uint8 [48, 64, 4]"),
    "float": (IMAGE.astype(np.float32) / 255, "float32 [48, 64, 3]"),
    "16 bits": (IMAGE.astype(np.uint16), "uint16 [48, 64, 3]"),
    "signed": (IMAGE.astype(np.int8), "int8 [48, 64, 3]"),
    "too small": (IMAGE[:4], "64x4 pixels"),
    "nothing": (IMAGE[:0], "64x0 pixels"),
}


@pytest.fixture(scope="module")
def extractors(tmp_path_factory) -> dict[str, Extractor]:
    """Runtimes on a CPU, of one image or many."""
    path = write_small_model(tmp_path_factory.mktemp("model") / "m.onnx", dynamic=True)
    return {
        "pytorch": create_extractor("pytorch", Spec(top_k=20, device="cpu")),
        "onnxruntime-cpu": create_extractor(
            "onnxruntime-cpu", Spec(model="aliked-t16", top_k=20, model_path=path)
        ),
    }


@pytest.mark.parametrize("kind", NO_IMAGES)
@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime-cpu"])
def test_what_is_no_image_is_refused_by_every_runtime(extractors, backend, kind):
    image, what = NO_IMAGES[kind]
    for call in (check_image, extractors[backend]):
        with pytest.raises(InputError) as error:
            call(image)
        assert f"the image is {what}" in str(error.value)


@pytest.mark.parametrize("kind", NO_IMAGES)
@pytest.mark.parametrize("backend", ["pytorch", "onnxruntime-cpu"])
@pytest.mark.parametrize("method", ["extract_batch", "to_device"])
def test_what_is_no_batch_is_refused_by_every_runtime(extractors, backend, method, kind):
    image, _ = NO_IMAGES[kind]
    batch = image[None] if isinstance(image, np.ndarray) else [image]
    for call in (check_images, getattr(extractors[backend], method)):
        with pytest.raises(InputError, match="the batch is"):
            call(batch)


def test_a_batch_without_images_and_an_image_alone_are_no_batch(extractors):
    for extractor in extractors.values():
        with pytest.raises(InputError, match="the batch has no image"):
            extractor.extract_batch(IMAGE[None][:0])
        with pytest.raises(InputError, match=r"the batch is uint8 \[48, 64, 3\]"):
            extractor.extract_batch(IMAGE)


def features(**changes) -> Features:
    arrays = {
        "keypoints": np.float32([[0, 0], [63, 47]]),
        "scores": np.float32([0.5, 0.4]),
        "descriptors": np.eye(2, 8, dtype=np.float32),
    }
    return Features(**(arrays | changes))


def test_features_of_an_image_are_finite_and_lie_in_it():
    check_features(features(), 48, 64)
    check_features(features(keypoints=np.float32([[-0.9, 0], [63.9, 47]])), 48, 64)
    for field, values in vars(features()).items():
        for number in (np.nan, np.inf, -np.inf):
            damaged = values.copy()
            damaged.flat[0] = number
            with pytest.raises(InputError, match="NaN or infinity"):
                check_features(features(**{field: damaged}), 48, 64)
    for place in ([[-40, 3]], [[3, 1e6]], [[70, 3]]):
        far = np.float32([[1, 1], *place])
        with pytest.raises(InputError, match=r"a keypoint at .* of an image of 64x48 pixels"):
            check_features(features(keypoints=far), 48, 64)


def test_scores_that_are_no_numbers_are_no_fill_ins():
    outputs = np.zeros((3, 2), np.float32), np.zeros((3, 8), np.float32)
    with pytest.raises(InputError, match="scores that are NaN"):
        drop_fill_ins(*outputs, np.float32([0.5, np.nan, 0]))


def test_a_runtime_that_returns_nonsense_is_refused():
    class Broken(Extractor):
        name = "broken"
        extract_batch = staticmethod(lambda images: [features(scores=np.float32([np.nan, 1]))])
        to_device = infer = synchronize = None

    with pytest.raises(InputError, match="NaN or infinity"):
        Broken()(IMAGE)


def test_an_image_that_memory_cannot_hold_is_refused_with_the_size(monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 12 * 2**30)
    check_memory(1200, 1600)
    with pytest.raises(InputError, match=r"12000x9000 pixels needs about 34.2 GiB .* 12.0 GiB"):
        check_memory(9000, 12000)
    monkeypatch.setattr(module, "available_memory", lambda: None)  # where it is not known
    check_memory(9000, 12000)


def test_the_model_asks_for_memory_before_it_starts(extractors, monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 2**10)
    monkeypatch.setattr(module, "SMALL", 0)
    with pytest.raises(InputError, match="64x48 pixels needs about"):
        extractors["pytorch"](IMAGE)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (np.zeros((3, 64), np.float32), np.zeros((3, 128), np.float32), "64 and 128 values"),
        (np.zeros((0, 64), np.float32), np.zeros((3, 128), np.float32), "64 and 128 values"),
        (np.zeros(64, np.float32), np.zeros((3, 64), np.float32), r"float32 \[64\]"),
        (np.zeros((3, 64), np.uint8), np.zeros((3, 64), np.uint8), r"uint8 \[3, 64\]"),
        ([[1.0]], np.zeros((3, 1), np.float32), "are a list"),
        (None, None, "are a NoneType"),
    ],
)
def test_descriptors_that_do_not_go_together_are_refused(first, second, sentence):
    with pytest.raises(InputError, match=sentence):
        match_mutual(first, second)


@pytest.mark.parametrize("similarity", [float("nan"), -2])
def test_a_similarity_that_is_no_cosine_is_refused(similarity):
    descriptors = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="min_similarity is"):
        match_mutual(descriptors, descriptors, similarity)
