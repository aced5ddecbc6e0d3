"""An ONNX file as its checks read it: nodes, what is known of their inputs, and findings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from aliked.backends.tensorrt_library import TENSORRT
from aliked.errors import InputError
from aliked.files import open_regular

HALF_TYPES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
INTEGER_TYPES = {TensorProto.INT8, TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8}


def type_name(dtype: int) -> str:
    """FLOAT16, INT64, ...: an element type as ONNX spells it."""
    return TensorProto.DataType.Name(dtype)


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external weights; `InputError` where it is not a whole one."""
    try:
        with open_regular(path, most_bytes=None):  # no FIFO nor device, which never end
            pass
        model = onnx.load(path)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}); give an ONNX file that exists, with "
            "the weights that belong to it in the same folder"
        ) from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(
            f"{path} is not an ONNX file, or not a whole one; export the model again"
        ) from error
    if not all(isinstance(name, str) for name in _names(model)):
        raise InputError(f"{path} has names that are no text; export the model again")
    if not model.graph.node or not model.opset_import:  # an empty file is a valid empty message
        raise InputError(f"{path} has no ONNX graph in it; export the model again")
    return model


def _names(model: onnx.ModelProto) -> Iterator[str]:
    """The names in a model, which protobuf gives as bytes where they are not UTF-8."""
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    for named in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        yield named.name
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)


def graph_precision(model: onnx.ModelProto) -> str:
    """Return "FP16" where any weight, constant or Cast of the file is FP16, else "FP32"."""
    half = TensorProto.FLOAT16
    if any(tensor.data_type == half for tensor in model.graph.initializer):
        return "FP16"
    for node in model.graph.node:
        for attribute in node.attribute:
            constant = attribute.HasField("t") and attribute.t.data_type == half
            if constant or (attribute.name == "to" and attribute.i == half):
                return "FP16"
    return "FP32"


class Graph:
    """The names of one graph or subgraph; unknown ones are looked up outside."""

    def __init__(
        self,
        proto: onnx.GraphProto,
        opset: int,
        path: str = "",
        outer: "Graph | None" = None,
    ) -> None:
        self.proto, self.opset, self.path, self.outer = proto, opset, path, outer
        self.producers = {name: node for node in proto.node for name in node.output if name}
        self.constants: dict[str, TensorProto] = {
            tensor.name: tensor for tensor in proto.initializer
        }
        values = (*proto.input, *proto.value_info, *proto.output)
        self.types = {value.name: value.type.tensor_type for value in values}

    def where(self, name: str) -> "Graph | None":
        """The graph, this one or one around it, that gives `name` its value."""
        graph: Graph | None = self
        while graph and not (
            name in graph.producers or name in graph.constants or name in graph.types
        ):
            graph = graph.outer
        return graph


@dataclass(frozen=True)
class Node:
    """One operator with what is known about its inputs."""

    proto: onnx.NodeProto
    graph: Graph

    @property
    def op(self) -> str:
        return self.proto.op_type

    @property
    def opset(self) -> int:
        return self.graph.opset

    @property
    def label(self) -> str:
        """The node's name, or what it is and makes; subgraphs before a slash."""
        output = next((name for name in self.proto.output if name), "nothing")
        return self.graph.path + (self.proto.name or f"{self.op} that makes {output}")

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute's value, text as `str`; `default` where the node does not have it."""
        for attribute in self.proto.attribute:
            if attribute.name == name and not attribute.ref_attr_name:
                value = helper.get_attribute_value(attribute)
                return value.decode(errors="replace") if isinstance(value, bytes) else value
        return default

    def name(self, index: int) -> str:
        """The name of input `index`, empty where it is left out."""
        return self.proto.input[index] if index < len(self.proto.input) else ""

    def dtype(self, index: int) -> int:
        """Element type of input `index`, 0 where it is unknown."""
        return dtype_of(self.graph, self.name(index))

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        """Shape of input `index`, None in place of each unknown size, or of all of it."""
        return shape_of(self.graph, self.name(index))

    def size(self, index: int, axis: int) -> int | None:
        """One dimension of input `index`, None where it is unknown."""
        shape = self.shape(index)
        return shape[axis] if shape and -len(shape) <= axis < len(shape) else None

    def producer(self, index: int, passing: set[str] = frozenset()) -> "Node | None":
        """The node behind input `index`, passing over operators named in `passing`."""
        node: Node | None = self
        while node is not None:
            name, graph = node.name(index), node.graph.where(node.name(index))
            if graph is None or name not in graph.producers:
                return None
            node, index = Node(graph.producers[name], graph), 0
            if node.op not in passing:
                break
        return node

    def constant(self, index: int, depth: int = 32) -> np.ndarray | None:
        """The value of input `index` where the file holds it or it follows from constants.

        None where it does not, or where working it out is deeper than `depth` or takes arrays
        that no k, axis or shape needs.
        """
        name, graph = self.name(index), self.graph.where(self.name(index))
        if graph is None:
            return None
        if name in graph.constants:
            return numpy_helper.to_array(graph.constants[name])
        node = self.producer(index)
        if node is None or depth == 0 or node.proto.domain not in ("", "ai.onnx"):
            return None
        return constant_of(node.proto) if node.op == "Constant" else node._folded(depth - 1)

    def _folded(self, depth: int) -> np.ndarray | None:
        if self.op not in FOLDED or len(self.proto.output) != 1:
            return None
        values = [self.constant(index, depth) for index in range(len(self.proto.input))]
        if any(value is None or value.size > MAX_FOLDED for value in values):
            return None
        evaluator = ReferenceEvaluator(self.proto, opsets={"": self.opset})
        try:
            (result,) = evaluator.run(None, dict(zip(self.proto.input, values, strict=True)))
        except Exception:  # it raises whatever NumPy does: the library will say what it makes of it
            return None
        return np.asarray(result)


# What is worked out when its inputs are constants, and how many elements each may have.
FOLDED = {"Add", "Cast", "Concat", "Div", "Flatten", "Gather", "Identity", "Max", "Min", "Mul"}
FOLDED |= {"Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
MAX_FOLDED = 4096


def dtype_of(graph: Graph, name: str) -> int:
    """Element type of the tensor `name`, 0 where it is unknown."""
    home = graph.where(name)
    if home is None:
        return TensorProto.UNDEFINED
    if name in home.constants:
        return home.constants[name].data_type
    return home.types[name].elem_type if name in home.types else TensorProto.UNDEFINED


def shape_of(graph: Graph, name: str) -> tuple[int | None, ...] | None:
    """Shape of the tensor `name`, see `Node.shape`."""
    home = graph.where(name)
    if home is None:
        return None
    if name in home.constants:
        return tuple(home.constants[name].dims)
    if name not in home.types or not home.types[name].HasField("shape"):
        return None
    dims = home.types[name].shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def constant_of(proto: onnx.NodeProto) -> np.ndarray | None:
    """What a Constant node holds, None for text and sparse tensors."""
    for attribute in proto.attribute:
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        if attribute.name.startswith(("value_float", "value_int")):
            value = helper.get_attribute_value(attribute)
            return np.array(value, np.float32 if "float" in attribute.name else np.int64)
    return None


def default_opset(imports: Any) -> int:
    """The version of the standard operators in a list of opset imports, 0 where it is missing."""
    return next((one.version for one in imports if one.domain in ("", "ai.onnx")), 0)


def graphs(model: onnx.ModelProto) -> Iterator[Graph]:
    """The model's graph and every subgraph; functions have to be in line."""
    yield from _with_subgraphs(Graph(model.graph, default_opset(model.opset_import)))


def _with_subgraphs(graph: Graph) -> Iterator[Graph]:
    yield graph
    for proto in graph.proto.node:
        path = f"{Node(proto, graph).label}/"
        for attribute in proto.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _with_subgraphs(Graph(body, graph.opset, path, graph))


def spell_out_selu(model: onnx.ModelProto) -> None:
    """Write the values of `alpha` and `gamma` that ONNX defines where a Selu has none of its own.

    The parsers of TensorRT, for RTX too, take 1.6732 and 1.0507 in place of 1.67326319 and
    1.05070102, which is enough for float32 to end outside its tolerance.
    """
    defined = onnx.defs.get_schema("Selu").attributes
    for node in model.graph.node:
        if node.op_type == "Selu":
            given = {attribute.name for attribute in node.attribute}
            missing = [a.default_value for name, a in defined.items() if name not in given]
            node.attribute.extend(missing)


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT would refuse or misread, or might.

    An error is refused or gives other results without a word; a warning depends on what the file
    does not say.
    """

    severity: str  # "error" or "warning"
    node: str  # which node, subgraphs before a slash; "(model)" for the file
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.reason}; {self.cure}"


@dataclass(frozen=True)
class Target:
    """What is known about the engine that the file is to become."""

    library: str = TENSORRT.title
    version_compatible: bool = False
    max_batch: int | None = None  # of the optimization profile, where the batch is dynamic


def error(node: Node, reason: str, cure: str) -> Finding:
    """A finding that stops a build."""
    return Finding("error", node.label, reason, cure)


def warning(node: Node, reason: str, cure: str) -> Finding:
    """A finding that the user should know of."""
    return Finding("warning", node.label, reason, cure)


SAME_VALUES = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Transpose"}
