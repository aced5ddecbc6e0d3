"""What a library would misread in an ONNX file, or refuse without saying what to do instead.

The file is held against ONNX's own checker first. The rules after that are for what TensorRT and
TensorRT for RTX do without a word, and for limits that show only when an engine is built or run.
What their parsers refuse in clear words they say themselves (`aliked.export.builder`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, numpy_helper

from aliked.backends.tensorrt_library import RTX
from aliked.configs import MAX_TOP_K
from aliked.export.onnx_graph import (
    HALF_TYPES,
    INTEGER_TYPES,
    SAME_VALUES,
    Finding,
    Graph,
    Node,
    Target,
    constant_of,
    error,
    graphs,
    load_model,
    type_name,
    warning,
)


def check_file(path: Path, target: Target | None = None) -> list[Finding]:
    """The findings of an ONNX file, errors first; `InputError` where it is not one."""
    return check_model(load_model(path), target)


def check_model(model: onnx.ModelProto, target: Target | None = None) -> list[Finding]:
    """The findings of a model, errors first; it is not changed."""
    target = target or Target()
    try:
        onnx.checker.check_model(model)
        check_constants(model.graph)
        inlined = onnx.inliner.inline_local_functions(model) if model.functions else model
        typed = onnx.shape_inference.infer_shapes(inlined, data_prop=True)
    except INVALID as problem:
        reason = " ".join(str(problem).split("==>")[0].split())[:300] or "no reason given"
        return [Finding("error", NOT_VALID, f"not valid ONNX: {reason}", "export it again")]
    findings: list[Finding] = []
    for graph in graphs(typed):
        findings += infinite_constants(graph)
        for proto in graph.proto.node:
            node = Node(proto, graph)
            for rule in RULES.get(node.op, ()) if proto.domain in ("", "ai.onnx") else ():
                findings += rule(node, target)
    return sorted(findings, key=lambda finding: finding.severity != "error")


NOT_VALID = "(model)"  # where a file is no ONNX that a library could read
INVALID = (  # what ONNX's own tools raise for a file that is not valid
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    UnicodeDecodeError,
)


def check_constants(graph: onnx.GraphProto) -> None:
    """Raise `ValidationError` for constants that ONNX's checker lets through.

    These are of no type, or have more or fewer values than their shape.
    """
    held = (a.t for node in graph.node for a in node.attribute if a.HasField("t"))
    for tensor in (*graph.initializer, *held):
        if tensor.data_type not in TensorProto.DataType.values()[1:]:
            raise onnx.checker.ValidationError(f"{tensor.name} has the type {tensor.data_type}")
        try:
            numpy_helper.to_array(tensor)
        except (ValueError, TypeError, OverflowError) as error:
            raise onnx.checker.ValidationError(
                f"{tensor.name} has other values than its shape"
            ) from error


# Operators

GATHER = "export with --sampling gather, which has no GridSample"
DECOMPOSE = "export with --deform_conv gridsample or --deform_conv gather"
MAX_BATCH = 32  # of the standard plugin behind DeformConv; multiples of it are fine too


def grid_sample(node: Node, target: Target) -> Iterator[Finding]:
    """GridSample's mode names and the steps of its coordinates, both taken without a word."""
    mode = node.attribute("mode", "bilinear" if node.opset < 20 else "linear")
    renamed = node.opset >= 20 and mode != "nearest"
    if renamed and target.library != RTX.title:  # 1.6.1 was seen to read the new names rightly
        yield error(
            node,
            f"mode {mode!r} is a name of opset 20 and later (here {node.opset}), which TensorRT "
            "reads as nearest neighbour without a word",
            f"export with --opset_version 19 or below, or {GATHER}",
        )
    grid = node.dtype(1)
    if grid in HALF_TYPES:
        yield error(
            node,
            f"the grid is {type_name(grid)}: {_grid_step(node, grid)}",
            f"keep the grid and this operator in FLOAT, as --precision fp16 does, or {GATHER}",
        )


def _grid_step(node: Node, grid: int) -> str:
    """How far two neighbouring coordinates are apart near 1, the border of the image."""
    bits = 11 if grid == TensorProto.FLOAT16 else 8
    width = node.size(0, -1)
    pixels = f", {width / 2 ** (bits + 1):.2g} pixel at width {width}" if width else ""
    return f"its coordinates are steps of 2^-{bits} near the border{pixels}"


def deform_conv(node: Node, target: Target) -> Iterator[Finding]:
    """Limits of ModulatedDeformConv2d, the plugin of TensorRT's that DeformConv becomes."""
    if target.library == RTX.title:
        yield error(node, "TensorRT for RTX has no plugin for it", DECOMPOSE)
        return
    if node.name(4) and not node.name(3):
        yield error(
            node,
            "it has a mask and no bias, which makes TensorRT's parser read a missing tensor",
            "write a bias of zeros",
        )
    if target.version_compatible:
        yield error(
            node,
            "it becomes a plugin that version-compatible engines cannot carry",
            f"{DECOMPOSE}, or build without --version_compatible",
        )
    yield from _deform_conv_batch(node, target)


def _deform_conv_batch(node: Node, target: Target) -> Iterator[Finding]:
    batch = node.size(0, 0) or target.max_batch
    limit = f"a batch of at most {MAX_BATCH} or a multiple of it"
    if batch is None:
        yield warning(
            node, f"it takes {limit}, and the batch is dynamic", "keep --max_shape within that"
        )
    elif batch > MAX_BATCH and (batch % MAX_BATCH or node.size(0, 0) is None):
        cure = f"choose a smaller batch, or {DECOMPOSE}"
        yield error(node, f"it takes {limit}, not {batch}", cure)


def top_k(node: Node, target: Target) -> Iterator[Finding]:
    """TopK's limit on k, which the builder finds and the parser does not."""
    value = node.attribute("k") if node.opset < 10 else node.constant(1)
    if value is None:
        yield warning(
            node,
            f"k is computed at run time; above {MAX_TOP_K} TensorRT refuses it",
            "export with a fixed --top_k",
        )
        return
    k, size = int(np.max(value, initial=0)), node.size(0, node.attribute("axis", -1))
    if k > MAX_TOP_K:
        yield error(
            node,
            f"k is {k}, TensorRT's limit is {MAX_TOP_K}",
            "export again with convert_pytorch_to_onnx.py --top_k, which above that limit writes "
            "several TopK that give exactly the same",
        )
    if size and k > size:
        yield error(node, f"k is {k} and the axis has {size} elements", "choose a smaller --top_k")


# Numbers that the chosen type cannot hold: indices in floats, constants in FP16

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
    values = [
        (name, numpy_helper.to_array(tensor))
        for name, tensor in graph.constants.items()
        if tensor.data_type == TensorProto.FLOAT16
    ]
    for proto in graph.proto.node:
        if proto.op_type in ("Constant", "ConstantOfShape") and proto.domain in ("", "ai.onnx"):
            node = Node(proto, graph)
            values.append((node.label.removeprefix(graph.path), constant_of(proto)))
    for name, value in values:
        if value is not None and value.dtype == np.float16 and not np.isfinite(value).all():
            yield Finding(
                "error",
                graph.path + name,
                "this FP16 constant holds infinity or NaN, as constants beyond ±65504 do after "
                "conversion",
                "clamp it to ±65504 before conversion, or keep it FLOAT",
            )


def selu(node: Node, target: Target) -> Iterator[Finding]:
    """Selu's parameters, where the file leaves them to ONNX's definition."""
    left_out = None in (node.attribute("alpha"), node.attribute("gamma"))
    if left_out and target.library != RTX.title:  # which gets them from `build_plan`
        yield warning(
            node,
            "it leaves alpha and gamma to ONNX's definition (1.67326 and 1.05070), and TensorRT's "
            "parser takes 1.6732 and 1.0507, which float32 shows",
            "export it again",
        )


Rule = Callable[[Node, Target], Iterator[Finding]]
RULES: dict[str, tuple[Rule, ...]] = {
    "GridSample": (grid_sample,),
    "DeformConv": (deform_conv,),
    "TopK": (top_k,),
    "Floor": (float_division,),
    "Cast": (float_division, cast_overflow, double),
    "LpNormalization": (half_precision_squares,),
    "ReduceL2": (half_precision_squares,),
    "ReduceSumSquare": (half_precision_squares,),
    "Selu": (selu,),
}
