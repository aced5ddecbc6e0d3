"""Stand-in for the ONNX parser: what the real one refuses is refused, node by node."""

import weakref

import onnx
from onnx import numpy_helper

from tests.helpers.fake_tensorrt.builder import INetworkDefinition
from tests.helpers.fake_tensorrt.machine import Crash
from tests.helpers.fake_tensorrt.names import Strict, require


class ParserError(Strict):
    """One thing that the parser refuses."""

    def __init__(self, index: int, node: onnx.NodeProto, text: str) -> None:
        self._index, self._node, self._text = index, node, text

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type

    def __str__(self) -> str:
        return f"In node {self._index} ({self._node.name}: {self._node.op_type}): {self._text}"


class OnnxParser(Strict):
    """Owns the weights of the network that it fills, so it has to live until the build is over."""

    _module = None  # set in a subclass per version

    def __init__(self, network, logger) -> None:
        require(network, INetworkDefinition)
        require(logger, self._module.ILogger)
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def get_used_vc_plugin_libraries(self) -> list[str]:
        return []

    def parse_from_file(self, model: str) -> bool:
        require(model, str)
        proto = onnx.shape_inference.infer_shapes(onnx.load(model))
        self._errors = [
            ParserError(index, node, text)
            for index, node in enumerate(proto.graph.node)
            if (text := self._refusal(node, proto))
        ]
        if self._errors:
            return False
        self._network._model = proto
        self._network._parser = weakref.ref(self)
        return True

    def _refusal(self, node: onnx.NodeProto, model: onnx.ModelProto) -> str:
        """Why the real parser would not import this node."""
        if model.opset_import[0].version > 24:
            return "opset is newer than what this parser knows"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        if node.op_type == "TopK":
            k = constants.get(node.input[1])
            if k is not None and numpy_helper.to_array(k).item() > 3840:
                return "K exceeds the maximum value allowed (3840)"
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1]:
            return "" if node.input[1] in constants else "axes must be an initializer"
        if node.op_type == "ScatterND" and attributes.get("reduction", b"none") != b"none":
            return "reduction is not supported"
        if node.op_type == "DeformConv":
            return self._deform_conv_refusal(node, attributes)
        return ""

    def _deform_conv_refusal(self, node: onnx.NodeProto, attributes: dict) -> str:
        if not self._module._machine.plugins_registered:
            return "Plugin not found: ModulatedDeformConv2d"
        if len(node.input) > 4 and node.input[4] and not node.input[3]:
            raise Crash("the parser reads the missing bias")
        pads = attributes.get("pads", [])
        half = len(pads) // 2
        return "" if pads[:half] == pads[half:] else "begin and end pads must be equal"
