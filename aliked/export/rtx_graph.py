"""The graph that TensorRT for RTX is given: the file's own, in forms that it runs faster.

It takes its kernels by rules and does not time them. What each form brings, in half precision and
for images of one size, is in docs/tensorrt-graph.md. The ONNX file stays as it is, for every
runtime.
"""

from collections import defaultdict

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from aliked.export.onnx_graph import spell_out_selu

FOLDED = {"Abs", "Cast", "LessOrEqual", "Sub"}  # what the exporters leave of large constants
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
PIXELS = 2**17  # of a map for which wide convolutions are faster
AT_ONCE = {4: 4, 8: 4}  # by the channels that come out: pixels that a convolution gives


class Rewriter:
    """A model's graph, and what its tensors are and are used for."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        inferred = onnx.shape_inference.infer_shapes(model).graph
        known = (*inferred.value_info, *inferred.input, *inferred.output)
        self.types = {value.name: value.type.tensor_type for value in known}
        self.outputs = {value.name for value in self.graph.output}
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.makers: dict[str, onnx.NodeProto] = {}
        for node in self.graph.node:
            for name in node.input:
                self.users[name].append(node)
            self.makers |= dict.fromkeys(node.output, node)

    def shape(self, name: str) -> list[int] | None:
        """A tensor's shape; None where it is unknown or symbolic."""
        dims = self.types[name].shape.dim if name in self.types else []
        sizes = [dim.dim_value for dim in dims]
        return sizes if sizes and all(sizes) else None

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant; returns its name."""
        self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def finish(self, nodes: list[onnx.NodeProto]) -> None:
        """Put nodes in the place of the graph's, with the constants that they read."""
        used = {name for node in nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(t for name, t in self.constants.items() if name in used)


def for_rtx(model: onnx.ModelProto, pixels: int = PIXELS) -> onnx.ModelProto:
    """The same function of the same inputs, `model` being left as it is."""
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    spell_out_selu(rewritten)  # of files from before the export did
    fold_large(Rewriter(rewritten))
    fuse_selu(Rewriter(rewritten))
    selu_in_float32(Rewriter(rewritten))
    widen(Rewriter(rewritten), pixels)
    return rewritten


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


def fuse_selu(rewriter: Rewriter) -> None:
    """Write Selu as Elu and a factor, which become part of the convolution before them.

    Not where that makes another kernel slower: where the result is also wanted in float32, and
    behind the sum of the levels, whose convolution can run beside the encoder.
    """
    nodes = []
    for node in rewriter.graph.node:
        if node.op_type != "Selu" or not _fuses(rewriter, node):
            nodes.append(node)
            continue
        out = node.output[0]
        scale = rewriter.constant(f"{out} scale", np.array(SELU_SCALE, np.float16))
        nodes += [
            helper.make_node("Elu", node.input, [f"{out} elu"], alpha=SELU_ALPHA),
            helper.make_node("Mul", [f"{out} elu", scale], [out]),
        ]
    rewriter.finish(nodes)


def _fuses(rewriter: Rewriter, selu: onnx.NodeProto) -> bool:
    out = selu.output[0]
    if rewriter.shape(out) is None or rewriter.types[out].elem_type != TensorProto.FLOAT16:
        return False  # not measured
    if any(user.op_type == "Cast" for user in rewriter.users[out]):
        return False
    maker = rewriter.makers.get(selu.input[0])
    before = [rewriter.makers.get(name) for name in maker.input] if maker is not None else []
    return not any(node is not None and node.op_type == "Resize" for node in before)


def selu_in_float32(rewriter: Rewriter) -> None:
    """Let what is left of Selu be computed in float32 in half precision of symbolic sizes.

    Keypoints come nearer to float32's. Of images of one size other forms were chosen, for speed.
    """
    nodes = []
    for node in rewriter.graph.node:
        out = node.output[0]
        known = node.op_type == "Selu" and out in rewriter.types
        half = known and rewriter.types[out].elem_type == TensorProto.FLOAT16
        if not half or rewriter.shape(out) is not None:
            nodes.append(node)
            continue
        selu = onnx.NodeProto()
        selu.CopyFrom(node)
        selu.input[0], selu.output[0] = f"{out} input", f"{out} float32"
        nodes += [
            helper.make_node("Cast", node.input, selu.input, to=TensorProto.FLOAT),
            selu,
            helper.make_node("Cast", selu.output, [out], to=TensorProto.FLOAT16),
        ]
    rewriter.finish(nodes)


def widen(rewriter: Rewriter, pixels: int) -> None:
    """Let 3x3 convolutions of few channels give several pixels of a row at once.

    They have a stride and kernel of so many more pixels, and so many times the channels, which
    fill a tile of a matrix product; the pixels are put in their place afterwards.
    """
    nodes, done = [], set()
    for node in rewriter.graph.node:
        if node.output[0] in done:
            continue
        at_once = _pixels_at_once(rewriter, node, pixels)
        if at_once == 1:
            nodes.append(node)
            continue
        follow = _followers(rewriter, node)
        done |= {step.output[0] for step in follow}
        nodes += _wide(rewriter, node, follow, at_once)
    rewriter.finish(nodes)


def _pixels_at_once(rewriter: Rewriter, node: onnx.NodeProto, pixels: int) -> int:
    """How many pixels a convolution is to give at once; 1: it stays as it is."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "group": 1}
    plain["dilations"] = [1, 1]
    if node.op_type != "Conv" or any(attributes.get(k, v) != v for k, v in plain.items()):
        return 1
    weight, shape = rewriter.constants.get(node.input[1]), rewriter.shape(node.input[0])
    if weight is None or weight.data_type != TensorProto.FLOAT16 or shape is None:
        return 1
    if list(weight.dims[2:]) != [3, 3] or "pads" not in attributes:
        return 1
    at_once = AT_ONCE.get(weight.dims[0], 1)
    return at_once if shape[2] * shape[3] >= pixels and shape[3] % at_once == 0 else 1


def _followers(rewriter: Rewriter, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The activation behind a convolution, where nothing else reads what it reads."""
    follow: list[onnx.NodeProto] = []
    for op_type in ("Elu", "Mul"):
        name = (follow or [node])[-1].output[0]
        users = rewriter.users[name]
        if name in rewriter.outputs or len(users) != 1 or users[0].op_type != op_type:
            break
        follow += users
    return follow


def _wide(
    rewriter: Rewriter, node: onnx.NodeProto, follow: list[onnx.NodeProto], at_once: int
) -> list[onnx.NodeProto]:
    """The nodes in the place of a convolution and what follows it, with the same last output."""
    name, out = node.output[0], (follow or [node])[-1].output[0]
    weight = numpy_helper.to_array(rewriter.constants[node.input[1]])
    channels, inputs = weight.shape[:2]
    kernel = np.zeros((at_once, channels, inputs, 3, at_once + 2), weight.dtype)
    for pixel in range(at_once):
        kernel[pixel, ..., pixel : pixel + 3] = weight
    kernel = kernel.reshape(-1, *kernel.shape[2:])
    arguments = [node.input[0], rewriter.constant(f"{name} kernel", kernel)]
    if len(node.input) > 2:
        bias = numpy_helper.to_array(rewriter.constants[node.input[2]])
        arguments.append(rewriter.constant(f"{name} bias", np.tile(bias, at_once)))
    size = {"kernel_shape": [3, at_once + 2], "strides": [1, at_once], "pads": [1, 1, 1, 1]}
    nodes = [helper.make_node("Conv", arguments, [f"{name} wide"], **size)]
    for before, step in zip([node, *follow], follow, strict=False):
        wide = onnx.NodeProto()
        wide.CopyFrom(step)
        wide.input[list(step.input).index(before.output[0])] += " wide"
        wide.output[0] += " wide"
        nodes.append(wide)
    batch, _, height, width = rewriter.shape(node.input[0])
    shape = rewriter.constant(f"{out} shape", np.array([batch, height, width, channels]))
    return [
        *nodes,
        helper.make_node("Transpose", [f"{out} wide"], [f"{out} turned"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", [f"{out} turned", shape], [f"{out} rows"]),
        helper.make_node("Transpose", [f"{out} rows"], [out], perm=[0, 3, 1, 2]),
    ]
