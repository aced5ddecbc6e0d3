"""Rules for the operators that select, reduce and move elements, and for their types."""

from collections.abc import Iterator

from onnx import TensorProto

from aliked.onnx_checks.finding import Finding, Target, error, warning
from aliked.onnx_checks.graph import FLOAT_TYPES, Node, type_name

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
