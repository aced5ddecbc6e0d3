"""Deformable convolution in ONNX files gives what torchvision's operator gives."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from aliked.export.deform_conv_onnx import NATIVE_TRANSLATION, SAMPLERS, standard_deform_conv

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
NATIVE = "native"
TRANSLATIONS = [NATIVE, *SAMPLERS]
# Values are of order 1; sums of up to 36 float32 products in another order, and positions that
# GridSample takes as fractions of the width, differ by a few 1e-7.
TOLERANCE = 1e-5


class Case(NamedTuple):
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False
    bias: bool = False
    size: tuple[int, int] = (9, 7)


CASES = {
    "as in the model": Case(),
    "strides": Case(stride=(2, 3)),
    "paddings": Case(padding=(0, 2)),
    "dilations": Case(dilation=(3, 2), padding=(2, 2)),
    "oblong kernel": Case(kernel=(1, 4), padding=(0, 3), stride=(1, 2), dilation=(2, 1)),
    "groups": Case(groups=2, bias=True),
    "offset groups": Case(offset_groups=2, bias=True),
    "more offset groups than groups": Case(groups=2, offset_groups=4, mask=True),
    "mask": Case(mask=True),
    "mask and bias": Case(mask=True, bias=True),
    "input of one pixel": Case(size=(1, 1)),
    "everything": Case((2, 3), (2, 1), (3, 1), (1, 2), 2, 2, True, True, (10, 8)),
}


class DeformConv(nn.Module):
    """The operator with random weights, 4 channels in and 6 out."""

    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.weight = nn.Parameter(torch.randn(6, 4 // case.groups, *case.kernel) / 4)
        self.bias = nn.Parameter(torch.randn(6)) if case.bias else None

    def forward(self, images, offset, mask=None):
        _, stride, padding, dilation, *_ = self.case
        settings = (self.bias, stride, padding, dilation, mask)
        return deform_conv2d(images, offset, self.weight, *settings)


def make_inputs(case: Case, size: tuple[int, int], batch: int = 2) -> dict[str, torch.Tensor]:
    """Images, offsets of which many lead outside, some very far, and a mask where asked for."""
    settings = zip(size, case.kernel, case.stride, case.padding, case.dilation, strict=True)
    out_size = [(n + 2 * pad - dil * (k - 1) - 1) // step + 1 for n, k, step, pad, dil in settings]
    taps = case.kernel[0] * case.kernel[1] * case.offset_groups
    offset = torch.randn(batch, 2 * taps, *out_size) * 3
    offset[:, :2] = offset[:, :2].round()  # exactly on pixels
    offset[:, 2] *= 1e6
    offset[:, 5] = torch.inf  # in one direction only
    inputs = {"images": torch.randn(batch, 4, *size), "offset": offset}
    if case.mask:
        inputs["mask"] = torch.rand(batch, taps, *out_size)
    return inputs


def export(model: nn.Module, inputs: dict, translation: str, opset: int, path: Path, dynamic: bool):
    """Write `model` the way that `translation` asks for and check the file."""
    names, free = list(inputs), (0, 2, 3)  # batch, height and width
    args, options = tuple(inputs.values()), {"opset_version": opset, "input_names": names}
    if translation == NATIVE:
        options |= {"custom_translation_table": NATIVE_TRANSLATION, "verbose": False}
        if dynamic:
            shapes = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
            options["dynamic_shapes"] = (shapes,) * len(args)
        torch.onnx.export(model, args, path, dynamo=True, **options)
    else:
        if dynamic:
            options["dynamic_axes"] = {n: {axis: f"{n}_{axis}" for axis in free} for n in names}
        with standard_deform_conv(translation, opset):
            torch.onnx.export(model, args, path, dynamo=False, **options)
    onnx.checker.check_model(path, full_check=True)


def exported(case: Case, translation: str, opset: int, path: Path, dynamic: bool = False):
    """A random operator, its inputs, and an ONNX Runtime session of the file written at `path`."""
    torch.manual_seed(0)
    model, inputs = DeformConv(case).eval().requires_grad_(False), make_inputs(case, case.size)
    export(model, inputs, translation, opset, path, dynamic)
    return model, inputs, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_equal(session: onnxruntime.InferenceSession, model: nn.Module, inputs: dict) -> None:
    """ONNX Runtime gives what PyTorch gives."""
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    np.testing.assert_allclose(output, model(**inputs).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("sampling", SAMPLERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_standard_operators_equal_torchvision(case, sampling, opset, tmp_path):
    model, inputs, session = exported(case, sampling, opset, tmp_path / "model.onnx")
    assert_equal(session, model, inputs)


@pytest.mark.parametrize("opset", [16, 19])
@pytest.mark.parametrize("sampling", SAMPLERS)
def test_standard_operators_can_be_written_for_opset(opset, sampling, tmp_path):
    case = CASES["everything"]
    model, inputs, session = exported(case, sampling, opset, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset
    assert_equal(session, model, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_native_operator_equals_torchvision(case, tmp_path):
    model, inputs, session = exported(case, NATIVE, 19, tmp_path / "model.onnx")
    assert_equal(session, model, inputs)


@pytest.mark.parametrize("name", ["as in the model", "everything"])
@pytest.mark.parametrize("translation", TRANSLATIONS)
def test_one_dynamic_file_is_right_at_other_sizes_and_batches(translation, name, tmp_path):
    case, opset = CASES[name], 19 if translation == NATIVE else 17
    model, inputs, session = exported(case, translation, opset, tmp_path / "model.onnx", True)
    assert_equal(session, model, inputs)
    for size, batch in (((12, 5), 1), ((4, 16), 3)):
        assert_equal(session, model, make_inputs(case, size, batch))


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_standard_operators_are_standard(sampling, tmp_path):
    exported(CASES["everything"], sampling, 17, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    operators = {node.op_type for node in nodes}
    assert {node.domain for node in nodes} == {""}
    assert "DeformConv" not in operators
    assert ("GridSample" in operators) == (sampling == "gridsample")


@pytest.mark.parametrize(("name", "inputs"), [("as in the model", 4), ("mask", 5)])
def test_native_operator_always_has_a_bias_and_only_a_mask_that_is_used(name, inputs, tmp_path):
    exported(CASES[name], NATIVE, 19, tmp_path / "model.onnx")
    (node,) = onnx.load(tmp_path / "model.onnx").graph.node
    assert node.op_type == "DeformConv"
    assert len(node.input) == inputs and all(node.input)
