"""Every rule of the ONNX checks on graphs made by hand: where it speaks, and where it must not.

And beside the real parser of TensorRT for RTX: what it refuses itself has no rule.
"""

import functools
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from aliked.backends.tensorrt_library import RTX
from aliked.commands import build
from aliked.errors import InputError
from aliked.export.builder import BuildOptions, build_plan, parse_file
from aliked.export.onnx_checks import check_file, check_model
from aliked.export.onnx_graph import Target, graph_precision, spell_out_selu
from tests.helpers.small_models import write_small_model

ROOT = Path(__file__).resolve().parents[2]
FLOAT, HALF, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8


def value(name, dtype=FLOAT, shape=(1, 3, 32, 64)):
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def node(op, inputs, outputs="y", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"the_{op}", **attributes)


def model(nodes, inputs, weights=(), opset=19, outputs=("y",), functions=(), imports=()):
    results = [value(name, TensorProto.UNDEFINED, None) for name in outputs]
    graph = helper.make_graph(nodes, "test", inputs, results, weights)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in imports)]
    made = helper.make_model(graph, opset_imports=opsets, functions=functions)
    return with_output_types(made)


def with_output_types(made):
    """The model with the types of its outputs, which a file has to name."""
    inlined = onnx.inliner.inline_local_functions(made) if made.functions else made
    inferred = onnx.shape_inference.infer_shapes(inlined)
    for output, known in zip(made.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
        kind = output.type.tensor_type
        kind.elem_type = kind.elem_type or FLOAT
        if not kind.HasField("shape"):
            kind.shape.dim.add().dim_param = "unknown"
    return made


def findings(checked, target=None):
    """Severity and node of what was found."""
    return [(f.severity, f.node) for f in check_model(checked, target)]


def reasons(checked, target=None):
    return " ".join(f"{f.reason} {f.cure}" for f in check_model(checked, target))


# Selu


@pytest.mark.parametrize("given", [{}, {"alpha": 1.5}, {"alpha": 1.5, "gamma": 1.25}])
def test_selu_gets_the_parameters_that_onnx_defines(given):
    """TensorRT's parser has defaults of its own: those of float32 show in keypoints."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    made = model([node("Selu", "x", **given)], [value("x")])
    assert findings(made) == [("warning", "the_Selu")] * (len(given) < 2)
    assert findings(made, Target(RTX.title)) == []
    spell_out_selu(made)
    assert findings(made) == []
    _, network, _ = parse_file(RTX, Path("selu"), BuildOptions(), made.SerializeToString())
    layer = network.get_layer(0)
    layer.__class__ = rtx.IActivationLayer
    wanted = {"alpha": 1.6732632423543772, "gamma": 1.0507009873554805} | given
    assert (layer.alpha, layer.beta) == pytest.approx(tuple(wanted.values()), rel=1e-7)


# GridSample


def grid_sample(opset=19, image=FLOAT, grid=FLOAT, rank=4, **attributes):
    size = [1, 3, *([8] * (rank - 3)), 1024]
    inputs = [value("x", image, size), value("g", grid, [1, *([4] * (rank - 2)), rank - 2])]
    return model([node("GridSample", "x g", **attributes)], inputs, opset=opset)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_new_mode_names_of_grid_sample_are_errors(mode):
    checked = grid_sample(opset=20, mode=mode)
    assert findings(checked) == [("error", "the_GridSample")]
    assert "nearest neighbour" in reasons(checked)
    assert "--opset_version 19" in reasons(checked)


def test_grid_sample_of_opset_20_without_a_mode_is_linear_and_an_error():
    assert findings(grid_sample(opset=20)) == [("error", "the_GridSample")]


@pytest.mark.parametrize(
    ("opset", "mode"), [(20, "nearest"), (16, "bilinear"), (19, "bicubic"), (19, "nearest")]
)
def test_grid_sample_modes_that_tensorrt_reads_rightly_pass(opset, mode):
    assert findings(grid_sample(opset=opset, mode=mode)) == []


def test_tensorrt_for_rtx_reads_the_new_mode_names():
    """Seen with 1.6.1 on an H100: "linear" of opset 20 gave what "bilinear" of opset 16 gives."""
    assert findings(grid_sample(opset=20, mode="linear"), Target(RTX.title)) == []


def test_half_precision_grid_is_an_error_that_names_its_step_in_pixels():
    checked = grid_sample(image=HALF, grid=HALF)
    assert findings(checked) == [("error", "the_GridSample")]
    assert "0.25 pixel at width 1024" in reasons(checked)


# TopK


def top_k(k, size=5000, dtype=FLOAT, axis=-1, shape=None, constant=True):
    inputs = [value("x", dtype, shape or [1, size])]
    weights = [weight("k", np.array([k]))] if constant else []
    inputs += [] if constant else [value("k", INT64, [1])]
    return model([node("TopK", "x k", "y i", axis=axis)], inputs, weights)


def test_top_k_above_tensorrts_limit_is_an_error_and_offers_two_levels():
    assert findings(top_k(3841)) == [("error", "the_TopK")]
    assert "several TopK" in reasons(top_k(3841))


def test_top_k_at_the_limit_passes():
    assert findings(top_k(3840)) == []


def test_top_k_larger_than_its_axis_is_an_error():
    assert findings(top_k(11, size=10)) == [("error", "the_TopK")]


def test_k_computed_at_run_time_is_a_warning():
    assert findings(top_k(0, constant=False)) == [("warning", "the_TopK")]


def test_k_from_a_constant_node_is_read():
    k = helper.make_node("Constant", [], ["k"], value=weight("v", np.array([4000])))
    checked = model([k, node("TopK", "x k", "y i")], [value("x", FLOAT, [1, 5000])])
    assert findings(checked) == [("error", "the_TopK")]


@pytest.mark.parametrize("through", ["Cast", "Reshape", "Concat", "all"])
def test_k_that_follows_from_constants_is_worked_out(through):
    steps = {
        "Cast": node("Cast", "a", "b", to=INT64),
        "Reshape": node("Reshape", "b one", "c"),
        "Concat": node("Concat", "c", "k", axis=0),
    }
    if through != "all":
        steps[through].input[0], steps[through].output[0] = "a", "k"
        steps = {through: steps[through]}
    kind = np.float32 if "Cast" in steps else np.int64
    weights = [weight("a", np.array([4000], kind)), weight("one", np.array([1]))]
    checked = model(
        [*steps.values(), node("TopK", "x k", "y i")], [value("x", FLOAT, [1, 5000])], weights
    )
    assert findings(checked) == [("error", "the_TopK")]


def test_k_from_an_input_through_constants_is_a_warning():
    steps = [node("Reshape", "a one", "k"), node("TopK", "x k", "y i")]
    inputs = [value("x", FLOAT, [1, 5000]), value("a", INT64, [])]
    checked = model(steps, inputs, [weight("one", np.array([1]))])
    assert findings(checked) == [("warning", "the_TopK")]


# files that are no valid ONNX


def cycle():
    made = model([node("Relu", "x", "a"), node("Neg", "a", "y")], [value("x")])
    made.graph.node[0].input[0] = "y"
    return made


def edited(change):
    made = model([node("TopK", "x k", "y i")], [value("x", FLOAT, [1, 9])], [weight("k", [3])])
    change(made.graph)
    return made


MALFORMED = {
    "cycle": cycle(),
    "undefined name": edited(lambda graph: graph.node[0].input.__setitem__(0, "nobody")),
    "duplicate name": edited(lambda graph: graph.node[0].output.__setitem__(1, "y")),
    "empty k": edited(lambda graph: graph.initializer[0].ClearField("raw_data")),
    "an attribute of another type": edited(
        lambda graph: graph.node[0].attribute.append(helper.make_attribute("axis", "last"))
    ),
    "a shape for more values": edited(lambda graph: graph.initializer[0].dims.__setitem__(0, 2)),
    "2^40 elements": edited(lambda graph: graph.initializer[0].dims.__setitem__(0, 2**40)),
    "no inputs": edited(lambda graph: graph.node[0].ClearField("input")),
    "an unknown operator": edited(lambda graph: setattr(graph.node[0], "op_type", "TopKek")),
    "an unknown type": edited(lambda graph: setattr(graph.initializer[0], "data_type", 99)),
}


@pytest.mark.parametrize("malformed", MALFORMED)
def test_what_is_no_valid_onnx_is_one_error(malformed):
    (finding,) = check_model(MALFORMED[malformed])
    assert (finding.severity, finding.node) == ("error", "(model)")
    assert finding.reason.startswith("not valid ONNX: ")
    assert "\n" not in str(finding)


def test_long_rows_of_nodes_are_followed():
    names = ["x", *(f"n{index}" for index in range(3000)), "y"]
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)]
    nodes[-1] = helper.make_node("Cast", [names[-2]], ["y"], to=HALF)
    assert findings(model(nodes, [value("x", INT64, [1])])) == []


@functools.cache
def exported():
    with tempfile.TemporaryDirectory() as folder:
        write_small_model(Path(folder) / "model.onnx")
        return onnx.load(Path(folder) / "model.onnx")


def other_names(draw, made):
    one = draw(st.sampled_from([n for n in made.graph.node if n.input]))
    one.input[0] = draw(
        st.sampled_from(["", "nobody", one.output[0], made.graph.node[-1].output[0]])
    )


def other_attribute(draw, made):
    holders = [n for n in made.graph.node if n.attribute]
    attribute = draw(st.sampled_from(draw(st.sampled_from(holders)).attribute))
    attribute.type = draw(st.sampled_from(onnx.AttributeProto.AttributeType.values()))
    attribute.i = draw(st.integers(-(2**63), 2**63 - 1))


def other_constant(draw, made):
    tensor = draw(st.sampled_from(made.graph.initializer))
    tensor.data_type = draw(st.sampled_from([tensor.data_type, 0, 1, 7, 8, 10, 16, 99]))
    tensor.dims[:] = draw(st.lists(st.sampled_from([-1, 0, 1, 3, 2**40, 2**62]), max_size=4))


def other_operator(draw, made):
    one = draw(st.sampled_from(made.graph.node))
    one.op_type = draw(st.sampled_from(["", "TopK", "GridSample", "Cast", "Loop", "Floor"]))


def other_opset(draw, made):
    made.opset_import[0].version = draw(st.sampled_from([-1, 0, 1, 9, 18, 21, 2**62]))


def longer(draw, made):
    last = made.graph.node[-1].output[0]
    names = [last, *(f"n{i}" for i in range(draw(st.sampled_from([1, 2000]))))]
    made.graph.node.extend(
        helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)
    )


CHANGES = (other_names, other_attribute, other_constant, other_operator, other_opset, longer)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_graph_holds_findings_are_sentences(data):
    made = onnx.ModelProto()
    made.CopyFrom(exported())
    for change in data.draw(st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3)):
        change(data.draw, made)
    for finding in check_model(made):
        assert finding.severity in ("error", "warning")
        assert "\n" not in str(finding) and len(str(finding)) < 1000


# DeformConv


def deform_conv(batch=1, dtype=FLOAT, offset=FLOAT, inputs="x w o", **attributes):
    attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], **attributes}
    values = [value("x", dtype, [batch, 3, 8, 8]), value("o", offset, [batch, 18, 8, 8])]
    values.append(value("m", dtype, [batch, 9, 8, 8]))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [weight("w", np.zeros((4, 3, 3, 3), kind)), weight("b", np.zeros(4, kind))]
    proto = helper.make_node("DeformConv", inputs.split(" "), ["y"], name="the_DeformConv")
    proto.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    return model([proto], values, weights)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("inputs", ["x w o", "x w o b", "x w o b m"])
def test_deform_conv_within_the_plugins_limits_passes(dtype, inputs):
    assert findings(deform_conv(dtype=dtype, offset=dtype, inputs=inputs)) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"inputs": "x w o  m"},
        {"batch": 33},
    ],
)
def test_deform_conv_outside_the_plugins_limits_is_an_error(bad):
    assert findings(deform_conv(**bad)) == [("error", "the_DeformConv")]


@pytest.mark.parametrize("batch", [32, 64])
def test_deform_conv_takes_32_images_and_multiples_of_32(batch):
    assert findings(deform_conv(batch=batch)) == []


def test_deform_conv_of_a_dynamic_batch_depends_on_the_largest_shape():
    checked = deform_conv(batch="B")
    assert findings(checked) == [("warning", "the_DeformConv")]
    assert findings(checked, Target(max_batch=32)) == []
    assert findings(checked, Target(max_batch=40)) == [("error", "the_DeformConv")]


def test_deform_conv_excludes_version_compatible_engines():
    target = Target(version_compatible=True)
    assert findings(deform_conv(), target) == [("error", "the_DeformConv")]


def test_tensorrt_for_rtx_has_no_deform_conv():
    target = Target(RTX.title)
    assert findings(deform_conv(), target) == [("error", "the_DeformConv")]
    assert "--deform_conv gridsample" in reasons(deform_conv(), target)


# numbers that a type cannot hold


def index_division(through=FLOAT, size=1000, middle="", last="Floor", width=64.0):
    """TopK's indices, divided by the width as floats."""
    kind = helper.tensor_dtype_to_np_dtype(through)
    weights = [weight("k", np.array([5])), weight("w", np.array(width, kind))]
    operator = "Div" if width > 1 else "Mul"
    nodes = [
        node("TopK", "x k", "v i"),
        node("Cast", "i", "f", to=through),
        node(operator, "f w", "q"),
        node(middle, "q", "r") if middle else node("Identity", "q", "r"),
        node(last, "r", "s", **({"to": INT64} if last == "Cast" else {})),
        node("Identity", "s"),
    ]
    nodes[4].name = "the_last"
    return model(nodes, [value("x", FLOAT, [1, size])], weights)


def test_integer_division_in_half_precision_is_an_error():
    checked = index_division(HALF)
    assert ("error", "the_last") in findings(checked)
    assert "65504" in reasons(checked)


@pytest.mark.parametrize("through", [FLOAT, DOUBLE])
def test_integer_division_in_floats_is_an_error_beyond_2_to_24(through):
    assert ("error", "the_last") in findings(index_division(through, size=2**24 + 10))
    assert ("warning", "the_last") in findings(index_division(through, size=2**24))
    assert "these go up to 16777215" in reasons(index_division(through, size=2**24))


@pytest.mark.parametrize("last", ["Floor", "Cast"])
def test_integer_division_is_seen_through_either_rounding_and_the_reciprocal(last):
    assert findings(index_division(last=last)) == [("warning", "the_last")]
    assert findings(index_division(last=last, width=1 / 64)) == [("warning", "the_last")]


def test_integer_division_of_integers_passes():
    weights = [weight("k", np.array([5])), weight("w", np.array(64))]
    nodes = [node("TopK", "x k", "v i"), node("Div", "i w")]
    assert findings(model(nodes, [value("x", FLOAT, [1, 2**25])], weights)) == []


def test_scaled_coordinates_that_are_not_rounded_pass():
    assert findings(index_division(last="Neg")) == []
    assert findings(index_division(last="Floor", middle="Sin")) == []


def test_rounding_of_real_numbers_passes():
    weights = [weight("w", np.array(64, np.float32))]
    nodes = [node("Div", "x w", "q"), node("Floor", "q")]
    assert findings(model(nodes, [value("x")], weights)) == []


@pytest.mark.parametrize("number", [65505.0, -1e9, np.inf])
def test_float_constants_that_become_infinite_in_half_precision_are_errors(number):
    weights = [weight("c", np.array([1.0, number], np.float32))]
    checked = model([node("Cast", "c", to=HALF)], [], weights)
    assert findings(checked) == [("error", "the_Cast")]


def test_constants_that_half_precision_holds_pass():
    weights = [weight("c", np.array([1.0, -65504.0], np.float32))]
    assert findings(model([node("Cast", "c", to=HALF)], [], weights)) == []
    assert (
        findings(model([node("Add", "x h")], [value("x", HALF)], [weight("h", np.float16(3))]))
        == []
    )


def test_infinite_half_precision_constants_are_errors_wherever_they_are():
    infinity = np.array([np.inf], np.float16)
    stored = model([node("Add", "x h")], [value("x", HALF)], [weight("h", infinity)])
    constant = helper.make_node(
        "Constant", [], ["h"], name="the_Constant", value=weight("", infinity)
    )
    inline = model([constant, node("Add", "x h")], [value("x", HALF)])
    assert findings(stored) == [("error", "h")]
    assert findings(inline) == [("error", "the_Constant")]


def test_infinite_float_constants_pass():
    weights = [weight("c", np.array([-np.inf], np.float32))]
    assert findings(model([node("Max", "x c")], [value("x")], weights)) == []


@pytest.mark.parametrize(("size", "severity"), [(70000, "error"), (3000, "warning"), (2049, None)])
def test_indices_cast_to_half_precision_are_judged_by_their_range(size, severity):
    nodes = [node("TopK", "x k", "v i"), node("Cast", "i", to=HALF)]
    checked = model(nodes, [value("x", FLOAT, [1, size])], [weight("k", np.array([5]))])
    assert findings(checked) == ([(severity, "the_Cast")] if severity else [])


def test_norms_in_half_precision_are_warnings():
    weights = [weight("a", np.array([1]))]
    assert findings(model([node("ReduceL2", "x a")], [value("x", HALF)], weights)) == [
        ("warning", "the_ReduceL2")
    ]


def test_double_precision_is_a_warning():
    assert findings(model([node("Cast", "x", to=DOUBLE)], [value("x")])) == [
        ("warning", "the_Cast")
    ]


# whole files


def test_nodes_in_subgraphs_are_found_with_the_types_of_outer_tensors():
    branch = helper.make_graph([node("GridSample", "x g", "b")], "branch", [], [value("b", HALF)])
    other = helper.make_graph([node("Identity", "x", "c")], "other", [], [value("c", HALF)])
    choice = node("If", "p", then_branch=branch, else_branch=other)
    inputs = [value("p", TensorProto.BOOL, []), value("x", HALF), value("g", HALF, [1, 4, 4, 2])]
    assert findings(model([choice], inputs)) == [("error", "the_If/the_GridSample")]


def test_nodes_in_functions_are_found_with_the_types_of_the_call():
    body = helper.make_function(
        "mine",
        "Sample",
        ["a", "b"],
        ["c"],
        [node("GridSample", "a b", "c")],
        [helper.make_opsetid("", 19)],
    )
    call = node("Sample", "x g", domain="mine")
    inputs = [value("x", HALF), value("g", HALF, [1, 4, 4, 2])]
    found = findings(model([call], inputs, functions=[body], imports=["mine"]))
    assert [severity for severity, _ in found] == ["error"]
    assert "GridSample" in found[0][1]


def test_functions_of_another_opset_are_no_valid_onnx():
    body = helper.make_function(
        "mine",
        "Sample",
        ["a", "b"],
        ["c"],
        [node("GridSample", "a b", "c", mode="linear")],
        [helper.make_opsetid("", 20)],
    )
    inputs = [value("x"), value("g", FLOAT, [1, 4, 4, 2])]
    call = node("Sample", "x g", domain="mine")
    found = findings(model([call], inputs, opset=19, functions=[body], imports=["mine"]))
    assert found == [("error", "(model)")]


def test_a_file_of_an_export_passes_and_stays_as_it_is(tmp_path):
    path = write_small_model(tmp_path / "model.onnx", deform=True)
    loaded = onnx.load(path)
    before = loaded.SerializeToString()
    assert check_model(loaded) == []
    assert loaded.SerializeToString() == before
    assert check_file(path) == []


def test_precision_is_that_of_the_graph(tmp_path):
    assert graph_precision(onnx.load(write_small_model(tmp_path / "a.onnx"))) == "FP32"
    assert graph_precision(onnx.load(write_small_model(tmp_path / "b.onnx", half=True))) == "FP16"


@pytest.mark.parametrize("data", [b"", b"not an ONNX file", b"\x08\x07"])
def test_files_that_are_no_onnx_are_refused(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.onnx"):
        check_file(path)


def test_truncated_and_missing_files_are_refused(tmp_path):
    path = write_small_model(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"not a whole one"):
        check_file(path)
    with pytest.raises(InputError, match="cannot read"):
        check_file(tmp_path / "absent.onnx")


def test_missing_external_weights_are_named(tmp_path):
    loaded = onnx.load(write_small_model(tmp_path / "a.onnx"))
    for tensor in loaded.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "weights.bin")
        tensor.ClearField("raw_data")
    (tmp_path / "b.onnx").write_bytes(loaded.SerializeToString())
    with pytest.raises(InputError, match=r"b\.onnx"):
        check_file(tmp_path / "b.onnx")


# the parser and the builder themselves


@pytest.fixture
def real(tmp_path):
    """What the real TensorRT for RTX says of a model, up to building it: None where it builds."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

    def ask(checked):
        path = tmp_path / "asked.onnx"
        onnx.save(checked, path)
        try:
            build_plan(RTX, path, BuildOptions())
        except InputError as refusal:
            return str(refusal)
        return None

    return ask


@pytest.mark.parametrize(
    "silent",
    [
        grid_sample(opset=20, mode="linear"),
        grid_sample(image=HALF, grid=HALF),
        index_division(),
        model(
            [node("Cast", "c", to=HALF), node("Add", "x y", "z")],
            [value("x", HALF, [2])],
            [weight("c", np.array([1.0, 1e9], np.float32))],
            outputs=("z",),
        ),
        model([node("Add", "x h")], [value("x", HALF)], [weight("h", np.array([np.inf], "f2"))]),
        model([node("ReduceL2", "x a")], [value("x", HALF)], [weight("a", np.array([1]))]),
        model([node("Cast", "x", to=DOUBLE), node("Cast", "y", "z", to=FLOAT)], [value("x")],
              outputs=("z",)),
    ],
)  # fmt: skip
def test_rules_speak_where_the_library_builds_without_a_word(real, silent):
    assert real(silent) is None
    assert findings(silent) != []


def refused_graphs():
    """What the library refuses in words of its own, so that no rule is needed."""
    pads = [weight("p", np.array([1, 1]))]
    scales = [weight("s", np.array([1, 1, 2, 2], "f4")), weight("e", np.zeros(0, "f4"))]
    index = [weight("i", np.array([[1], [2]]))]
    line, axes = value("x", FLOAT, [8]), value("a", INT64, [1])
    pool = {"kernel_shape": [3, 3]}
    return {
        "computed axes": model([node("ReduceMean", "x a")], [value("x"), axes], opset=18),
        "NonZero": model([node("NonZero", "x")], [line]),
        "ScatterND": model(
            [node("ScatterND", "x i u", reduction="add")], [line, value("u", FLOAT, [2])], index
        ),
        "Resize": model(
            [node("Resize", "x e s", antialias=1, mode="linear")], [value("x")], scales
        ),
        "MaxPool": model([node("MaxPool", "x", dilations=[2, 2], **pool)], [value("x")]),
        "Einsum": model([node("Einsum", "x x", equation="i,i->i")], [value("x", INT64, [8])]),
        "UINT8": model([node("Transpose", "x")], [value("x", UINT8)]),
        "a plugin": model([node("Magic", "x", domain="mine")], [value("x")], imports=["mine"]),
        "two types": grid_sample(image=HALF, grid=FLOAT),
        "Det": model([node("Det", "x")], [value("x", FLOAT, [3, 3])]),
        "Bernoulli": model([node("Bernoulli", "x")], [value("x")]),
        "MaxRoiPool": model(
            [node("MaxRoiPool", "x r", pooled_shape=[2, 2])],
            [value("x"), value("r", FLOAT, [1, 5])],
        ),
        "Pad": model(
            [node("Pad", "x p", mode="wrap")], [value("x", TensorProto.STRING, [8])], pads
        ),
    }


@pytest.mark.parametrize("refused", refused_graphs().values(), ids=refused_graphs())
def test_what_has_no_rule_is_refused_by_the_library_in_its_own_words(real, refused):
    assert "the_" in real(refused) or "TensorRT for RTX" in real(refused)


def check_only(path, *options):
    command = [sys.executable, "convert_onnx_to_trt.py", "--check_only", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_check_only_needs_no_tensorrt_and_tells_by_its_status(tmp_path):
    deform = write_small_model(tmp_path / "good.onnx", deform=True)
    good = check_only(deform, "--builder", "tensorrt")
    assert (good.returncode, "0 errors, 0 warnings" in good.stdout) == (0, True)
    bad = check_only(write_small_model(tmp_path / "bad.onnx", opset=20))
    assert bad.returncode == 1
    assert "my_GridSample" in bad.stdout
    assert "1 errors, 0 warnings" in bad.stdout
    (tmp_path / "text.onnx").write_text("hello")
    text = check_only(tmp_path / "text.onnx")
    assert (text.returncode, text.stderr.count("\n")) == (2, 1)


def test_check_only_asks_the_installed_parser_too(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    good = check_only(write_small_model(tmp_path / "good.onnx"))
    assert f"the parser of TensorRT for RTX {trt.__version__} takes it" in good.stdout
    assert "the parser of TensorRT was not asked: " in good.stdout
    assert good.returncode == 0
    bad = check_only(write_small_model(tmp_path / "bad.onnx", deform=True))
    assert bad.returncode == 1
    assert f"TensorRT for RTX {trt.__version__} cannot parse" in bad.stdout
    assert "Plugin not found" in bad.stdout


def test_check_only_knows_what_the_engine_is_for(tmp_path):
    path = write_small_model(tmp_path / "model.onnx", deform=True)
    assert check_only(path, "--builder", "tensorrt", "--version_compatible").returncode == 1


def test_what_never_ends_is_no_onnx(tmp_path):
    os.mkfifo(tmp_path / "fifo.onnx")
    for path in (tmp_path / "fifo.onnx", Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            check_file(path)


def test_a_parser_is_not_given_what_is_no_valid_onnx(tmp_path, monkeypatch, capsys):
    """Some of them end the process over it."""
    monkeypatch.setattr(build, "parser_verdict", lambda library, path: pytest.fail("was asked"))
    onnx.save(MALFORMED["cycle"], tmp_path / "cycle.onnx")
    options = build.parser().parse_args(["--check_only", str(tmp_path / "cycle.onnx")])
    assert build.main(options) == 1
    assert "not valid ONNX" in capsys.readouterr().out


def test_check_only_refuses_options_that_it_does_not_use(tmp_path):
    path = write_small_model(tmp_path / "model.onnx")
    run = check_only(path, "--inspect")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "--check_only does not use --inspect" in run.stderr
