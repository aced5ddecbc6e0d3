"""What `torchvision::deform_conv2d` becomes in an ONNX file.

The model always calls torchvision's operator and the export chooses the translation: the native
`DeformConv` (opset 19, exporter based on torch.export), or standard operators (opsets 16 to 19,
exporter based on TorchScript), written from the operator's definition: Dai et al., arXiv
1703.06211, equation 2; with a mask Zhu et al., arXiv 1811.11168, equation 1.

In the shapes below, T is the number of taps of the kernel, H x W the size of the input, h x w
that of the output and N = h * w. Every offset group of every image is a map of its own: M maps of
C channels. Types are float32, and int64 for indices.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision  # noqa: F401  (registers the operator)
from onnxscript import FLOAT, opset19
from torch import Value
from torch.onnx import TensorProtoDataType, symbolic_helper

OPERATOR = "torchvision::deform_conv2d"
LAST = torch.iinfo(torch.int64).max  # where a Slice ends that goes to the end

Graph = Any  # what torch.onnx hands to a symbolic function; its class has no public name


def native_deform_conv(
    images: FLOAT,
    weight: FLOAT,
    offset: FLOAT,
    mask: FLOAT,
    bias: FLOAT,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> FLOAT:
    """`DeformConv` of opset 19, for the exporter based on torch.export.

    torchvision passes zeros for a bias or a mask that is not there. The zero bias is written,
    because TensorRT needs one beside a mask; the zero mask must not be read.
    """
    return opset19.DeformConv(
        images,
        weight,
        offset,
        bias,
        mask if use_mask else None,
        strides=[stride_h, stride_w],
        pads=[pad_h, pad_w, pad_h, pad_w],
        dilations=[dilation_h, dilation_w],
        group=groups,
        offset_group=offset_groups,
    )


# For `torch.onnx.export(..., dynamo=True, opset_version=19, custom_translation_table=...)`.
NATIVE_TRANSLATION = {torch.ops.torchvision.deform_conv2d.default: native_deform_conv}


@contextlib.contextmanager
def standard_deform_conv(sampling: str, opset_version: int) -> Iterator[None]:
    """While open, `torch.onnx.export(..., dynamo=False)` writes standard operators.

    `sampling` is "gather" (four look-ups per sample) or "gridsample" (GridSample);
    `opset_version` is that of the export, 16 to 19.
    """
    symbolic = make_symbolic(SAMPLERS[sampling])
    torch.onnx.register_custom_op_symbolic(OPERATOR, symbolic, opset_version)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(OPERATOR, opset_version)


def make_symbolic(sample: Callable[..., Value]) -> Callable[..., Value]:
    """The operator's symbolic function for torch.onnx, reading the maps by `sample`."""

    @symbolic_helper.parse_args(*["v"] * 5, *["i"] * 8, "b")
    def deform_conv2d(
        g: Graph,
        images: Value,
        weight: Value,
        offset: Value,
        mask: Value,
        bias: Value,
        stride_h: int,
        stride_w: int,
        pad_h: int,
        pad_w: int,
        dilation_h: int,
        dilation_w: int,
        groups: int,
        offset_groups: int,
        use_mask: bool,
    ) -> Value:
        _, group_channels, *kernel = weight.type().sizes()
        taps = torch.cartesian_prod(*map(torch.arange, kernel))  # [T, 2], (y, x)
        taps = taps * torch.tensor([dilation_h, dilation_w]) - torch.tensor([pad_h, pad_w])
        channels = group_channels * groups // offset_groups
        maps = reshape(g, images, -1, channels, 0, 0)  # [M, C, H, W]
        y = positions(g, maps, offset, 0, taps[:, 0], stride_h)
        x = positions(g, maps, offset, 1, taps[:, 1], stride_w)
        samples = sample(g, maps, y, x)
        if use_mask:
            mask = reshape(g, reshape(g, mask, -1, len(taps), 0, 0), 0, 1, len(taps), -1)
            samples = g.op("Mul", samples, g.op("Transpose", mask, perm_i=[0, 1, 3, 2]))
        return weighted_sum(g, samples, weight, bias, groups, offset)

    return deform_conv2d


def positions(
    g: Graph, maps: Value, offset: Value, axis: int, taps: torch.Tensor, stride: int
) -> Value:
    """Where the maps are read along `axis` (0: y, 1: x): [M, N, T] in pixels.

    `taps` [T] is where the taps of the first output pixel are without offsets.
    """
    # The channels of `offset` are (dy, dx), interleaved per tap.
    by_pixel = reshape(g, offset, -1, 2 * len(taps), 0, 0)
    by_pixel = g.op("Transpose", by_pixel, perm_i=[0, 2, 3, 1])  # [M, h, w, 2 * T]
    bounds = (constant(g, [n]) for n in (axis, LAST, 3, 2))
    output = to_float(g, arange(g, size(g, offset, 2 + axis)))
    output = g.op("Mul", output, constant(g, float(stride)))
    output = reshape(g, output, *((-1, 1, 1) if axis == 0 else (-1, 1)))
    base = g.op("Add", output, constant(g, taps.float()))
    position = g.op("Add", g.op("Slice", by_pixel, *bounds), base)  # [M, h, w, T]
    # From one pixel outside on all is zero; far positions would not fit into an index.
    limit = to_float(g, size(g, maps, 2 + axis))
    return reshape(g, g.op("Clip", position, constant(g, -1.0), limit), 0, -1, len(taps))


def sample_by_gather(g: Graph, maps: Value, y: Value, x: Value) -> Value:
    """Bilinear samples of the maps, zero outside: [M, C, N, T]."""
    height, width = size(g, maps, 2), size(g, maps, 3)
    pixels = g.op("Transpose", maps, perm_i=[0, 2, 3, 1])
    pixels = g.op("Flatten", pixels, axis_i=3)  # [M * H * W, C]: one look-up takes all channels
    first = g.op("Mul", arange(g, size(g, maps, 0)), g.op("Mul", height, width))
    first = reshape(g, first, -1, 1, 1)  # row of `pixels` where each map begins
    columns = neighbours(g, x, width)
    terms = []
    for row, row_weight in neighbours(g, y, height):
        begin = g.op("Add", first, g.op("Mul", row, width))
        for column, column_weight in columns:
            values = g.op("Gather", pixels, g.op("Add", begin, column), axis_i=0)  # [M, N, T, C]
            weight = unsqueeze(g, g.op("Mul", row_weight, column_weight), 3)
            terms.append(g.op("Mul", values, weight))
    return g.op("Transpose", g.op("Sum", *terms), perm_i=[0, 3, 1, 2])


def neighbours(g: Graph, position: Value, length: Value) -> list[tuple[Value, Value]]:
    """Index and weight of both pixels around each position, along an axis of `length` pixels.

    A pixel outside has weight 0 and the index of the nearest inside.
    """
    low = g.op("Floor", position)
    high = g.op("Add", low, constant(g, 1.0))
    last = g.op("Sub", length, constant(g, 1))
    pairs = []
    for pixel, other in ((low, high), (high, low)):
        nominal = g.op("Cast", pixel, to_i=TensorProtoDataType.INT64)
        index = g.op("Clip", nominal, constant(g, 0), last)
        inside = to_float(g, g.op("Equal", index, nominal))
        weight = g.op("Abs", g.op("Sub", position, other))
        pairs.append((index, g.op("Mul", weight, inside)))
    return pairs


def sample_by_gridsample(g: Graph, maps: Value, y: Value, x: Value) -> Value:
    """Bilinear samples of the maps, zero outside: [M, C, N, T]."""
    grid = [unsqueeze(g, normalise(g, p, size(g, maps, axis)), 3) for p, axis in ((x, 3), (y, 2))]
    return g.op(
        "GridSample",
        maps,
        g.op("Concat", *grid, axis_i=3),  # [M, N, T, 2]
        mode_s="bilinear",
        padding_mode_s="zeros",
        align_corners_i=0,  # with 1 there is no position outside a map of one pixel
    )


def normalise(g: Graph, position: Value, length: Value) -> Value:
    """Pixels to GridSample's range: -1 and 1 are the outer edges of the first and last pixel."""
    length = to_float(g, length)
    # (2 p + 1 - length) / length is rounded less than 2 (p + 0.5) / length - 1.
    twice = g.op("Mul", position, constant(g, 2.0))
    centred = g.op("Add", twice, g.op("Sub", constant(g, 1.0), length))
    return g.op("Div", centred, length)


SAMPLERS = {"gather": sample_by_gather, "gridsample": sample_by_gridsample}


def weighted_sum(
    g: Graph, samples: Value, weight: Value, bias: Value, groups: int, offset: Value
) -> Value:
    """Samples [M, C, N, T] times the kernels, plus the bias: [B, out, h, w], sized as `offset`.

    The sum over taps and channels is a convolution along the taps, which reads the samples as they
    lie in memory where channels come last.
    """
    out_channels, group_channels, *kernel = weight.type().sizes()
    taps = math.prod(kernel)
    sums = g.op(
        "Conv",
        reshape(g, samples, -1, group_channels * groups, 0, taps),
        reshape(g, weight, out_channels, group_channels, 1, taps),
        bias,
        group_i=groups,
        kernel_shape_i=[1, taps],
    )
    spatial = [reshape(g, size(g, offset, axis), 1) for axis in (2, 3)]
    shape = g.op("Concat", constant(g, [-1, out_channels]), *spatial, axis_i=0)
    return g.op("Reshape", sums, shape)


def constant(g: Graph, value: Any) -> Value:
    """A tensor of `value`: float32 of floats, int64 of integers."""
    return g.op("Constant", value_t=torch.as_tensor(value))


def reshape(g: Graph, value: Value, *shape: int) -> Value:
    """`value` as `shape`, where 0 keeps the length of that axis and -1 takes the rest."""
    return g.op("Reshape", value, constant(g, shape))


def unsqueeze(g: Graph, value: Value, axis: int) -> Value:
    """`value` with a new axis of length 1."""
    return g.op("Unsqueeze", value, constant(g, [axis]))


def to_float(g: Graph, value: Value) -> Value:
    """`value` as float32."""
    return g.op("Cast", value, to_i=TensorProtoDataType.FLOAT)


def arange(g: Graph, length: Value) -> Value:
    """0, 1, ... `length` - 1."""
    return g.op("Range", constant(g, 0), length, constant(g, 1))


def size(g: Graph, value: Value, axis: int) -> Value:
    """Length of one axis: a constant where it is known at export."""
    known = value.type().varyingSizes()
    if known is not None and known[axis] is not None:
        return constant(g, known[axis])
    return g.op("Gather", g.op("Shape", value), constant(g, axis))
