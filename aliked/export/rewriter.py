"""Rewriting an ONNX graph: what its tensors are and are used for, and new nodes with names."""

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


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

    def kind(self, name: str) -> int:
        """The type of a tensor's elements, as ONNX numbers them; UNDEFINED where it is unknown."""
        return self.types[name].elem_type if name in self.types else TensorProto.UNDEFINED

    def is_half(self, name: str) -> bool:
        """Whether a tensor is in half precision and of a known shape."""
        return self.shape(name) is not None and self.kind(name) == TensorProto.FLOAT16

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant; returns its name."""
        self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def value(self, name: str) -> np.ndarray:
        """The values of a constant."""
        return numpy_helper.to_array(self.constants[name])

    def following(self, node: onnx.NodeProto, *op_types: str) -> list[onnx.NodeProto]:
        """As many nodes of these kinds as follow, each the only reader of the one before."""
        nodes = [node]
        for op_type in op_types:
            name = nodes[-1].output[0]
            users = self.users[name]
            if name in self.outputs or len(users) != 1 or users[0].op_type != op_type:
                break
            nodes += users
        return nodes[1:]

    def preceding(self, name: str, *op_types: str) -> list[onnx.NodeProto]:
        """As many makers of these kinds as lead to a tensor, each by its first input; backwards."""
        nodes: list[onnx.NodeProto] = []
        for op_type in op_types:
            maker = self.makers.get(name)
            if maker is None or maker.op_type != op_type:
                break
            nodes.append(maker)
            name = maker.input[0]
        return nodes

    def replace(self, instead: dict[str, "Nodes"]) -> None:
        """Put nodes in the place of those of these first outputs, and drop what nothing reads."""
        nodes = [new for old in self.graph.node for new in instead.get(old.output[0], [old])]
        wanted, kept = set(self.outputs), []
        for node in reversed(nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        self.finish(kept[::-1])

    def finish(self, nodes: list[onnx.NodeProto]) -> None:
        """Put nodes in the place of the graph's, with the constants that they read."""
        used = {name for node in nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(t for name, t in self.constants.items() if name in used)


class Nodes(list[onnx.NodeProto]):
    """New nodes of a graph, their outputs and constants named after `name`."""

    def __init__(self, rewriter: Rewriter, name: str):
        super().__init__()
        self.rewriter, self.name = rewriter, name

    def add(
        self, op_type: str, *inputs: str | np.ndarray, out: str | None = None, **attributes: object
    ) -> str:
        """Add a node; returns its output. Arrays among the inputs become constants."""
        name = f"{self.name} {len(self)}"
        names = [
            x if isinstance(x, str) else self.rewriter.constant(f"{name} input {i}", x)
            for i, x in enumerate(inputs)
        ]
        self.append(helper.make_node(op_type, names, [out or name], **attributes))
        return out or name

    def part(
        self, x: str, axes: list[int], starts: list[int], ends: list[int], out: str | None = None
    ) -> str:
        """Add a Slice; returns its output."""
        return self.add("Slice", x, *map(np.array, (starts, ends, axes)), out=out)

    def fold(self, op_type: str, parts: Sequence[str]) -> str:
        """Add nodes of two inputs over all parts, one after another; returns the last's output."""
        return functools.reduce(lambda *pair: self.add(op_type, *pair), parts)

    def within(self, index: str, last: int) -> str:
        """Add what makes a number from 0 to `last` of every index; returns its output."""
        return self.add("Max", self.add("Min", index, np.array(last)), np.array(0))


def is_plain(rewriter: Rewriter, node: onnx.NodeProto, side: int = 3) -> bool:
    """Whether a node is a convolution in half precision that gives a pixel for a pixel."""
    if node.op_type != "Conv" or not rewriter.is_half(node.input[0]):
        return False
    weight, attributes = rewriter.constants.get(node.input[1]), attributes_of(node)
    plain = {"pads": [side // 2] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
    known = weight is not None and list(weight.dims[2:]) == [side, side]
    padded = "pads" in attributes or side == 1
    return known and padded and all(attributes.get(k, v) == v for k, v in plain.items())


def attributes_of(node: onnx.NodeProto) -> dict:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def wide_kernel(weight: np.ndarray, pixels: int) -> np.ndarray:
    """The kernel of a 3x3 convolution that has a stride of `pixels` in a row and gives them all.

    The channels of the first of these pixels come first.
    """
    channels, inputs = weight.shape[:2]
    kernel = np.zeros((pixels, channels, inputs, 3, pixels + 2), weight.dtype)
    for pixel in range(pixels):
        kernel[pixel, ..., pixel : pixel + 3] = weight
    return kernel.reshape(-1, *kernel.shape[2:])
