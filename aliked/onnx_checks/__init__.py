"""What TensorRT would refuse or silently misread in an ONNX file, found without TensorRT."""

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx.inliner

from aliked.onnx_checks import precision, sampling, selection
from aliked.onnx_checks.finding import Finding, Target
from aliked.onnx_checks.graph import Node, default_opset, graphs, load_model
from aliked.onnx_checks.precision import graph_precision

__all__ = ["Finding", "Target", "check_file", "check_model", "graph_precision", "load_model"]

OPSETS = range(9, 25)  # that TensorRT 10.13 to 11.4 read
ANY_TARGET = Target()
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

Rule = Callable[[Node, Target], Iterator[Finding]]
RULES: dict[str, tuple[Rule, ...]] = {
    "GridSample": (sampling.grid_sample,),
    "DeformConv": (sampling.deform_conv,),
    "Resize": (sampling.resize,),
    "TopK": (selection.top_k,),
    "ScatterND": (selection.scatter_nd,),
    "ScatterElements": (selection.scatter_elements,),
    "Pad": (selection.pad,),
    "MaxPool": (selection.max_pool,),
    "Einsum": (selection.einsum,),
    "Floor": (precision.float_division,),
    "Cast": (precision.float_division, precision.cast_overflow, precision.double),
    "LpNormalization": (precision.half_precision_squares,),
    **dict.fromkeys(
        ("NonZero", "Compress", "Unique", "NonMaxSuppression"), (selection.data_dependent,)
    ),
    **{f"Reduce{name}": (selection.reduce,) for name in REDUCTIONS},
}
for _name in ("ReduceL2", "ReduceSumSquare"):
    RULES[_name] += (precision.half_precision_squares,)
EVERY_NODE: tuple[Rule, ...] = (selection.uint8_inside, selection.unknown_operator)


def check_file(path: Path, target: Target = ANY_TARGET) -> list[Finding]:
    """The findings of an ONNX file, errors first; `InputError` where it is not one."""
    return check_model(load_model(path), target)


def check_model(model: onnx.ModelProto, target: Target = ANY_TARGET) -> list[Finding]:
    """The findings of a model, errors first; it is not changed."""
    findings = list(_check_file_level(model))
    typed, contradiction = _with_types(model)
    findings += contradiction
    for graph in graphs(typed):
        findings += precision.infinite_constants(graph)
        for proto in graph.proto.node:
            node = Node(proto, graph)
            rules = RULES.get(node.op, ()) if proto.domain in ("", "ai.onnx") else ()
            for rule in (*rules, *EVERY_NODE):
                findings += rule(node, target)
    return sorted(findings, key=lambda finding: finding.severity != "error")


def _check_file_level(model: onnx.ModelProto) -> Iterator[Finding]:
    """The opset, and whether the file is valid ONNX at all."""
    opset = default_opset(model.opset_import, 0)
    if opset not in OPSETS:
        yield Finding(
            "error",
            "(model)",
            f"opset {opset}, and TensorRT before 11.5 reads {OPSETS[0]} to {OPSETS[-1]}",
            "export with --opset_version 17 to 19",
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        # TensorRT does not run this checker, and may read the file all the same.
        yield Finding("warning", "(model)", f"not valid ONNX: {reason}", "export the model again")


def _with_types(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Finding]]:
    """The model with functions in line and every type that ONNX's own inference finds."""
    try:
        inlined = onnx.inliner.inline_local_functions(model) if model.functions else model
        return onnx.shape_inference.infer_shapes(inlined, data_prop=True), []
    except onnx.shape_inference.InferenceError as error:
        reason = str(error).strip().splitlines()[0]
        cure = "export the model again"
        return model, [Finding("error", "(model)", f"its types contradict: {reason}", cure)]
