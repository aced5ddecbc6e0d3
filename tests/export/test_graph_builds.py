"""TensorRT for RTX builds what is exported, and the forms made for it select the same pixels."""

import pytest
import torch

from aliked.backends.tensorrt_library import RTX, tf32_settled
from aliked.configs import Form
from aliked.detection import detect, inner, suppress_non_maxima, top_k_of_groups
from aliked.errors import InputError
from aliked.export.builder import BuildOptions, build_plan
from aliked.export.onnx_export import ExportOptions, export_onnx
from aliked.model import ALIKED
from tools.build_grid import build, shapes

EXPORTED = Form(exported=True)


def plateaus(height, width):
    """Blocks of equal scores, 1 to 4 pixels wide, that touch each other and the borders."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 1, -(-height // 2), -(-width // 3)).round(decimals=1)
    return coarse.repeat_interleave(2, 2).repeat_interleave(3, 3)[..., :height, :width]


def noise(height, width):
    torch.manual_seed(1)
    return torch.rand(2, 1, height, width)


def flat(height, width):
    return torch.full((1, 1, height, width), 0.25)


def ramp(height, width):
    """Every pixel but one is suppressed by a neighbour, so that all rounds have work."""
    return torch.arange(1.0, 1 + height * width).reshape(1, 1, height, width) / (height * width)


def border(height, width):
    """The best scores where none may be found; they suppress what is near."""
    scores = noise(height, width) / 2
    scores[..., 0] = scores[..., -1] = 1
    return scores


MAPS = [plateaus, noise, flat, ramp, border, lambda h, w: torch.zeros(1, 1, h, w)]


@pytest.mark.parametrize("scores", MAPS)
@pytest.mark.parametrize("size", [(5, 5), (5, 64), (6, 7), (33, 50), (120, 161)])
def test_suppression_by_slices_and_products_is_that_by_pooling(scores, size):
    maps = scores(*size)
    assert torch.equal(suppress_non_maxima(maps, exported=True), suppress_non_maxima(maps))


@pytest.mark.parametrize("scores", MAPS)
@pytest.mark.parametrize("k", [1, 100, 2500])
def test_the_best_of_groups_are_the_best_of_all(scores, k):
    values = inner(suppress_non_maxima(scores(150, 203)))
    best, index = top_k_of_groups(values, k, 1)
    assert torch.equal(best, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, index), best)
    assert all(len(row.unique()) == k for row in index)  # torch.topk promises no order of equals


@pytest.mark.parametrize("size", [(5, 5), (9, 12), (70, 90)])
def test_more_rows_than_maxima_are_fill_ins(size):
    count = (size[0] - 4) * (size[1] - 4)
    plain, exported = (detect(noise(*size), count, 0.0, 0, f) for f in (Form(), EXPORTED))
    assert torch.equal(exported.nms_scores, plain.nms_scores)
    assert (exported.scores[exported.nms_scores == 0] == 0).all()
    kept = plain.nms_scores > 0
    torch.testing.assert_close(exported.keypoints[kept], plain.keypoints[kept])


def export(precision, path, **changes):
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=300).eval().fold_batch_norm().set_precision(precision)
    export_onnx(model, path, ExportOptions(96, 128, deform_conv="gridsample", **changes))


def outcome_of(path, capabilities=(), dynamic=False, uint8_input=False):
    """What the tool says that builds the whole grid."""
    if reason := RTX.cannot_build():
        pytest.skip(reason)
    row = {"dynamic": dynamic, "uint8_input": uint8_input}
    return build(path, BuildOptions(capabilities, shapes=shapes(row)))


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp16", {"uint8_input": True, "opset": 17}),
        ("fp32", {"opset": 19}),
        ("fp16", {"dynamic": True, "uint8_input": True}),
    ],
)
def test_the_real_library_builds_the_export(precision, changes, tmp_path):
    path = tmp_path / "model.onnx"
    export(precision, path, **changes)
    forms = {name: value for name, value in changes.items() if name != "opset"}
    outcome = outcome_of(path, **forms)
    assert outcome["built"], outcome["reason"]


def test_without_tf32_other_kernels_are_built(tmp_path):
    """The builder's flag alone changes two bytes of the engine, and none of its products."""

    def unlike(first, second):
        return sum(a != b for a, b in zip(first, second, strict=False)) / len(first)

    if reason := RTX.cannot_build():
        pytest.skip(reason)
    path = tmp_path / "model.onnx"
    export("fp32", path)
    usual = build_plan(RTX, path, BuildOptions())
    with pytest.raises(InputError, match="a process of its own"):
        build_plan(RTX, path, BuildOptions(tf32=False))
    tf32_settled.cache_clear()
    assert unlike(usual, build_plan(RTX, path, BuildOptions(tf32=False))) > 0.5


@pytest.mark.parametrize(
    ("precision", "dynamic"), [("fp16", False), ("fp16", True), ("fp32", False)]
)
def test_exports_build_for_turing(precision, dynamic, tmp_path):
    path = tmp_path / "model.onnx"
    export(precision, path, dynamic=dynamic)
    outcome = outcome_of(path, ("SM75",), dynamic)
    assert outcome["built"], outcome["reason"]


def test_what_does_not_build_is_an_outcome_with_the_librarys_words(tmp_path):
    path = tmp_path / "model.onnx"
    export("fp32", path, dynamic=True)  # whose resizing is a product of matrices
    outcome = outcome_of(path, ("SM75",), dynamic=True)
    assert not outcome["built"]
    assert "FP32 GEMM is not supported" in outcome["reason"]
