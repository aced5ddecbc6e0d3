"""Rules for numbers that the chosen type cannot hold: indices in floats, constants in FP16."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, numpy_helper

from aliked.export.onnx_graph import (
    FLOAT_TYPES,
    HALF_TYPES,
    INTEGER_TYPES,
    SAME_VALUES,
    Finding,
    Graph,
    Node,
    Target,
    constant_value,
    default_opset,
    error,
    graphs,
    load_model,
    type_name,
    warning,
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


GATHER = "export with --sampling gather, which has no GridSample"
DECOMPOSE = "export with --deform_conv gather or --deform_conv gridsample"
MAX_BATCH = 32  # of the standard plugin behind DeformConv; multiples of it are fine too
RESIZE_FRAMES = (
    "half_pixel",
    "pytorch_half_pixel",
    "tf_half_pixel_for_nn",
    "asymmetric",
    "align_corners",
)


def grid_sample(node: Node, target: Target) -> Iterator[Finding]:
    """GridSample's mode names, types and rank."""
    mode = node.attribute("mode", "bilinear" if node.opset < 20 else "linear")
    if node.opset >= 20 and mode != "nearest":
        yield error(
            node,
            f"mode {mode!r} is a name of opset 20 and later (here {node.opset}), which TensorRT "
            "reads as nearest neighbour without a word",
            f"export with --opset_version 19 or below, or {GATHER}",
        )
    image, grid = node.dtype(0), node.dtype(1)
    if image and grid and image != grid:
        yield error(
            node,
            f"the input is {type_name(image)} and the grid {type_name(grid)}; TensorRT needs one "
            "type for both",
            "cast the input to FLOAT before it and the result back after it",
        )
    if grid in HALF_TYPES:
        yield error(
            node,
            f"the grid is {type_name(grid)}: {_grid_step(node, grid)}",
            f"keep the grid and this operator in FLOAT, as --precision fp16 does, or {GATHER}",
        )
    if (shape := node.shape(0)) and len(shape) == 5:
        yield error(node, "TensorRT before 11.2 samples only 4-D inputs", "sample slice by slice")


def _grid_step(node: Node, grid: int) -> str:
    """How far two neighbouring coordinates are apart near 1, the border of the image."""
    bits = 11 if grid == TensorProto.FLOAT16 else 8
    width = node.size(0, -1)
    pixels = f", {width / 2 ** (bits + 1):.2g} pixel at width {width}" if width else ""
    return f"its coordinates are steps of 2^-{bits} near the border{pixels}"


def deform_conv(node: Node, target: Target) -> Iterator[Finding]:
    """Limits of ModulatedDeformConv2d, the plugin that DeformConv becomes."""
    pads = node.attribute("pads", [])
    half = len(pads) // 2
    if pads[:half] != pads[half:]:
        yield error(node, f"pads {pads} differ between begin and end", "put a Pad before it")
    types = {node.dtype(index) for index in range(len(node.proto.input)) if node.name(index)} - {0}
    if len(types) > 1 or types - {TensorProto.FLOAT, TensorProto.FLOAT16}:
        names = " and ".join(sorted(map(type_name, types)))
        yield error(
            node,
            f"its inputs are {names}; TensorRT needs them all FLOAT or all FLOAT16",
            "cast them to one type before it",
        )
    if node.name(4) and not node.name(3):
        yield error(
            node,
            "it has a mask and no bias, which makes TensorRT's parser read a missing tensor",
            "write a bias of zeros",
        )
    if (shape := node.shape(0)) and len(shape) > 4:
        yield error(node, "TensorRT has it for 1-D and 2-D images only", DECOMPOSE)
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


def resize(node: Node, target: Target) -> Iterator[Finding]:
    """What TensorRT's Resize leaves out."""
    frame = node.attribute("coordinate_transformation_mode", "half_pixel")
    mode = node.attribute("mode", "nearest")
    policy = node.attribute("keep_aspect_ratio_policy", "stretch")
    if node.attribute("antialias", 0):
        yield error(node, "TensorRT's Resize has no antialias", "resize without it")
    if policy != "stretch":
        yield error(node, f"keep_aspect_ratio_policy {policy!r} is unknown to it", "use stretch")
    if frame not in RESIZE_FRAMES:
        cure = f"use one of {', '.join(RESIZE_FRAMES)}"
        yield error(node, f"coordinate_transformation_mode {frame!r} is unknown to it", cure)
    scales, limit = node.constant(2), {"linear": 3, "cubic": 2}.get(mode)
    if limit and scales is not None and (scales != 1).sum() > limit:
        yield error(
            node,
            f"mode {mode!r} may change {limit} dimensions, these scales change "
            f"{(scales != 1).sum()}",
            "resize in two steps",
        )


MAX_TOP_K = 3840
MAX_ELEMENTS = 2**31  # of TopK's input
PAD_MODES = ("constant", "reflect", "edge", "wrap")
TOP_K_TYPES = FLOAT_TYPES | {TensorProto.INT32, TensorProto.INT64}


def top_k(node: Node, target: Target) -> Iterator[Finding]:
    """TopK's limits on k, axis, size and type."""
    value = node.attribute("k") if node.opset < 10 else node.constant(1)
    axis = node.attribute("axis", -1)
    shape, dtype = node.shape(0), node.dtype(0)
    if value is None:
        yield warning(
            node,
            f"k is computed at run time; above {MAX_TOP_K} TensorRT refuses it",
            "export with a fixed --top_k",
        )
    else:
        yield from _top_k_value(node, int(value.item() if node.opset >= 10 else value), axis)
    if shape and -len(shape) <= axis < len(shape) and axis % len(shape) < len(shape) - 4:
        yield error(node, "its axis is not among the last four", "transpose before it")
    if shape and all(shape) and _product(shape) >= MAX_ELEMENTS:
        yield error(node, "its input has 2^31 elements or more", "use smaller images or batches")
    if dtype and dtype not in TOP_K_TYPES:
        yield error(node, f"it does not take {type_name(dtype)}", "cast to FLOAT before it")


def _top_k_value(node: Node, k: int, axis: int) -> Iterator[Finding]:
    size = node.size(0, axis)
    if k > MAX_TOP_K:
        yield error(
            node,
            f"k is {k}, TensorRT's limit is {MAX_TOP_K}",
            "export again with convert_pytorch_to_onnx.py --top_k, which above that limit writes "
            "an exact TopK in two levels",
        )
    if size and k > size:
        yield error(node, f"k is {k} and the axis has {size} elements", "choose a smaller --top_k")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def reduce(node: Node, target: Target) -> Iterator[Finding]:
    """The axes of a reduction must be in the file."""
    if node.name(1) and node.constant(1) is None:
        yield error(
            node,
            "its axes are computed, TensorRT needs them constant",
            "write the axes as an initializer",
        )


def data_dependent(node: Node, target: Target) -> Iterator[Finding]:
    """The size of the output is known only after running."""
    yield error(
        node,
        "the size of its output depends on the data: TensorRT refuses it or needs an output "
        "allocator, which excludes CUDA graphs and which this project's backend does not have",
        "use TopK with a fixed k and a threshold afterwards",
    )


def scatter_nd(node: Node, target: Target) -> Iterator[Finding]:
    """TensorRT scatters, it does not accumulate."""
    reduction = node.attribute("reduction", "none")
    if reduction != "none":
        cure = "write it as a one-hot MatMul, or as ScatterElements"
        yield error(node, f"reduction {reduction!r} is refused", cure)


def scatter_elements(node: Node, target: Target) -> Iterator[Finding]:
    """With a reduction it becomes a plugin."""
    reduction = node.attribute("reduction", "none")
    if reduction != "none" and target.version_compatible:
        yield error(
            node,
            f"with reduction {reduction!r} it becomes a plugin that version-compatible engines "
            "cannot carry",
            "build without --version_compatible",
        )


def pad(node: Node, target: Target) -> Iterator[Finding]:
    """Pad's modes and types."""
    mode = node.attribute("mode", "constant")
    if mode not in PAD_MODES:
        yield error(node, f"mode {mode!r} is unknown to it", f"use one of {', '.join(PAD_MODES)}")


def max_pool(node: Node, target: Target) -> Iterator[Finding]:
    """MaxPool without indices and dilations."""
    if len(node.proto.output) > 1 and node.proto.output[1]:
        yield error(node, "TensorRT's MaxPool gives no Indices", "find the maxima by comparing")
    if any(dilation != 1 for dilation in node.attribute("dilations", [])):
        yield error(node, "TensorRT's MaxPool has no dilations", "use dilations of 1")


def einsum(node: Node, target: Target) -> Iterator[Finding]:
    """Einsum's types and letters."""
    dtype, equation = node.dtype(0), node.attribute("equation", "")
    if dtype and dtype not in FLOAT_TYPES:
        yield error(node, f"it does not take {type_name(dtype)}", "write it as MatMul or Mul")
    if equation != equation.lower():
        yield error(node, f"equation {equation!r} has capital letters", "use a to z")


def uint8_inside(node: Node, target: Target) -> Iterator[Finding]:
    """TensorRT has UINT8 at the border of a network only, to be cast at once."""
    computes = node.op not in ("Cast", "Identity")
    if computes and any(node.dtype(i) == TensorProto.UINT8 for i in range(len(node.proto.input))):
        yield error(
            node,
            "it takes UINT8, which TensorRT knows as network input and output only",
            "cast to FLOAT directly behind the network's input, and transpose or pad after that",
        )


def unknown_operator(node: Node, target: Target) -> Iterator[Finding]:
    """Operators of other domains are looked up as plugins."""
    if node.proto.domain not in ("", "ai.onnx"):
        yield warning(
            node,
            f"{node.proto.domain}::{node.op} is not a standard operator; TensorRT looks for a "
            "plugin of that name",
            "register the plugin before the build, or export with standard operators",
        )


OPSETS = range(9, 25)  # that TensorRT 10.13 to 11.4 read
ANY_TARGET = Target()
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")

Rule = Callable[[Node, Target], Iterator[Finding]]
RULES: dict[str, tuple[Rule, ...]] = {
    "GridSample": (grid_sample,),
    "DeformConv": (deform_conv,),
    "Resize": (resize,),
    "TopK": (top_k,),
    "ScatterND": (scatter_nd,),
    "ScatterElements": (scatter_elements,),
    "Pad": (pad,),
    "MaxPool": (max_pool,),
    "Einsum": (einsum,),
    "Floor": (float_division,),
    "Cast": (float_division, cast_overflow, double),
    "LpNormalization": (half_precision_squares,),
    **dict.fromkeys(("NonZero", "Compress", "Unique", "NonMaxSuppression"), (data_dependent,)),
    **{f"Reduce{name}": (reduce,) for name in REDUCTIONS},
}
for _name in ("ReduceL2", "ReduceSumSquare"):
    RULES[_name] += (half_precision_squares,)
EVERY_NODE: tuple[Rule, ...] = (uint8_inside, unknown_operator)


def check_file(path: Path, target: Target = ANY_TARGET) -> list[Finding]:
    """The findings of an ONNX file, errors first; `InputError` where it is not one."""
    return check_model(load_model(path), target)


def check_model(model: onnx.ModelProto, target: Target = ANY_TARGET) -> list[Finding]:
    """The findings of a model, errors first; it is not changed."""
    findings = list(_check_file_level(model))
    typed, contradiction = _with_types(model)
    findings += contradiction
    for graph in graphs(typed):
        findings += infinite_constants(graph)
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
