"""The model's own corners: what no golden output covers. Random weights serve most of them."""

import numpy as np
import pytest
import torch
from torchvision.ops import deform_conv2d

from aliked.backbone import DeformableConv2d, off_default_stream, sampled_deform_conv2d
from aliked.configs import CONFIGS, MAX_TOP_K, Form
from aliked.descriptors import SDDH
from aliked.detection import detect, select_top_k
from aliked.errors import InputError
from aliked.model import ALIKED, Output, pad_to_stride, plain_float32
from aliked.patches import get_patches
from tests.helpers.textures import texture


def random_model(name="aliked-t16", **selection):
    torch.manual_seed(0)
    return ALIKED(name, **selection).eval()


def tensor(*images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def spikes(height, width, points):
    """A score map that is 0.01 everywhere and has the given value at each (x, y)."""
    score_map = torch.full((1, 1, height, width), 0.01)
    for (x, y), value in points.items():
        score_map[0, 0, y, x] = value
    return score_map


@pytest.mark.parametrize("size", [(64, 96), (333 // 4, 517 // 4), (5, 5), (40, 33)])
def test_any_image_size_gives_finite_unit_descriptors_inside_the_image(size):
    height, width = size
    with torch.inference_mode():
        output = random_model(top_k=20)(tensor(texture(height, width)))
    assert output.keypoints.shape == (1, min(20, (height - 4) * (width - 4)), 2)
    assert (output.keypoints >= 0).all()
    assert (output.keypoints <= torch.tensor([width - 1, height - 1])).all()
    lengths = output.descriptors.norm(dim=2)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)  # float32 rounding


@pytest.mark.parametrize("selection", [{"top_k": 30}, {"scores_th": 0.503, "n_limit": 40}])
def test_each_image_of_a_batch_gets_what_it_gets_alone(selection):
    model = random_model(**selection)
    # Only in the last do scores pass the threshold: the others go by a mean of their own each.
    images = tensor(texture(64, 80, 1), texture(64, 80, 3) // 8, texture(64, 80, 2))
    with torch.inference_mode():
        together = model(images)
        for i in range(len(images)):
            alone = model(images[i : i + 1])
            for name in Output._fields:
                # Blocked sums differ with the batch size in the last bits only.
                torch.testing.assert_close(
                    getattr(together, name)[i], getattr(alone, name)[0], atol=2e-5, rtol=0
                )


def test_padding_replicates_the_border_with_the_smaller_half_first():
    image = torch.rand(1, 3, 376, 1241)
    padded, top, left = pad_to_stride(image)
    assert padded.shape[-2:] == (384, 1248)
    assert (top, left) == (4, 3)
    assert torch.equal(padded[..., 4:380, 3:1244], image)
    assert torch.equal(padded[..., 0, 3:1244], image[..., 0, :])
    assert torch.equal(padded[..., 4:380, -1], image[..., -1])


def test_folding_batch_norm_changes_nothing_but_rounding():
    model = random_model(top_k=20)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    images = tensor(texture(64, 64))
    with torch.inference_mode():
        features, scores = model.dense(images)
        folded_features, folded_scores = model.fold_batch_norm().dense(images)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(folded_features, features, atol=2e-5, rtol=0)
    torch.testing.assert_close(folded_scores, scores, atol=2e-5, rtol=0)


def test_fill_ins_have_score_zero_and_are_dropped_from_features():
    model = random_model(top_k=2000)
    image = texture(48, 64)
    with torch.inference_mode():
        output = model(tensor(image))
    filled = output.nms_scores[0] == 0
    assert filled.any()
    assert not filled.all()
    assert (output.scores[0][filled] == 0).all()
    assert (output.scores[0][~filled] > 0).all()
    assert len(model(image)) == (~filled).sum()


def test_top_k_larger_than_the_image_gives_fewer_rows():
    with torch.inference_mode():
        output = random_model(top_k=10**6)(tensor(texture(20, 24)))
    assert output.scores.shape == (1, 16 * 20)


def test_top_k_comes_in_descending_order_of_the_score_at_the_maximum():
    found = detect(spikes(20, 20, {(5, 5): 0.3, (12, 5): 0.9, (5, 12): 0.6}), 3, 0.0, 0, Form())
    torch.testing.assert_close(found.nms_scores, torch.tensor([[0.9, 0.6, 0.3]]))


def test_threshold_mode_goes_row_by_row():
    score_map = spikes(20, 20, {(12, 5): 0.6, (5, 5): 0.3, (3, 12): 0.9, (15, 15): 0.1})
    found = detect(score_map, -1, 0.2, 10, Form())
    torch.testing.assert_close(found.nms_scores[0, :4], torch.tensor([0.3, 0.6, 0.9, 0.0]))


def test_threshold_mode_over_its_limit_keeps_the_best_in_descending_order():
    score_map = spikes(20, 20, {(12, 5): 0.6, (5, 5): 0.3, (3, 12): 0.9, (15, 15): 0.8})
    found = detect(score_map, -1, 0.2, 3, Form())
    torch.testing.assert_close(found.nms_scores, torch.tensor([[0.9, 0.8, 0.6]]))


def test_threshold_mode_in_an_exported_form_is_in_descending_order():
    score_map = spikes(20, 20, {(12, 5): 0.6, (5, 5): 0.3, (3, 12): 0.9})
    found = detect(score_map, -1, 0.2, 4, Form(exported=True))
    torch.testing.assert_close(found.nms_scores, torch.tensor([[0.9, 0.6, 0.3, 0.0]]))


def test_more_keypoints_than_one_selection_round_gives_are_still_the_best():
    torch.manual_seed(0)
    scores = torch.rand(2, 9000).round(decimals=3)  # with many ties
    values, indices = select_top_k(scores, 2 * MAX_TOP_K + 100)
    expected = scores.topk(2 * MAX_TOP_K + 100, dim=1).values
    assert torch.equal(values, expected)
    assert torch.equal(scores.gather(1, indices), expected)
    assert all(len(row.unique()) == len(row) for row in indices)


def test_threshold_falls_back_to_the_mean_score_for_each_image_alone():
    strong = spikes(20, 20, {(5, 5): 0.9})
    weak = spikes(20, 20, {(5, 5): 0.1, (12, 12): 0.15})
    found = detect(torch.cat((strong, weak)), -1, 0.2, 10, Form())
    assert (found.nms_scores > 0).sum(dim=1).tolist() == [1, 2]


def test_a_strict_threshold_that_nothing_passes_gives_no_keypoint():
    weak = spikes(20, 20, {(5, 5): 0.1, (12, 12): 0.15})
    for form in (Form(), Form(exported=True)):
        found = detect(weak, -1, 0.2, 10, form, strict=True)
        assert (found.nms_scores == 0).all()
        assert (found.scores == 0).all()
    lowest = detect(weak, -1, 0.0, 10, Form(), strict=True)  # every maximum is above 0
    assert (lowest.nms_scores > 0.09).sum() == 2


def test_features_follow_the_threshold_or_where_asked_for_the_official_rule():
    image = texture(48, 64)
    official = random_model(scores_th=1.0, n_limit=40, top_k=0, strict=False)
    assert len(official(image)) == 40
    assert len(random_model(scores_th=1.0, n_limit=40, top_k=0)(image)) == 0


def test_keypoints_of_the_outer_two_pixels_are_dropped():
    found = detect(spikes(20, 20, {(1, 9): 0.9, (18, 3): 0.9, (2, 14): 0.8}), 1, 0.0, 0, Form())
    torch.testing.assert_close(found.nms_scores, torch.tensor([[0.8]]))


def test_refinement_is_the_soft_argmax_of_the_window():
    score_map = spikes(11, 11, {(5, 5): 0.9, (6, 5): 0.8})
    found = detect(score_map, 1, 0.0, 0, Form())
    window = score_map[0, 0, 3:8, 3:8].double()
    weights = (window / 0.1).exp() / (window / 0.1).exp().sum()
    steps = torch.arange(-2, 3).double()
    x = 5 + (weights.sum(dim=0) * steps).sum()
    y = 5 + (weights.sum(dim=1) * steps).sum()
    expected = torch.stack((x, y)).float()
    torch.testing.assert_close(found.keypoints[0, 0], expected, atol=1e-6, rtol=0)
    distance2 = ((steps - (x - 5)) ** 2)[None] + ((steps - (y - 5)) ** 2)[:, None]
    expected = (weights * distance2 / 4).sum().float()
    torch.testing.assert_close(found.dispersity[0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_patches_are_zero_padded_at_every_border(size):
    maps = torch.rand(2, 3, 6, 7)
    centres = torch.cartesian_prod(torch.arange(7), torch.arange(6)).repeat(2, 1, 1)
    before, after = (size - 1) // 2, size // 2
    padded = torch.nn.functional.pad(maps, (before, after, before, after))
    for (x, y), patch in zip(centres[1], get_patches(maps, centres, size)[1], strict=True):
        assert torch.equal(patch, padded[1, :, y : y + size, x : x + size])


def test_a_keypoint_in_a_border_column_is_described_from_a_zero_padded_patch():
    torch.manual_seed(0)
    head = SDDH(dim=8, kernel_size=3, num_positions=4).eval()
    features = torch.randn(1, 8, 12, 12)
    framed = torch.nn.functional.pad(features, (4, 4, 4, 4))
    keypoints = torch.tensor([[[0.0, 5.0], [11.0, 0.0], [10.0, 11.0]]])
    with torch.inference_mode():
        offsets = head.sample_offsets(features, keypoints)
        limit = 12 / 4
        expected = head.sample_offsets(framed, keypoints + 4).clamp(-limit, limit)
    torch.testing.assert_close(offsets, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_keeps_coordinates_and_outputs_in_float32(name):
    model = random_model(name, top_k=10).fold_batch_norm().set_precision("fp16")
    with torch.inference_mode():
        output = model(tensor(texture(32, 32)))
    assert {rows.dtype for rows in output} == {torch.float32}
    assert all(rows.isfinite().all() for rows in output)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), "give uint8"),
        (np.zeros((8, 8, 3), np.float32), "give uint8"),
        (np.zeros((1, 1, 3), np.uint8), "at least 5"),
    ],
)
def test_an_unusable_image_is_refused_with_the_reason(image, words):
    with pytest.raises(InputError, match=words):
        random_model(top_k=5)(image)


def test_a_tensor_means_what_its_type_means_everywhere():
    image, model = texture(40, 48), random_model(top_k=20)
    with torch.inference_mode():
        expected = model(tensor(image))
        bytes_ = torch.from_numpy(image).permute(2, 0, 1)[None]
        for images in (bytes_, tensor(image).double()):
            for found, rows in zip(model(images), expected, strict=True):
                torch.testing.assert_close(found, rows)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), r"int64 \[1, 3, 8, 8\]; give float RGB"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.bool), "are bool"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "are complex64"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), "give float RGB"),
        (torch.zeros(3, 8, 8), r"float32 \[3, 8, 8\]"),
        (torch.zeros(1, 4, 8, 8), r"\[1, 4, 8, 8\]"),
        (torch.zeros(1, 8, 8, 3), r"\[1, 8, 8, 3\]"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"uint8 \[1, 8, 8, 3\]"),
        (torch.zeros(0, 3, 8, 8), "0 images"),
        (torch.zeros(1, 3, 4, 8), "8x4 pixels"),
        (torch.full((1, 3, 8, 8), 255.0), "values from 255 to 255"),
        (torch.full((1, 3, 8, 8), -2.0), "values from -2"),
        (torch.tensor([0.5, torch.nan]).repeat(1, 3, 8, 4), "values from nan"),
        (torch.full((1, 3, 8, 8), torch.inf), "to inf"),
        (torch.zeros(1, 3, 8, 8, device="meta"), "are on meta and the model on cpu"),
        ([[1, 2], [3, 4]], "are a list"),
        (None, "are a NoneType"),
        ("photo.jpg", "are a str"),
    ],
)
def test_a_tensor_of_the_wrong_kind_is_refused_with_the_reason(images, words):
    with pytest.raises(InputError, match=words):
        random_model(top_k=5)(images)


def test_what_is_compiled_is_not_checked():
    """A check of values would break the graph."""
    compiled = torch.compile(random_model(top_k=5).forward, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert compiled(torch.full((1, 3, 32, 32), 2.0)).scores.shape == (1, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_coordinates_in_float32(dtype):
    model = random_model(top_k=200)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        output = model(tensor(texture(64, 2304)))
    assert {rows.dtype for rows in output} == {torch.float32}
    far = output.keypoints[0, output.keypoints[0, :, 0] > 2048, 0]
    assert len(far) > 5
    assert (far != far.round()).any()


def test_a_pixel_that_is_not_a_number_does_not_end_the_process():
    images = tensor(texture(64, 64))
    images[0, 1, 20, 20] = torch.nan
    with torch.inference_mode():
        assert random_model(top_k=5).forward(images).scores.shape == (1, 5)  # as on a GPU


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(InputError, match="aliked-n16rot"):
        ALIKED("aliked-n17")


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (15, 20)])
def test_the_deformable_convolution_for_cuda_is_that_of_torchvision(size):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 4, *size), torch.randn(6, 4, 3, 3), torch.randn(6)
    offsets = torch.randn(2, 18, *size) * 3  # many samples lie outside
    expected = deform_conv2d(x, offsets, weight, bias, padding=1)
    found = sampled_deform_conv2d(x, offsets, weight, bias)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)  # rounding of sums of 36 terms


def test_without_gradients_the_deformable_convolution_is_the_same():
    """It takes torchvision's library then, and not its function."""
    torch.manual_seed(0)
    layer, x = DeformableConv2d(4, 6), 9 * torch.randn(2, 4, 9, 7)
    expected = layer(x)
    expected.sum().backward()
    assert layer.regular_conv.weight.grad.any()
    for bias in (None, torch.nn.Parameter(torch.ones(6))):
        layer.regular_conv.bias = bias
        with torch.no_grad():
            found = layer(x)
        assert torch.equal(found, layer(x))
        assert bias is not None or torch.equal(found, expected)


class Asked(torch.nn.Module):
    """Answers `off_default_stream` by what it returns."""

    def forward(self, x):
        return x + 1 if off_default_stream(x.device) else x


@pytest.mark.parametrize(
    "traced",
    [
        lambda model, x: torch.jit.trace(model, x, check_trace=False),
        lambda model, x: torch.export.export(model, (x,)).module(),
        lambda model, x: torch.compile(model, backend="eager"),
    ],
)
def test_what_is_traced_never_holds_the_operator_of_the_default_stream(traced):
    x = torch.zeros(3)
    assert traced(Asked(), x)(x).eq(1).all()


@pytest.mark.gpu
def test_eager_maps_are_the_same_on_every_stream(weights_dir):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = ALIKED.from_pretrained("aliked-t16", top_k=100, weights=weights_dir / "aliked-t16.pth")
    images = torch.rand(1, 3, 96, 128)
    with torch.inference_mode(), plain_float32():
        expected = model.dense(images)
        model, images = model.cuda(), images.cuda()
        torch.cuda.synchronize()
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)  # cycles: a kernel on another stream would overtake
                found = model.dense(images.flip(3).flip(3))
            stream.synchronize()
            for maps, on_cpu in zip(found, expected, strict=True):
                torch.testing.assert_close(maps.cpu(), on_cpu, atol=1e-4, rtol=0)
