"""Small ONNX files with the inputs and outputs of an export, made by hand."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from aliked.backends import Spec
from aliked.backends.onnxruntime import ONNXRuntimeExtractor
from aliked.parity import NO_TIES
from aliked.ties import Expected

FLOAT, HALF, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8


class Sketch:
    """Collects nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value, dtype=np.int64) -> str:
        name = f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def add(self, op: str, *inputs: str, output: str = "", outputs: int = 1, **attributes):
        """Add a node; the name of its output, or all of their names."""
        names = [output or f"{op}{len(self.nodes)}_{index}" for index in range(outputs)]
        name = f"my_{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names


def write_small_model(
    path: Path,
    height: int = 48,
    width: int = 64,
    top_k: int = 20,
    opset: int = 19,
    batch: int = 1,
    dynamic: bool = False,
    uint8: bool = False,
    half: bool = False,
    deform: bool = False,
    outputs: tuple[str, ...] = ("keypoints", "descriptors", "scores"),
    metadata: dict | None = None,
) -> Path:
    """Places beside the brightest pixels: `keypoints`, their brightness and colours."""
    sketch = Sketch()
    image = "image"
    if uint8:
        image = sketch.add("Cast", image, to=FLOAT)
        image = sketch.add("Transpose", image, perm=[0, 3, 1, 2])
        image = sketch.add("Div", image, sketch.constant(255, np.float32))
    if deform:
        image = _deform(sketch, image, batch, height, width)
    grey = sketch.add("ReduceMean", image, sketch.constant([1]), keepdims=0)
    if half:
        grey = sketch.add("Cast", sketch.add("Cast", grey, to=HALF), to=FLOAT)
    flat = sketch.add("Reshape", grey, sketch.constant([0, -1]))
    scores, index = sketch.add("TopK", flat, sketch.constant([top_k]), outputs=2)
    size = sketch.add("Shape", grey, start=1)  # [height, width]
    columns = sketch.add("Gather", size, sketch.constant(1))
    places = [sketch.add("Mod", index, columns), sketch.add("Div", index, columns)]
    places = [sketch.add("Unsqueeze", place, sketch.constant([2])) for place in places]
    corner = sketch.add("Concat", *places, axis=2)
    corner = sketch.add("Cast", corner, to=FLOAT)
    keypoints = sketch.add("Add", corner, sketch.constant([0.3, 0.4], np.float32))
    descriptors = _describe(sketch, image, keypoints, size, "linear" if opset > 19 else "bilinear")
    results = {"keypoints": keypoints, "descriptors": descriptors, "scores": scores}
    for name in outputs:
        sketch.add("Identity", results[name], output=name)
    shape = ["B" if dynamic else batch, 3, *(("H", "W") if dynamic else (height, width))]
    shape = [shape[0], *shape[2:], 3] if uint8 else shape
    export = {"model": "aliked-t16", "top_k": top_k, "scores_th": 0.2, "n_limit": 5000}
    export |= metadata or {}
    _save(path, sketch, opset, (UINT8 if uint8 else FLOAT, shape), outputs, export)
    return path


def use_right_model(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Verify engines against the small model at `path`, in place of PyTorch's official one."""

    class RightModel(ONNXRuntimeExtractor):
        def __init__(self, spec: Spec):
            assert (spec.model, spec.precision) == ("aliked-t16", "fp32")
            super().__init__(Spec("aliked-t16", model_path=path, top_k=spec.top_k))

        def expect(self, image: np.ndarray) -> Expected:
            return Expected(self(image), NO_TIES)

    monkeypatch.setattr("aliked.export.verify.PyTorchExtractor", RightModel)


def _deform(sketch: Sketch, image: str, batch: int, height: int, width: int) -> str:
    """A deformable convolution that changes nothing."""
    weight = sketch.constant(np.eye(3).reshape(3, 3, 1, 1), np.float32)
    offset = sketch.constant(np.zeros((batch, 2, height, width)), np.float32)
    return sketch.add("DeformConv", image, weight, offset, kernel_shape=[1, 1])


def _describe(sketch: Sketch, image: str, keypoints: str, size: str, mode: str) -> str:
    """Unit-length colours at the keypoints."""
    backwards = sketch.add("Gather", size, sketch.constant([1, 0]))  # [width, height]
    half = sketch.add(
        "Div", sketch.add("Cast", backwards, to=FLOAT), sketch.constant(2, np.float32)
    )
    centred = sketch.add("Add", keypoints, sketch.constant(0.5, np.float32))
    grid = sketch.add("Sub", sketch.add("Div", centred, half), sketch.constant(1, np.float32))
    grid = sketch.add("Unsqueeze", grid, sketch.constant([2]))
    colours = sketch.add("GridSample", image, grid, mode=mode)  # [B, 3, K, 1]
    colours = sketch.add("Squeeze", colours, sketch.constant([3]))
    colours = sketch.add("Transpose", colours, perm=[0, 2, 1])
    colours = sketch.add("Add", colours, sketch.constant(0.01, np.float32))
    length = sketch.add("ReduceL2", colours, sketch.constant([2]), keepdims=1)
    return sketch.add("Div", colours, length)


def _save(path: Path, sketch: Sketch, opset: int, image: tuple, outputs: tuple, export: dict):
    ranks = {"keypoints": 3, "descriptors": 3, "scores": 2}
    graph = helper.make_graph(
        sketch.nodes,
        "small",
        [helper.make_tensor_value_info("image", *image)],
        [helper.make_tensor_value_info(n, FLOAT, ["B", "K", "D"][: ranks[n]]) for n in outputs],
        sketch.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    metadata = {f"aliked.{name}": json.dumps(value) for name, value in export.items()}
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
