"""The fused backend on a GPU against the plain model on the same GPU."""

import numpy as np
import pytest
import torch

from aliked.backends import Spec, create_extractor
from aliked.configs import CONFIGS
from aliked.errors import InputError
from aliked.parity import FP16, FP32, compare_features, judge
from tests.textures import texture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def extractors(weights_dir, model, **options):
    spec = Spec(model=model, weights=weights_dir / f"{model}.pth", device="cuda", **options)
    return create_extractor("fused", spec), create_extractor("pytorch", spec)


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("fp16", FP16)])
def test_features_are_those_of_the_plain_model(weights_dir, model, precision, tolerance):
    fused, plain = extractors(weights_dir, model, precision=precision)
    images = {f"{h}x{w}": texture(h, w) for h, w in [(480, 640), (333, 517), (32, 32), (37, 900)]}
    found = {name: compare_features(plain(image), fused(image)) for name, image in images.items()}
    verdict = judge(found, tolerance)
    assert verdict.passed, verdict.text


@pytest.mark.parametrize("options", [{"top_k": 0, "n_limit": 3000}, {"top_k": 0, "n_limit": 50}])
def test_threshold_mode_keeps_what_the_plain_model_keeps(weights_dir, options):
    fused, plain = extractors(weights_dir, "aliked-n16", **options)
    image = texture(240, 320)
    verdict = judge({"image": compare_features(plain(image), fused(image))}, FP32)
    assert verdict.passed, verdict.text


def test_each_image_of_a_batch_gets_what_it_gets_alone(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-t16")
    images = np.stack([texture(120, 160, seed) for seed in range(5)])
    together = {k: v.clone() for k, v in fused.infer(fused.to_device(images)).items()}
    for i in range(len(images)):
        alone = fused.infer(fused.to_device(images[i : i + 1]))
        for name, values in together.items():
            torch.testing.assert_close(values[i], alone[name][0], atol=1e-5, rtol=0)


def test_a_flat_image_gives_no_more_keypoints_than_asked_for(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-t16", top_k=100)
    features = fused(np.full((200, 300, 3), 128, np.uint8))
    assert len(features) <= 100
    assert np.isfinite(features.descriptors).all()


def test_two_streams_do_not_disturb_each_other(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-t16")
    batches = [fused.to_device(texture(240, 320, seed)[None]) for seed in range(2)]
    expected = [{k: v.clone() for k, v in fused.infer(batch).items()} for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(fused.infer(batch))
        torch.cuda.synchronize()
        for got, want in zip(found, expected, strict=True):
            assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_batch_that_is_not_of_bytes_is_refused(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-t16")
    with pytest.raises(InputError, match="give uint8"):
        fused.infer(torch.full((1, 3, 64, 64), float("nan"), device="cuda"))
