"""Rules for numbers that the chosen type cannot hold: indices in floats, constants in FP16."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from aliked.onnx_checks.finding import Finding, Target, error, warning
from aliked.onnx_checks.graph import (
    INTEGER_TYPES,
    SAME_VALUES,
    Graph,
    Node,
    constant_value,
    type_name,
)

FP16_MAX = 65504.0  # the largest finite FP16
EXACT = {  # the integers up to here are exact; TensorRT computes DOUBLE as FLOAT
    TensorProto.FLOAT16: 2**11,
    TensorProto.BFLOAT16: 2**8,
    TensorProto.FLOAT: 2**24,
    TensorProto.DOUBLE: 2**24,
}
INTEGER_DIV = "divide integers: Div of INT64 is exact, in PyTorch // on integer tensors"


def float_division(node: Node, target: Target) -> Iterator[Finding]:
    """Integer division taken apart into Cast, Div, Floor or Cast back: at its last node."""
    if node.op == "Cast" and node.attribute("to") not in INTEGER_TYPES:
        return
    divide = node.producer(0, SAME_VALUES)
    if divide is None or not _divides(divide):
        return
    cast = divide.producer(0, SAME_VALUES)
    if cast is None or cast.op != "Cast" or cast.dtype(0) not in INTEGER_TYPES:
        return
    dtype, largest = cast.attribute("to"), largest_index(cast)
    if dtype not in EXACT:
        return
    exact = EXACT[dtype]
    reason = f"integers are divided as {type_name(dtype)}, which is exact up to {exact} only"
    if dtype == TensorProto.FLOAT16:
        reason += f" and infinite beyond {FP16_MAX:.0f}"
    if largest is not None:
        reason += f"; these go up to {largest}"
    certain = exact < 2**24 or (largest is not None and largest > exact)
    # Where the indices are small enough it still rests on the GPU's division being rounded
    # correctly: a multiplication by the reciprocal is off by one at exact multiples.
    yield (error if certain else warning)(node, reason, INTEGER_DIV)


def _divides(node: Node) -> bool:
    """Div of floats, or Mul by the reciprocal of an integer."""
    if node.op == "Div":
        return True
    factor = node.constant(1) if node.op == "Mul" else None
    if factor is None or factor.size != 1 or not 0 < abs(factor.item()) < 1:
        return False
    reciprocal = 1 / factor.item()
    return abs(reciprocal - round(reciprocal)) < 1e-3 * abs(reciprocal)


def largest_index(cast: Node) -> int | None:
    """The largest integer that reaches a Cast, where the graph tells: indices and constants."""
    value = cast.constant(0)
    if value is not None:
        return int(np.abs(value.astype(np.int64)).max(initial=0))
    source = cast.producer(0, SAME_VALUES)
    if source is None or source.op not in ("TopK", "ArgMax", "ArgMin"):
        return None
    size = source.size(0, source.attribute("axis", -1 if source.op == "TopK" else 0))
    return size - 1 if size else None


def cast_overflow(node: Node, target: Target) -> Iterator[Finding]:
    """A Cast to FP16 of what FP16 cannot hold."""
    if node.attribute("to") != TensorProto.FLOAT16:
        return
    value, integers = node.constant(0), node.dtype(0) in INTEGER_TYPES
    largest = largest_index(node) if integers else None
    if value is not None and not integers:
        largest = np.abs(value.astype(np.float64)).max(initial=0)
    if largest is None:
        return
    if largest > FP16_MAX:
        yield error(
            node,
            f"it makes FP16 of values up to {largest:g}, which become infinite beyond "
            f"{FP16_MAX:.0f}",
            "clamp the constant, or keep these values FLOAT or INT64",
        )
    elif integers and largest > EXACT[TensorProto.FLOAT16]:
        yield warning(
            node,
            f"it makes FP16 of integers up to {largest}, which are exact up to 2048 only",
            "keep indices and coordinates INT64 or FLOAT",
        )


def half_precision_squares(node: Node, target: Target) -> Iterator[Finding]:
    """A norm summed in FP16 overflows early."""
    if node.dtype(0) == TensorProto.FLOAT16:
        yield warning(
            node,
            "it sums squares in FP16, and the square of 256 is already infinite",
            "cast to FLOAT before it and back after the division",
        )


def double(node: Node, target: Target) -> Iterator[Finding]:
    """TensorRT computes DOUBLE as FLOAT."""
    if node.attribute("to") == TensorProto.DOUBLE:
        yield warning(
            node, "TensorRT computes DOUBLE as FLOAT, without a word", "compute in FLOAT or INT64"
        )


def infinite_constants(graph: Graph) -> Iterator[Finding]:
    """Constants of FP16 that are not finite any more."""
    tensors = [(name, tensor) for name, tensor in graph.constants.items()]
    values = [(name, numpy_helper.to_array(t)) for name, t in tensors if t.data_type == 10]
    for proto in graph.proto.node:
        if proto.op_type in ("Constant", "ConstantOfShape") and proto.domain in ("", "ai.onnx"):
            node = Node(proto, graph)
            values.append((node.label.removeprefix(graph.path), constant_value(node)))
    for name, value in values:
        if value is not None and value.dtype == np.float16 and not np.isfinite(value).all():
            yield Finding(
                "error",
                graph.path + name,
                "this FP16 constant holds infinity or NaN, as constants beyond ±65504 do after "
                "conversion",
                "clamp it to ±65504 before conversion, or keep it FLOAT",
            )


def graph_precision(model: onnx.ModelProto) -> str:
    """ "FP16" where any weight, constant or Cast of the file is FP16, else "FP32"."""
    half = TensorProto.FLOAT16
    if any(tensor.data_type == half for tensor in model.graph.initializer):
        return "FP16"
    for node in model.graph.node:
        for attribute in node.attribute:
            constant = attribute.HasField("t") and attribute.t.data_type == half
            if constant or (attribute.name == "to" and attribute.i == half):
                return "FP16"
    return "FP32"
