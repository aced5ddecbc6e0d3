"""The graph that TensorRT for RTX is given: the file's own, in forms that it runs faster.

It takes its kernels by rules and does not time them. What each form brings, in half precision and
for images of one size, is in docs/tensorrt-graph.md. The ONNX file stays as it is, for every
runtime. Of these forms TensorRT itself gets one, LightGlue's sums in float32.
"""

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from aliked.export.onnx_graph import spell_out_selu
from aliked.export.rewriter import Nodes, Rewriter, attributes_of, is_plain, wide_kernel
from aliked.export.rtx_keypoints import choose_by_logits, read_by_place

FOLDED = {"Abs", "Cast", "LessOrEqual", "Sub"}  # what the exporters leave of large constants
PIXELS = 2**17  # of a map for which wide convolutions are faster
FEW = 1024  # pixels of a map up to which a convolution is better spread over its taps
AT_ONCE = {4: 4, 8: 4}  # by the channels that come out: pixels that a convolution gives
SIDE, TAPS = 3, 9  # of a deformable convolution
XY = np.arange(2 * TAPS).reshape(TAPS, 2)[:, ::-1].ravel()  # channels of (y, x) per tap as (x, y)
# What the export makes of offsets, from the grid of a GridSample back to their convolution.
FROM_GRID = ("Concat", "Unsqueeze", "Div", "Add", "Mul", "Reshape", "Clip", "Add", "Slice")
FROM_GRID += ("Transpose", "Reshape", "Clip", "Cast", "Conv")


def for_rtx(model: onnx.ModelProto, pixels: int = PIXELS) -> onnx.ModelProto:
    """The same function of the same inputs, `model` being left as it is."""
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    spell_out_selu(rewritten)  # files that were exported earlier leave its parameters out
    fold_large(Rewriter(rewritten))
    spread_offsets(Rewriter(rewritten))
    sum_samples(Rewriter(rewritten))
    fuse_selu(Rewriter(rewritten))
    selu_in_float32(Rewriter(rewritten))
    choose_by_logits(Rewriter(rewritten))
    read_by_place(Rewriter(rewritten))
    pass_inputs_on(Rewriter(rewritten))
    widen(Rewriter(rewritten), pixels)
    average(Rewriter(rewritten))
    return sum_in_float32(rewritten)


def fold_large(rewriter: Rewriter) -> None:
    """Evaluate what depends on constants only: an engine would do it again with every image."""
    nodes = []
    for node in rewriter.graph.node:
        inputs = [rewriter.constants.get(name) for name in node.input]
        if node.op_type in FOLDED and all(inputs):
            values = dict(zip(node.input, map(numpy_helper.to_array, inputs), strict=True))
            (value,) = ReferenceEvaluator(node).run(None, values)
            rewriter.constant(node.output[0], value)
        else:
            nodes.append(node)
    rewriter.finish(nodes)


def spread_offsets(rewriter: Rewriter) -> None:
    """Give 3x3 convolutions for offsets more channels: the library has slow kernels for 18.

    On maps of more than `FEW` pixels they are filled up with zeros. On smaller ones, whose long
    sums few blocks would do one after another, the convolution is one of 1x1 that gives what every
    tap adds, and the positions add that up. A block's shortcut joins its first convolution.
    """
    instead: dict[str, Nodes] = {}
    for sample in rewriter.graph.node:
        if sample.op_type != "GridSample":
            continue
        steps = rewriter.preceding(sample.input[1], *FROM_GRID)
        if len(steps) < len(FROM_GRID) or not is_plain(rewriter, steps[-1]):
            continue
        grid, clip, conv = steps[0].output[0], steps[-3], steps[-1]
        height, width = rewriter.shape(conv.input[0])[2:]
        if rewriter.shape(grid) != [1, height * width, TAPS, 2]:
            continue
        shortcut = _shortcut(rewriter, conv.input[0])
        if shortcut is not None:
            instead[shortcut.output[0]] = Nodes(rewriter, "")
        give = _spread if height * width <= FEW else _filled
        new = instead[conv.output[0]] = Nodes(rewriter, conv.output[0])
        offsets = instead[grid] = Nodes(rewriter, grid)
        _to_grid(offsets, give(new, offsets, conv, shortcut), conv, clip)
    rewriter.replace(instead)


def _shortcut(rewriter: Rewriter, name: str) -> onnx.NodeProto | None:
    """A 1x1 convolution of a tensor, with a bias, that only one sum reads."""
    for node in rewriter.users[name]:
        with_bias = is_plain(rewriter, node, side=1) and len(node.input) == 3
        if with_bias and rewriter.following(node, "Add"):
            return node
    return None


def _filled(new: Nodes, later: Nodes, conv: onnx.NodeProto, shortcut: onnx.NodeProto | None) -> str:
    """Offsets [1, h, w, 18] of a convolution with a multiple of 64 channels."""
    rewriter = new.rewriter
    kernel, bias = (rewriter.value(name)[XY] for name in conv.input[1:])
    if shortcut is not None:
        weight, more = (rewriter.value(name) for name in shortcut.input[1:])
        kernel = np.concatenate([kernel, np.pad(weight, ((0, 0), (0, 0), (1, 1), (1, 1)))])
        bias = np.concatenate([bias, more])
    done, zeros = len(bias), -len(bias) % 64
    kernel, bias = np.pad(kernel, ((0, zeros),) + ((0, 0),) * 3), np.pad(bias, (0, zeros))
    size = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    given = new.add("Conv", conv.input[0], kernel, bias, **size)
    if shortcut is not None:
        new.part(given, [1], [2 * TAPS], [done], out=shortcut.output[0])
    x = later.add("Transpose", later.add("Cast", given, to=TensorProto.FLOAT), perm=[0, 2, 3, 1])
    return later.part(x, [3], [0], [2 * TAPS])


def _spread(new: Nodes, later: Nodes, conv: onnx.NodeProto, shortcut: onnx.NodeProto | None) -> str:
    """Offsets [1, h, w, 18] as sums of what the taps add, each shifted to its place."""
    rewriter = new.rewriter
    height, width = rewriter.shape(conv.input[0])[2:]
    weight, bias = (rewriter.value(name)[XY] for name in conv.input[1:])
    kernels = [weight[:, :, tap // 3, tap % 3] for tap in range(TAPS)]
    if shortcut is not None:
        kernels.append(rewriter.value(shortcut.input[1])[..., 0, 0])
    kernel = np.concatenate(kernels)[..., None, None]
    done, zeros = len(kernel), -len(kernel) % 64
    kernel = np.pad(kernel, ((0, zeros),) + ((0, 0),) * 3)
    given = new.add("Conv", conv.input[0], kernel, kernel_shape=[1, 1], pads=[1, 1, 1, 1])
    if shortcut is not None:
        ends = [done, height + 1, width + 1]
        inner = new.part(given, [1, 2, 3], [2 * TAPS * TAPS, 1, 1], ends)
        more = rewriter.value(shortcut.input[2])[:, None, None]
        new.add("Add", inner, more, out=shortcut.output[0])
    x = later.add("Transpose", later.add("Cast", given, to=TensorProto.FLOAT), perm=[0, 2, 3, 1])
    parts = []
    for tap in range(TAPS):
        row, column, first = tap // 3, tap % 3, 2 * TAPS * tap
        ends = [row + height, column + width, first + 2 * TAPS]
        parts.append(later.part(x, [1, 2, 3], [row, column, first], ends))
    return later.add("Add", later.fold("Add", parts), bias.astype(np.float32))


def _to_grid(new: Nodes, offsets: str, conv: onnx.NodeProto, clip: onnx.NodeProto) -> None:
    """Make offsets [1, h, w, 18], (x, y) per tap, the grid [1, h * w, 9, 2] that `new` is named."""
    height, width = new.rewriter.shape(conv.input[0])[2:]
    size = np.array([width, height])
    row, column, tap = np.ogrid[:height, :width, :TAPS]
    places = np.stack(np.broadcast_arrays(column + tap % 3 - 1, row + tap // 3 - 1), axis=-1)
    places = (2 * places + 1 - size) / size  # the first and last pixel's outer edges at -1 and 1
    offsets = new.add("Clip", offsets, *clip.input[1:])
    offsets = new.add("Mul", offsets, np.tile(2 / size, TAPS).astype(np.float32))
    places = places.reshape(1, height, width, 2 * TAPS).astype(np.float32)
    new.add("Reshape", new.add("Add", offsets, places), np.array([1, -1, TAPS, 2]), out=new.name)


def sum_samples(rewriter: Rewriter) -> None:
    """Let the sum over the samples of a deformable convolution give a map, without a Reshape.

    The samples of a pixel come to lie as the taps do, in blocks of 3x3, and their sum is a
    convolution with a stride of 3; what follows becomes part of it. As rows of 9 with a stride of
    9 the library (1.6.1) computes other values: the tensor cores' loads know strides up to 8.
    """
    instead: dict[str, Nodes] = {}
    for sample in rewriter.graph.node:
        chain = rewriter.following(sample, "Reshape", "Conv", "Reshape", "Cast")
        if sample.op_type != "GridSample" or len(chain) < 4:
            continue
        conv, half = chain[1], chain[3].output[0]
        weight = rewriter.value(conv.input[1])
        if not rewriter.is_half(half) or weight.shape[2:] != (1, TAPS):
            continue
        batch, _, height, width = rewriter.shape(half)
        new = instead[half] = Nodes(rewriter, conv.output[0])
        blocks = np.array([batch, height, width, SIDE, SIDE, 2])
        grid = new.add("Reshape", sample.input[1], blocks)
        grid = new.add("Transpose", grid, perm=[0, 1, 3, 2, 4, 5])
        grid = new.add("Reshape", grid, np.array([batch, height * SIDE, width * SIDE, 2]))
        samples = new.add("GridSample", sample.input[0], grid, **attributes_of(sample))
        window = {"kernel_shape": [SIDE, SIDE], "strides": [SIDE, SIDE]}
        kernel = weight.reshape(*weight.shape[:2], SIDE, SIDE)
        total = new.add("Conv", samples, kernel, *conv.input[2:], **window)
        new.add("Cast", total, out=half, to=TensorProto.FLOAT16)
    rewriter.replace(instead)


def fuse_selu(rewriter: Rewriter) -> None:
    """Write Selu as Elu and a factor, which become part of the convolution before them.

    Not behind the sum of the levels, whose convolution can run beside the encoder. Where the
    result is also wanted in float32, a factor of one makes that cast part of the convolution too.
    """
    instead: dict[str, Nodes] = {}
    for node in rewriter.graph.node:
        out = node.output[0]
        if node.op_type != "Selu" or not rewriter.is_half(out) or _sums_levels(rewriter, node):
            continue
        new = instead[out] = Nodes(rewriter, out)
        parameters = attributes_of(node)
        elu = new.add("Elu", node.input[0], alpha=parameters["alpha"])
        new.add("Mul", elu, np.array(parameters["gamma"], np.float16), out=out)
        for user in rewriter.users[out]:
            if user.op_type == "Cast":
                copy = instead[user.output[0]] = Nodes(rewriter, user.output[0])
                same = copy.add("Mul", out, np.array(1, np.float16))
                copy.add("Cast", same, out=user.output[0], **attributes_of(user))
    rewriter.replace(instead)


def _sums_levels(rewriter: Rewriter, selu: onnx.NodeProto) -> bool:
    maker = rewriter.makers.get(selu.input[0])
    before = [rewriter.makers.get(name) for name in maker.input] if maker is not None else []
    return any(node is not None and node.op_type == "Resize" for node in before)


def pass_inputs_on(rewriter: Rewriter) -> None:
    """Let a block's 1x1 shortcut be part of its second 3x3 convolution, one kernel in place of two.

    The first gives its inputs as well, as further channels that its activation leaves alone.
    """
    instead: dict[str, Nodes] = {}
    for add in rewriter.graph.node:
        found = _block(rewriter, add) if add.op_type == "Add" else None
        if found is None:
            continue
        (second, mul, elu, first), shortcut = found
        new = instead[add.output[0]] = Nodes(rewriter, add.output[0])
        kernel, bias = map(rewriter.value, first.input[1:])
        outputs, inputs = kernel.shape[:2]
        same = _centred(np.eye(inputs, dtype=np.float16)[..., None, None])
        bias = np.append(bias, np.zeros(inputs, np.float16))
        window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        x = new.add("Conv", first.input[0], np.append(kernel, same, axis=0), bias, **window)
        active = np.repeat(np.array([1, 0], np.float16), (outputs, inputs))[:, None, None]
        elu = new.add("Elu", x, **attributes_of(elu))
        elu = new.add("Mul", elu, active * rewriter.value(mul.input[1]))
        x = new.add("Add", elu, new.add("Mul", x, 1 - active))
        kernel, bias = map(rewriter.value, second.input[1:])
        weight, more = map(rewriter.value, shortcut.input[1:])
        kernel = np.append(kernel, _centred(weight), axis=1)
        new.add("Conv", x, kernel, bias + more, out=add.output[0], **window)
    rewriter.replace(instead)


def _centred(kernel: np.ndarray) -> np.ndarray:
    """A 1x1 kernel as one of 3x3."""
    return np.pad(kernel, ((0, 0), (0, 0), (1, 1), (1, 1)))


def _block(
    rewriter: Rewriter, add: onnx.NodeProto
) -> tuple[list[onnx.NodeProto], onnx.NodeProto] | None:
    """The second convolution of a residual block with what leads to it, and the shortcut's."""
    for name, other in (add.input, reversed(add.input)):
        steps = rewriter.preceding(name, "Conv", "Mul", "Elu", "Conv")
        shortcut = rewriter.makers.get(other)
        if len(steps) < 4 or shortcut is None or not is_plain(rewriter, shortcut, side=1):
            continue
        both = all(is_plain(rewriter, conv) for conv in (steps[0], steps[-1]))
        values = [node.output[0] for node in (*steps, shortcut)]
        alone = all(len(rewriter.users[value]) == 1 for value in values)
        alone = alone and not rewriter.outputs.intersection(values)
        biases = all(len(conv.input) == 3 for conv in (steps[0], steps[-1], shortcut))
        if both and alone and biases and shortcut.input[0] == steps[-1].input[0]:
            return steps, shortcut
    return None


def selu_in_float32(rewriter: Rewriter) -> None:
    """Let what is left of Selu be computed in float32 in half precision of symbolic sizes.

    Keypoints come nearer to float32's. Of images of one size other forms were chosen, for speed.
    """
    instead: dict[str, Nodes] = {}
    for node in rewriter.graph.node:
        out = node.output[0]
        half = node.op_type == "Selu" and rewriter.kind(out) == TensorProto.FLOAT16
        if half and rewriter.shape(out) is None:
            new = instead[out] = Nodes(rewriter, out)
            x = new.add("Cast", node.input[0], to=TensorProto.FLOAT)
            x = new.add("Selu", x, **attributes_of(node))
            new.add("Cast", x, out=out, to=TensorProto.FLOAT16)
    rewriter.replace(instead)


def sum_in_float32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Change `model` so that LightGlue's products of matrices are summed in float32; return it.

    TensorRT, for RTX too, sums those of halves in half precision, the products of attention among
    them, unless their inputs are cast to float32 and what they give is cast back: that it takes as
    the wish for such sums, and multiplies halves still. Counts of ones are exact as they are.
    """
    if not any(entry.key.startswith("lightglue.") for entry in model.metadata_props):
        return model
    rewriter, instead = Rewriter(model), {}
    for node in rewriter.graph.node:
        out = node.output[0]
        half = node.op_type == "MatMul" and rewriter.kind(out) == TensorProto.FLOAT16
        if half and not any(_is_zeros_and_ones(rewriter, name) for name in node.input):
            new = instead[out] = Nodes(rewriter, out)
            inputs = [new.add("Cast", name, to=TensorProto.FLOAT) for name in node.input]
            new.add("Cast", new.add("MatMul", *inputs), out=out, to=TensorProto.FLOAT16)
    rewriter.replace(instead)
    return model


def _is_zeros_and_ones(rewriter: Rewriter, name: str) -> bool:
    if name in rewriter.constants:
        return bool(np.isin(rewriter.value(name), (0, 1)).all())
    cast = rewriter.preceding(name, "Cast")
    return bool(cast) and rewriter.kind(cast[0].input[0]) == TensorProto.BOOL


def widen(rewriter: Rewriter, pixels: int) -> None:
    """Let 3x3 convolutions of few channels give several pixels of a row at once.

    They have a stride and kernel of so many more pixels, and so many times the channels, which
    fill a tile of a matrix product; the pixels are put in their place afterwards.
    """
    instead: dict[str, Nodes] = {}
    for node in rewriter.graph.node:
        at_once = _pixels_at_once(rewriter, node, pixels)
        if at_once > 1:
            steps = [node, *rewriter.following(node, "Elu", "Mul")]
            instead[steps[-1].output[0]] = _wide(rewriter, steps, at_once)
    rewriter.replace(instead)


def _pixels_at_once(rewriter: Rewriter, node: onnx.NodeProto, pixels: int) -> int:
    """How many pixels a convolution is to give at once; 1: it stays as it is."""
    if not is_plain(rewriter, node):
        return 1
    at_once = AT_ONCE.get(rewriter.constants[node.input[1]].dims[0], 1)
    height, width = rewriter.shape(node.input[0])[2:]
    return at_once if height * width >= pixels and width % at_once == 0 else 1


def _wide(rewriter: Rewriter, steps: list[onnx.NodeProto], at_once: int) -> Nodes:
    """The nodes in the place of a convolution and what follows it, with the same last output."""
    conv, *follow = steps
    new = Nodes(rewriter, conv.output[0])
    weight, *bias = map(rewriter.value, conv.input[1:])
    channels = weight.shape[0]
    kernel, bias = wide_kernel(weight, at_once), [np.tile(values, at_once) for values in bias]
    size = {"kernel_shape": [3, at_once + 2], "strides": [1, at_once], "pads": [1, 1, 1, 1]}
    x = new.add("Conv", conv.input[0], kernel, *bias, **size)
    for before, step in zip(steps, follow, strict=False):
        inputs = [x if name == before.output[0] else name for name in step.input]
        x = new.add(step.op_type, *inputs, **attributes_of(step))
    batch, _, height, width = rewriter.shape(conv.input[0])
    x = new.add("Transpose", x, perm=[0, 2, 3, 1])
    x = new.add("Reshape", x, np.array([batch, height, width, channels]))
    new.add("Transpose", x, out=steps[-1].output[0], perm=[0, 3, 1, 2])
    return new


def average(rewriter: Rewriter) -> None:
    """Write averages of blocks of pixels as sums of slices, which other steps can join.

    Those of 2x2 pixels behind a wide convolution read its pixels where they lie.
    """
    instead: dict[str, Nodes] = {}
    for node in rewriter.graph.node:
        if node.op_type != "AveragePool" or not rewriter.is_half(node.input[0]):
            continue
        attributes = attributes_of(node)
        side = attributes["kernel_shape"][0]
        tiles = {"kernel_shape": [side] * 2, "strides": [side] * 2, "pads": [0] * 4}
        sizes = rewriter.shape(node.input[0])
        whole = len(sizes) == 4 and sizes[2] % side == 0 and sizes[3] % side == 0
        if not whole or any(attributes.get(name, [0] * 4) != tiles[name] for name in tiles):
            continue
        new = instead[node.output[0]] = Nodes(rewriter, node.output[0])
        steps = rewriter.preceding(node.input[0], "Transpose", "Reshape", "Transpose")
        wide = steps[-1].input[0] if len(steps) == 3 else None
        if wide and side == 2 and rewriter.shape(wide)[1] % (2 * sizes[1]) == 0:
            _average_wide(new, wide, sizes)
            continue
        x = new.add("Cast", node.input[0], to=TensorProto.FLOAT)
        x = _add_slices(new, _add_slices(new, x, 2, side, sizes[2]), 3, side, sizes[3])
        x = new.add("Mul", x, np.array(side**-2, np.float32))
        new.add("Cast", x, out=new.name, to=TensorProto.FLOAT16)
    rewriter.replace(instead)


def _add_slices(new: Nodes, x: str, axis: int, step: int, size: int) -> str:
    """The sum of every `step` neighbours along an axis of `size`."""
    ranges = (map(np.array, ([start], [size], [axis], [step])) for start in range(step))
    return new.fold("Add", [new.add("Slice", x, *each) for each in ranges])


def _average_wide(new: Nodes, wide: str, sizes: list[int]) -> None:
    """Averages of 2x2 pixels of a map of `sizes` whose pixels lie in the channels of `wide`."""
    batch, channels, height, width = sizes
    at_once = new.rewriter.shape(wide)[1] // channels
    # A column is one of width / at_once, a pair in it, and a pixel of that.
    shape = [batch, at_once // 2, 2, channels, height // 2, 2, width // at_once]
    x = new.add("Reshape", new.add("Cast", wide, to=TensorProto.FLOAT), np.array(shape))
    x = _add_slices(new, _add_slices(new, x, 5, 2, 2), 2, 2, 2)
    x = new.add("Mul", x, np.array(0.25, np.float32))
    x = new.add("Cast", x, to=TensorProto.FLOAT16)
    x = new.add("Reshape", x, np.array([*shape[:2], *shape[3:5], shape[6]]))
    x = new.add("Transpose", x, perm=[0, 3, 4, 1, 2])
    x = new.add("Reshape", x, np.array([batch, height // 2, width // 2, channels]))
    new.add("Transpose", x, out=new.name, perm=[0, 3, 1, 2])
