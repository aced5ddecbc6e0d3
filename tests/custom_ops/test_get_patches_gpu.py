"""The compiled `get_patches` on a GPU: results, streams, graphs, devices, large tensors."""

import pytest
import torch

from aliked import patches
from aliked.model import ALIKED, to_tensor
from aliked.patches import plain_patches
from tests.helpers.compiled_patches import (
    LAYOUTS,
    build,
    random_centres,
    random_maps,
    without_operator,
)
from tests.helpers.textures import texture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="session")
def operator(tmp_path_factory):
    found = build(tmp_path_factory.mktemp("extensions"))
    if "cuda" not in found.DEVICES:
        pytest.skip("no CUDA toolkit to compile get_patches with")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(2, 6, 9, 11), (1, 1, 50, 40), (3, 130, 16, 16)])
def test_patches_are_those_of_the_plain_form(operator, size, layout, shape):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8):
        maps = LAYOUTS[layout](random_maps(dtype, "cuda", shape))
        centres = random_centres(maps, count=301)
        found = operator.get_patches(maps, centres, size)
        assert torch.equal(found, plain_patches(maps, centres, size))
        assert found.is_contiguous()
        assert torch.equal(found, operator.get_patches(maps, centres.int(), size))


def test_windows_far_outside_are_zero(operator):
    values = torch.tensor([-(2**63), -(2**31), 2**31, 2**63 - 1, 2])
    far = torch.cartesian_prod(values, values)[:-1].cuda()  # the last is (2, 2)
    assert not operator.get_patches(torch.ones(1, 2, 5, 5, device="cuda"), far[None], 3).any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 7), (2, 0, 4, 5, 7), (2, 3, 4, 5, 0)])
def test_no_maps_no_channels_and_no_centres_give_no_patches(operator, shape):
    batch, channels, height, width, count = shape
    maps = torch.rand(batch, channels, height, width, device="cuda")
    centres = torch.zeros(batch, count, 2, dtype=torch.int64, device="cuda")
    found = operator.get_patches(maps, centres, 3)
    assert found.shape == (batch, count, channels, 3, 3)
    torch.cuda.synchronize()


def test_a_map_of_more_elements_than_32_bits_can_count(operator):
    side = 27000
    maps = torch.zeros(1, 3, side, side, dtype=torch.uint8, device="cuda")
    centres = torch.tensor([[[side - 1, side - 1], [5, side - 2]]], device="cuda")
    for number, (x, y) in enumerate(centres[0].tolist(), 1):
        maps[0, 2, y, x] = number
    found = operator.get_patches(maps, centres, 3)
    assert found[0, :, 2, 1, 1].tolist() == [1, 2]
    assert found.sum() == 3


def test_patches_of_more_elements_than_32_bits_can_count(operator):
    count = 2**31 // (64 * 9) + 1000
    maps = random_maps(torch.uint8, "cuda", (1, 64, 20, 20))
    centres = random_centres(maps, count)
    found = operator.get_patches(maps, centres, 3)
    for part in (slice(0, 1000), slice(-1000, None)):
        assert torch.equal(found[:, part], plain_patches(maps, centres[:, part], 3))


def test_the_work_is_put_on_the_current_stream(operator):
    maps = torch.zeros(1, 8, 64, 64, device="cuda")
    centres = torch.full((1, 100, 2), 30, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: on another stream it would overtake
        maps.fill_(1)
        found = operator.get_patches(maps, centres, 3)
    stream.synchronize()
    assert (found == 1).all()


def test_a_cuda_graph_records_it(operator):
    maps = random_maps(torch.float32, "cuda")
    centres = random_centres(maps)
    graph = torch.cuda.CUDAGraph()
    operator.get_patches(maps, centres, 3)
    with torch.cuda.graph(graph):
        found = operator.get_patches(maps, centres, 3)
    maps.normal_()
    centres.random_(-3, 12)
    graph.replay()
    assert torch.equal(found, plain_patches(maps, centres, 3))


def test_maps_and_centres_on_two_devices_are_refused(operator):
    maps, centres = torch.rand(1, 2, 8, 8), torch.zeros(1, 3, 2, dtype=torch.int64)
    for arguments in ((maps.cuda(), centres, 3), (maps, centres.cuda(), 3)):
        with pytest.raises(ValueError, match="one device"):
            operator.get_patches(*arguments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_the_device_of_its_arguments(operator):
    maps = random_maps(torch.float32, "cuda:1")
    centres = random_centres(maps)
    with torch.cuda.device(0):
        found = operator.get_patches(maps, centres, 3)
        assert torch.cuda.current_device() == 0
    assert found.device == maps.device
    assert torch.equal(found, plain_patches(maps, centres, 3))


def test_the_gradient_is_that_of_the_plain_form(operator):
    maps = random_maps(torch.float64, "cuda").requires_grad_()
    centres = random_centres(maps)
    found, expected = (
        torch.autograd.grad(form(maps, centres, 3).square().sum(), maps)[0]
        for form in (operator.get_patches, plain_patches)
    )
    torch.testing.assert_close(found, expected)  # float64: sums in another order


def test_the_operator_keeps_the_contract_of_torch_library(operator):
    for layout in ("contiguous", "channels_last"):
        maps = LAYOUTS[layout](random_maps(torch.float32, "cuda")).requires_grad_()
        arguments = (maps, random_centres(maps), 3)
        torch.library.opcheck(torch.ops.aliked.get_patches.default, arguments)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_model_gives_the_same_with_either_form(operator, monkeypatch, precision):
    monkeypatch.setattr(patches, "compiled", lambda: operator)
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=500).eval().fold_batch_norm().set_precision(precision).cuda()
    images = to_tensor(torch.from_numpy(texture(145, 270)[None]).cuda())
    with torch.inference_mode():
        features, score_map = model.dense(images)  # once: convolutions may round differently
        found = model.describe(features, model.detect(score_map))
        with without_operator():
            expected = model.describe(features, model.detect(score_map))
    for rows, expected_rows in zip(found, expected, strict=True):
        torch.testing.assert_close(rows, expected_rows)  # of float32: matrix products may differ
