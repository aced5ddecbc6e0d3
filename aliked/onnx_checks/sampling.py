"""Rules for the operators that read an image at positions of their own: sampling and resizing."""

from collections.abc import Iterator

from onnx import TensorProto

from aliked.onnx_checks.finding import Finding, Target, error, warning
from aliked.onnx_checks.graph import HALF_TYPES, Node, type_name

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
