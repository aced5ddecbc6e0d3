"""What goes to a device and comes back is the same, and nobody else writes to it."""

import numpy as np
import pytest
import torch

from aliked.backends import Spec, create_extractor
from aliked.errors import InputError
from aliked.features import drop_fill_ins
from aliked.transfer import download, upload
from tests.textures import texture

NAMES = ("keypoints", "scores", "descriptors")


def test_features_share_no_memory_with_the_outputs():
    keypoints, scores = np.zeros((3, 2), np.float32), np.array([0.5, 0, 0.2], np.float32)
    outputs = keypoints, np.arange(12, dtype=np.float32).reshape(3, 4), scores
    features = drop_fill_ins(*outputs)
    for values in outputs:
        values[:] = 7
    np.testing.assert_array_equal(features.descriptors, [[0, 1, 2, 3], [8, 9, 10, 11]])
    np.testing.assert_array_equal(features.scores, np.array([0.5, 0.2], np.float32))


def test_a_view_of_an_image_is_uploaded_in_its_own_order():
    image = texture(20, 30)[None, ::2, ::-1]
    np.testing.assert_array_equal(upload(image, torch.device("cpu")).numpy(), image)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, bool])
def test_anything_but_bytes_is_refused(dtype):
    with pytest.raises(InputError, match="give uint8"):
        upload(np.zeros((1, 8, 8, 3), dtype), torch.device("cpu"))


@pytest.mark.gpu
def test_a_cuda_device_gets_and_gives_back_the_same_bytes():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images = [texture(480, 640, seed)[None] for seed in range(20)]
    # More uploads than page-locked blocks, none waited for.
    on_device = [upload(image, torch.device("cuda")) for image in images]
    for image, array in zip(images, download(on_device), strict=True):
        np.testing.assert_array_equal(array, image)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pytorch", "pytorch-cudagraph", "fused"])
def test_features_stay_as_they_were_when_more_are_extracted(backend, weights_dir):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    extract = create_extractor(backend, Spec("aliked-t16", weights=weights_dir, device="cuda"))
    images = [texture(240, 320, seed) for seed in range(4)]
    alone = [[getattr(extract(image), name).copy() for name in NAMES] for image in images]
    kept = [extract(image) for image in images]
    for features, expected in zip(kept, alone, strict=True):
        for name, values in zip(NAMES, expected, strict=True):
            np.testing.assert_allclose(getattr(features, name), values, atol=1e-5)
