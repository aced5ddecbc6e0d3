"""TensorRT for RTX builds what is exported, and the forms made for it select the same pixels."""

import functools
import io

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from aliked import detection
from aliked.backends.tensorrt_library import RTX, tf32_settled
from aliked.configs import Form
from aliked.detection import (
    detect,
    inner,
    select_top_k,
    suppress_non_maxima,
    top_k_of_groups,
)
from aliked.errors import InputError
from aliked.export import rtx_graph, rtx_keypoints
from aliked.export.builder import BuildOptions, build_plan
from aliked.export.onnx_export import ExportOptions, export_onnx, fold_constants
from aliked.export.rewriter import Rewriter
from aliked.export.rtx_graph import for_rtx
from aliked.model import ALIKED
from tools import build_grid
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
@pytest.mark.parametrize("dynamic", [False, True])
def test_suppression_by_slices_and_products_is_that_by_pooling(scores, size, dynamic):
    maps = scores(*size)
    exported = suppress_non_maxima(maps, Form(exported=True, dynamic=dynamic))
    assert torch.equal(exported, suppress_non_maxima(maps))


@pytest.mark.parametrize("scores", MAPS)
@pytest.mark.parametrize("k", [1, 100, 2048])
def test_the_best_of_groups_are_the_best_of_all(scores, k):
    values = inner(suppress_non_maxima(scores(150, 203)))
    best, index = top_k_of_groups(values, k, 1)
    assert torch.equal(best, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, index), best)
    assert all(len(row.unique()) == k for row in index)  # torch.topk promises no order of equals


@pytest.mark.parametrize("scores", MAPS)
@pytest.mark.parametrize(
    ("size", "k"), [((70, 90), 5000), ((270, 330), 4097), ((150, 203), 9000), ((150, 203), 2049)]
)
def test_the_best_in_parts_are_the_best_of_all(scores, size, k):
    values = inner(suppress_non_maxima(scores(*size)))
    best, index = select_top_k(values, k, grouped=True)
    assert torch.equal(best, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, index), best)
    assert all(len(row.unique()) == k for row in index)


@pytest.mark.parametrize("size", [(5, 5), (9, 12), (70, 90)])
def test_more_rows_than_maxima_are_fill_ins(size):
    count = (size[0] - 4) * (size[1] - 4)
    plain, exported = (detect(noise(*size), count, 0.0, 0, f) for f in (Form(), EXPORTED))
    assert torch.equal(exported.nms_scores, plain.nms_scores)
    assert (exported.scores[exported.nms_scores == 0] == 0).all()
    kept = plain.nms_scores > 0
    torch.testing.assert_close(exported.keypoints[kept], plain.keypoints[kept])


class Detector(torch.nn.Module):
    """Detection alone, so that a score map can be given to it."""

    def __init__(self, selection, form):
        super().__init__()
        self.selection, self.form = selection, form

    def forward(self, scores):
        found = detect(scores, *self.selection, self.form)
        return found.keypoints, found.scores, found.nms_scores


def written(module, example, dynamic=False):
    """The ONNX model of a module of one input."""
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (example,),
        buffer,
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        dynamic_axes={"x": {0: "batch", 2: "height", 3: "width"}} if dynamic else {},
    )
    return fold_constants(onnx.load_from_string(buffer.getvalue()))


def in_onnx_runtime(model, x):
    """What a model of one input gives in ONNX Runtime, on the CPU."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return [torch.from_numpy(rows) for rows in session.run(None, {"x": x.numpy()})]


# Smaller than anything is cut into; odd; in groups; more than one TopK returns: every pixel, the
# best of three lists of two parts each, and of two lists of four.
@pytest.mark.parametrize(
    ("size", "k"),
    [
        ((5, 5), 1),
        ((5, 37), 33),
        ((33, 50), 1334),
        ((90, 91), 300),
        ((71, 67), 4221),
        ((90, 120), 4096),
        ((90, 120), 8000),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
def test_the_exported_detection_finds_the_same_in_onnx_runtime(size, k, dynamic, threshold):
    def selection(rows):
        return (0, 0.1, rows) if threshold else (rows, 0.0, 0)

    batch = torch.cat([scores(*size)[:1] for scores in MAPS])
    count = (size[0] - 4) * (size[1] - 4)
    expected = detect(batch, *selection(count), Form())  # every maximum
    form = Form("gridsample", exported=True, dynamic=dynamic)
    model = written(Detector(selection(k), form), torch.rand_like(batch), dynamic)
    keypoints, scores, nms_scores = in_onnx_runtime(model, batch)
    descending = expected.nms_scores.sort(dim=1, descending=True).values
    assert torch.equal(nms_scores, descending[:, :k])
    assert (scores[nms_scores == 0] == 0).all()
    for image in range(len(batch)):  # equals may come in another order
        found = keypoints[image, nms_scores[image] > 0]
        wanted = expected.keypoints[image, expected.nms_scores[image] > 0]
        distance = torch.cdist(found, wanted, compute_mode="donot_use_mm_for_euclid_dist")
        for sides in ((1, 0) if k == count else (1,)) if len(found) else ():
            assert distance.amin(dim=sides).max() < 1e-4


class Logits(torch.nn.Module):
    """From logits of a frame to what is detected in the image at `top`, `left` of it."""

    def __init__(self, size, k, top=0, left=0, threshold=0.0, limit=0):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1).half()
        torch.nn.init.dirac_(self.conv.weight)
        torch.nn.init.zeros_(self.conv.bias)
        self.size, self.begin = size, (top, left)
        self.detector = Detector((k, threshold, limit), Form("gridsample", exported=True))

    def forward(self, logits):
        scores = torch.sigmoid(self.conv(logits).float())
        for axis, start, length in zip((2, 3), self.begin, self.size, strict=True):
            scores = scores.narrow(axis, start, length)
        return self.detector(scores)


def types_sorted(model):
    """The types of what a model's TopK nodes sort."""
    rewriter = Rewriter(model)
    nodes = [node for node in model.graph.node if node.op_type == "TopK"]
    return {rewriter.kind(node.input[0]) for node in nodes}


@functools.cache
def chosen_by_logits(size, k, begin):
    """The detector for RTX, written once for all score maps: they are its input."""
    frame = [-(-side // 32) * 32 for side in size]
    return for_rtx(written(Logits(size, k, *begin), torch.zeros(1, 1, *frame).half())), frame


# Not grouped; in groups; as large as the frame; more than one TopK returns, as above.
@pytest.mark.parametrize(
    ("size", "k", "begin"),
    [
        ((33, 50), 40, (3, 5)),
        ((96, 96), 300, (0, 0)),
        ((90, 91), 301, (3, 2)),
        ((71, 67), 4221, (0, 0)),
        ((90, 120), 4095, (3, 2)),
        ((90, 120), 8000, (0, 0)),
    ],
)
@pytest.mark.parametrize("scores", MAPS)
def test_the_same_is_chosen_by_logits_for_rtx(size, k, begin, scores):
    rewritten, frame = chosen_by_logits(size, k, begin)
    assert types_sorted(rewritten) == {TensorProto.FLOAT16}
    # What lies beside the image in the frame is better than all that is in it.
    logits = torch.full((1, 1, *frame), 9.0).half()
    inside = torch.logit(scores(*size)[:1] * 0.99).clamp(min=-60000).half()
    (top, left), (height, width) = begin, size
    logits[..., top : top + height, left : left + width] = inside
    expected = detect(torch.sigmoid(inside.float()), (height - 4) * (width - 4), 0.0, 0, Form())
    keypoints, found, nms_scores = in_onnx_runtime(rewritten, logits)
    descending = expected.nms_scores.sort(dim=1, descending=True).values
    torch.testing.assert_close(nms_scores, descending[:, :k], atol=1e-6, rtol=0)
    kept = nms_scores[0] > 0
    assert (found[0, ~kept] == 0).all() and keypoints.isfinite().all()
    if not kept.any():
        return
    distance = torch.cdist(
        keypoints[0, kept],
        expected.keypoints[0],
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    nearest, index = distance.min(dim=1)
    assert nearest.max() < 1e-3
    torch.testing.assert_close(found[0, kept], expected.scores[0, index], atol=1e-4, rtol=0)
    assert len(index.unique()) == len(index)


def test_what_a_threshold_chooses_is_not_chosen_by_logits_for_rtx():
    model = written(Logits((60, 64), 0, 2, 0, 0.7, 300), torch.zeros(1, 1, 64, 64).half())
    assert types_sorted(for_rtx(model)) == {TensorProto.FLOAT}


@pytest.mark.parametrize("k", [300, 4096])
def test_of_more_pixels_than_numbers_have_indices_the_best_are_chosen_for_rtx(k, monkeypatch):
    monkeypatch.setattr(rtx_keypoints, "INDEX_BITS", 12)
    size = (96, 128)
    rewritten = for_rtx(written(Logits(size, k), torch.zeros(1, 1, *size).half()))
    assert kinds(rewritten).count("GreaterOrEqual") > 0  # lists are merged with their indices
    logits = torch.logit(noise(*size)[:1].clamp(0.01, 0.99)).half()
    expected = detect(torch.sigmoid(logits.float()), k, 0.0, 0, Form())
    _, _, nms_scores = in_onnx_runtime(rewritten, logits)
    torch.testing.assert_close(nms_scores, expected.nms_scores, atol=1e-6, rtol=0)


def test_a_file_that_chooses_in_rounds_is_as_it_was_for_rtx(monkeypatch):
    """Files of earlier versions do, for more keypoints than one TopK returns."""
    monkeypatch.setattr(detection, "top_k_in_parts", select_top_k)
    model = written(Logits((72, 96), 4000), torch.zeros(1, 1, 72, 96).half())
    assert "ScatterElements" in kinds(model)
    assert types_sorted(for_rtx(model)) == {TensorProto.FLOAT}


def test_all_of_the_best_may_lie_in_one_list_for_rtx():
    """Lists are merged in pairs: none of what a full one has may be lost to an empty one."""
    size, k = (96, 352), 300
    rewritten = for_rtx(written(Logits(size, k), torch.zeros(1, 1, *size).half()))
    first = next(node for node in rewritten.graph.node if node.op_type == "TopK")
    _, lists, length = Rewriter(rewritten).shape(first.input[0])
    rows = length // size[1]  # of the image that one of them has
    assert lists == 8 and (rows // 3) * (size[1] // 3) > k
    for one in range(lists):
        logits = torch.full((1, 1, *size), -9.0).half()
        maxima = logits[..., 2 + one * rows + one // 2 : 2 + (one + 1) * rows : 3, ::3]
        maxima[...] = torch.logit(noise(*maxima.shape[2:])[:1].clamp(0.01, 0.99)).half()
        expected = detect(torch.sigmoid(logits.float()), k, 0.0, 0, Form())
        _, _, nms_scores = in_onnx_runtime(rewritten, logits)
        best = expected.nms_scores.sort(dim=1, descending=True).values
        torch.testing.assert_close(nms_scores, best, atol=1e-6, rtol=0)


def test_a_list_in_parts_may_hold_all_of_the_best_for_rtx():
    """Also where they are equals, each of which is chosen once."""
    size, k = (136, 512), 4096
    rewritten = for_rtx(written(Logits(size, k), torch.zeros(1, 1, *size).half()))
    first = next(node for node in rewritten.graph.node if node.op_type == "TopK")
    _, parts, length = Rewriter(rewritten).shape(first.input[0])
    assert parts > 16 and length < k  # odd numbers of lists among them
    plateau = 10  # rows that are all maxima, more than k pixels
    for top in range(2, size[0] - plateau - 2, 9):
        logits = torch.logit(noise(*size)[:1] / 2).clamp(min=-9).half()
        logits[..., top : top + plateau, :] = 2
        expected = detect(torch.sigmoid(logits.float()), k, 0.0, 0, Form())
        keypoints, _, nms_scores = in_onnx_runtime(rewritten, logits)
        torch.testing.assert_close(nms_scores, expected.nms_scores, atol=1e-6, rtol=0)
        assert len(keypoints[0].unique(dim=0)) == k


def test_logits_that_are_no_numbers_give_scores_that_are_none_for_rtx():
    """A model that is damaged is found by what it gives; an index made of NaN would be anywhere."""
    size = (64, 64)
    rewritten = for_rtx(written(Logits(size, 50), torch.zeros(1, 1, *size).half()))
    outputs = in_onnx_runtime(rewritten, torch.full((1, 1, *size), torch.nan).half())
    assert not all(values.isfinite().all() for values in outputs)


def export(precision, path, top_k=300, **changes):
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=top_k).eval().fold_batch_norm().set_precision(precision)
    export_onnx(model, path, ExportOptions(96, 128, deform_conv="gridsample", **changes))


def outcome_of(path, capabilities=(), dynamic=False, uint8_input=False):
    """What the tool says that builds the whole grid."""
    if reason := RTX.cannot_build():
        pytest.skip(reason)
    row = {"dynamic": dynamic, "uint8_input": uint8_input}
    return build(path, BuildOptions(capabilities, shapes=shapes(row)))


def kinds(model):
    return [node.op_type for node in model.graph.node]


def wide_convolutions(model):
    kernels = [a.ints for n in model.graph.node for a in n.attribute if a.name == "kernel_shape"]
    return sum(list(kernel) == [3, 6] for kernel in kernels)


@pytest.mark.parametrize(
    ("name", "wide", "few"),
    [("aliked-t16", 4, 0), ("aliked-t16", 4, 1024), ("aliked-n16rot", 2, 100)],
)
def test_the_graph_for_rtx_computes_what_the_file_does(name, wide, few, tmp_path, monkeypatch):
    monkeypatch.setattr(rtx_graph, "FEW", few)
    path = tmp_path / "model.onnx"
    torch.manual_seed(0)
    model = ALIKED(name, top_k=200).eval().fold_batch_norm().set_precision("fp16")
    export_onnx(model, path, ExportOptions(160, 192, deform_conv="gridsample", uint8_input=True))
    written = onnx.load(path)
    rewritten = for_rtx(written, pixels=160 * 192)
    assert written == onnx.load(path)
    assert wide_convolutions(rewritten) == wide
    assert kinds(rewritten).count("Selu") < kinds(written).count("Selu")
    assert not {"LessOrEqual", "AveragePool"} & set(kinds(rewritten))
    # Lengths of descriptors alone; of features they are sums of squares.
    assert [kinds(graph).count("ReduceL2") for graph in (written, rewritten)] == [3, 1]
    block = model.block2.conv2.weight
    kernels = [list(tensor.dims) for tensor in rewritten.graph.initializer]
    assert [len(block), block.shape[1] + model.block1.conv2.weight.shape[0], 3, 3] in kernels
    strides = [a.ints for n in rewritten.graph.node for a in n.attribute if a.name == "strides"]
    assert sum(list(steps) == [3, 3] for steps in strides) == 4  # of deformable convolutions
    onnx.checker.check_model(rewritten, full_check=True)
    images = np.random.default_rng(0).integers(0, 256, (1, 160, 192, 3), dtype=np.uint8)
    (keypoints, descriptors, scores), got = (
        onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"image": images})
        for m in (written, rewritten)
    )
    apart = np.linalg.norm(got[0][0][:, None] - keypoints[0], axis=2)
    mine, same = apart.argmin(axis=1), apart.min(axis=1) < 0.05
    assert same.mean() > 0.97
    np.testing.assert_allclose(got[2][0][same], scores[0][mine][same], atol=2e-3)
    assert (got[1][0] * descriptors[0][mine]).sum(axis=1)[same].min() > 0.998


def convolution(width, dtype=np.float16, **changed):
    """A model of one 3x3 convolution of 4 channels, and of what reads its values."""
    values, kind = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    weight = np.random.default_rng(1).integers(-3, 4, (4, 4, 3, 3)).astype(dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"], **{"pads": [1, 1, 1, 1]} | changed)],
        "convolution",
        [values("x", kind(np.dtype(dtype)), [1, 4, 6, width])],
        [values("y", kind(np.dtype(dtype)), None)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize("width", [4, 8, 20])
def test_convolutions_for_rtx_put_every_pixel_in_its_place(width):
    model = convolution(width)
    x = np.random.default_rng(0).integers(-9, 10, (1, 4, 6, width)).astype(np.float16)
    wide = for_rtx(model, pixels=1)
    assert wide_convolutions(wide) == 1
    (want,), (got,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (model, wide))
    np.testing.assert_array_equal(got, want)  # whole numbers: exact in any order


def test_an_output_before_an_activation_is_still_there_for_rtx():
    model = convolution(8)
    model.graph.node.append(onnx.helper.make_node("Elu", ["y"], ["z"]))
    kind = onnx.TensorProto.FLOAT16
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", kind, None))
    x = np.random.default_rng(0).integers(-9, 10, (1, 4, 6, 8)).astype(np.float16)
    wide = for_rtx(model, pixels=1)
    assert wide_convolutions(wide) == 1
    want, got = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (model, wide))
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize(
    "model",
    [
        convolution(10),  # pixels in a row, no multiple of 4
        convolution("width"),
        convolution(8, np.float32),
        convolution(8, pads=[0, 0, 0, 0]),
        convolution(8, pads=[2, 2, 2, 2], dilations=[2, 2]),
        convolution(8, strides=[2, 2]),
    ],
)
def test_other_convolutions_stay_as_they_are_for_rtx(model):
    assert for_rtx(model, pixels=1).graph.node == model.graph.node


def selu(*nodes, dtype="float16", width="8"):
    """A model of `nodes` in ONNX's own text, from x [1, 4, 6, width] to y."""
    return onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]>
        selu ({dtype}[1, 4, 6, {width}] x) => ({dtype}[1, 4, 6, {width}] y)
        <int64[4] sizes = {{1, 4, 6, 8}}>
        {{ {"".join(f"{node} " for node in nodes)} }}"""
    )


@pytest.mark.parametrize(
    ("model", "rewrites"),
    [
        (selu("y = Selu(x)"), True),
        (selu("a = Abs(x)", "b = Add(a, x)", "y = Selu(b)"), True),
        (selu("y = Selu(x)", dtype="float"), False),
        (selu("y = Selu(x)", width="N"), True),  # in float32
        (selu("a = Selu(x)", "b = Cast<to = 1>(a)", "y = Cast<to = 10>(b)"), True),
        (selu("a = Resize(x, , , sizes)", "b = Add(x, a)", "y = Selu(b)"), False),
    ],
)
def test_selu_is_written_for_rtx_where_that_is_faster_or_nearer_to_float32(model, rewrites):
    rewritten = for_rtx(model)
    assert (kinds(rewritten) != kinds(model)) == rewrites
    x = np.random.default_rng(0).normal(size=(1, 4, 6, 8))
    x = x.astype(
        onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    )
    (want,), (got,) = (ReferenceEvaluator(m).run(None, {"x": x}) for m in (model, rewritten))
    rounding = {"rtol": 3e-3, "atol": 1e-3} if x.dtype == np.float16 else {"atol": 1e-6}
    np.testing.assert_allclose(got, want, **rounding)


def test_convolutions_of_small_maps_stay_as_they_are_for_rtx():
    model = convolution(8)
    assert for_rtx(model).graph.node == model.graph.node


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("fp16", {"uint8_input": True, "opset": 17}),
        ("fp32", {"opset": 19}),
        ("fp16", {"top_k": 4096}),
        ("fp16", {"dynamic": True, "uint8_input": True}),
    ],
)
def test_the_real_library_builds_the_export(precision, changes, tmp_path):
    path = tmp_path / "model.onnx"
    export(precision, path, **changes)
    forms = {name: changes[name] for name in ("dynamic", "uint8_input") if name in changes}
    outcome = outcome_of(path, **forms)
    assert outcome["built"], outcome["reason"]


@pytest.mark.parametrize("mode", build_grid.MODES)
def test_the_grid_has_both_ways_to_select(mode, tmp_path):
    """Only a file with a threshold gives the scores that it compares with it."""
    path = tmp_path / "model.onnx"
    row = next(build_grid.grid(["aliked-t16"], [mode]))
    build_grid.export(row, path, 64, 96)
    given = {output.name for output in onnx.load(path).graph.output}
    assert ("nms_scores" in given) == (mode == "threshold")


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
