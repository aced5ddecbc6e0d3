"""The fused backend on a GPU against the plain model on the same GPU."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from aliked.backends import Spec, create_extractor
from aliked.configs import OFFICIAL, Selection
from aliked.errors import InputError
from aliked.features import drop_fill_ins
from aliked.fused import kernels, maxima, pipeline, reference, weights
from aliked.fused.trace import sorted_keys
from aliked.images import decode_image
from aliked.lanes import FusedLane
from aliked.model import plain_float32, to_tensor
from aliked.parity import FP16, FP32, compare_features, judge
from tests.helpers.fused_models import random_images, random_model
from tests.helpers.textures import texture

ROOT = Path(__file__).resolve().parents[2]
# Limits of check_goldens.py, whose own are for float32. In half precision a keypoint may move to a
# neighbouring maximum and take its descriptor along, so nothing is asked of the worst pair, and a
# score near the threshold of 0.2 may fall on its other side.
HALF = {
    "min-matched-fine": 0.9,
    "min-matched": 0.97,
    "max-dxy": 0.1,
    "max-median-dxy": 5e-3,
    "min-cos": -1,
    "min-mean-cos": 0.9995,
    "min-cos-edge": -1,
    "max-dscore": 0.05,
    "max-dcount": 0.015,
}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def extractors(weights_dir, model, **options):
    spec = Spec(model=model, weights=weights_dir / f"{model}.pth", device="cuda", **options)
    return create_extractor("fused", spec), create_extractor("pytorch", spec)


@pytest.mark.parametrize("model", OFFICIAL)
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


def test_threads_may_meet_new_sizes_at_the_same_time(weights_dir):
    """While one captures a graph, CUDA refuses much to others."""
    spec = Spec(model="aliked-t16", weights=weights_dir / "aliked-t16.pth", precision="fp16")
    lanes = [FusedLane(create_extractor("fused", spec)) for _ in range(3)]
    together = threading.Barrier(len(lanes))

    def extract(lane: FusedLane) -> list[np.ndarray]:
        found = []
        for side in range(64, 224, 32):
            together.wait()
            found.append(lane.extract(texture(side, side)[None])[0].keypoints)
        return found

    with ThreadPoolExecutor(len(lanes)) as pool:
        first, *others = pool.map(extract, lanes)
    for found in others:
        for one, another in zip(first, found, strict=True):
            np.testing.assert_array_equal(one, another)


def test_a_batch_of_64_is_64_images(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-n16rot", precision="fp16", top_k=500)
    images = np.stack([texture(96, 128, seed) for seed in range(64)])
    together = fused.extract_batch(images)
    found = {str(i): compare_features(fused(images[i]), together[i]) for i in range(64)}
    verdict = judge(found, FP16)  # a batch is cut into other tiles, which round otherwise
    assert verdict.passed, verdict.text


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("fp16", FP16)])
def test_a_photograph_of_12_megapixels(weights_dir, precision, tolerance):
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("the plain model needs 40 GB of GPU memory for it")
    fused, plain = extractors(weights_dir, "aliked-t16", precision=precision)
    image = texture(3072, 4096)
    verdict = judge({"image": compare_features(plain(image), fused(image))}, tolerance)
    assert verdict.passed, verdict.text


@pytest.mark.parametrize("size", [(64, 96), (101, 67)])
@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n32"])
def test_every_maximum_of_a_random_network_is_found(name, size):
    selection = Selection(size[0] * size[1], 0.2, 0)  # more than there are
    model, images = random_model(name, selection).cuda(), random_images(2, *size).cuda()
    with torch.inference_mode(), plain_float32():
        expected = model(to_tensor(images))
        packed = weights.pack(model, torch.float32, images.device)
        found = pipeline.extract(images, packed, selection, kernels)
    for i in range(len(images)):
        plain, fused = (
            drop_fill_ins(*(rows[i].cpu().numpy() for rows in output[:3]))
            for output in (expected, found)
        )
        assert len(plain) > 50
        verdict = judge({"image": compare_features(plain, fused)}, FP32)
        assert verdict.passed, verdict.text


def test_a_flat_image_gives_no_more_keypoints_than_asked_for(weights_dir):
    fused, _ = extractors(weights_dir, "aliked-t16", top_k=100)
    features = fused(np.full((200, 300, 3), 128, np.uint8))
    assert len(features) <= 100
    assert np.isfinite(features.descriptors).all()


def test_a_maximum_in_the_last_row_and_column_of_a_large_image_is_found():
    """The last that may be one: a border of 2 is dropped."""
    scores = torch.rand(1, 3072, 4096, generator=torch.Generator().manual_seed(0)) / 2
    places = [(3069, 4093), (3069, 2), (2, 4093)]
    for rank, (row, column) in enumerate(places):
        scores[0, row, column] = 1 - rank / 10
    tallies = [torch.zeros(1, maxima.TALLY, dtype=torch.int32) for _ in range(2)]
    expected = reference.find_maxima(scores, tallies[0])
    tally = tallies[1].cuda()
    found = kernels.find_maxima(scores.cuda(), tally)
    keys = sorted_keys(found, tally[:, maxima.BINS, None], found.shape[1]).cpu()
    assert torch.equal(keys, expected) and torch.equal(tally.cpu(), tallies[0])
    indices = reference.INDEX_MASK - (keys[0, :3] & reference.INDEX_MASK)
    assert [divmod(int(index), 4096) for index in indices] == places


def test_a_large_image_has_the_features_of_the_plain_model(weights_dir):
    fused, plain = extractors(weights_dir, "aliked-n16rot", top_k=4096)
    image = texture(3072, 4096)
    verdict = judge({"large": compare_features(plain(image), fused(image))}, FP32)
    assert verdict.passed, verdict.text


def test_the_lane_of_a_run_over_many_images_gives_what_the_extractor_gives(weights_dir):
    from aliked.lanes import FusedLane

    fused, _ = extractors(weights_dir, "aliked-n16rot", precision="fp16")
    images = np.stack([texture(240, 320, seed) for seed in range(3)] + [texture(240, 320) * 0])
    lane = FusedLane(fused)
    pixels = lane.buffer(images.shape)
    pixels[:] = images
    for found, expected in zip(lane.extract(pixels), fused.extract_batch(images), strict=True):
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), values)


def test_jpegs_that_the_gpu_decodes_give_nearly_the_same_pixels(weights_dir):
    """Also in memory that was used before, of another size, and what its engine does not take."""
    pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    from aliked.lanes import DecodingLane

    def encoded(image, *options):
        quality = [cv2.IMWRITE_JPEG_QUALITY, 95]
        return cv2.imencode(".jpg", image[..., ::-1], [*quality, *options])[1].tobytes()

    fused, _ = extractors(weights_dir, "aliked-n16rot", precision="fp16")
    lane = DecodingLane(fused, threads=2)
    for height, width in ((240, 320), (480, 640), (240, 320)):
        images = [texture(height, width, seed) for seed in range(3)]
        files = [encoded(image) for image in images]
        files[1] = encoded(images[1], cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
        shape = images[0].shape
        shapes = [shape] * 4 + [(5, 5, 3)]
        *good, cut, other = lane.decode([*files, files[0][:-100], files[0]], shapes)
        assert cut is None and other is None
        stacked = lane.stack([(image, 0) for image in good]).cpu().numpy()
        for found, file in zip(stacked, files, strict=True):
            expected = decode_image(np.frombuffer(file, np.uint8), "a.jpg").astype(int)
            assert np.abs(found - expected).mean() < 2
    assert lane.stack([(good[0], 1)]).shape == (1, 320, 240, 3)


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
    with pytest.raises(InputError, match="give uint8"):
        fused.extract_batch(np.zeros((1, 64, 64, 3), np.uint16))


@pytest.mark.parametrize("model", OFFICIAL)
@pytest.mark.parametrize(("precision", "limits"), [("fp32", {}), ("fp16", HALF)])
def test_every_golden_output_is_reproduced(shared, weights_dir, model, precision, limits):
    """The official implementation's, made on a CPU: five images, top-k and threshold mode."""
    command = [sys.executable, shared / "goldens" / "check_goldens.py", "--only", f"{model}__"]
    command += ["--adapter", "goldens_adapter:extract_fused", "--weights", weights_dir]
    command += [f"--{name}={value}" for name, value in limits.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ALIKED_TEST_PRECISION": precision}
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "helpers", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("PASS") >= 10
