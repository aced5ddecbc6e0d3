"""What an exported file computes: the model between the inputs and outputs of each contract."""

import contextlib
import copy
import io
import json
import math
import threading
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import nn

from aliked.configs import RADIUS, STRIDE, Form, most_rows
from aliked.detection import inner, refine, suppress_non_maxima
from aliked.errors import InputError
from aliked.export.deform_conv_onnx import NATIVE_TRANSLATION, standard_deform_conv
from aliked.export.onnx_graph import spell_out_selu
from aliked.files import whole_file
from aliked.model import ALIKED, to_tensor


class ImageGraph(nn.Module):
    """The default contract: `image` to `keypoints` in pixels, `descriptors` and `scores`.

    `image` is float32 [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3] with `uint8_input`. In
    threshold mode the rows come in descending order too, and `nms_scores` is an output: cut on it
    for a higher threshold.
    """

    def __init__(self, model: ALIKED, uint8_input: bool):
        super().__init__()
        self.model = model
        self.uint8_input = uint8_input
        self.output_names = ["keypoints", "descriptors", "scores"]
        if model.top_k <= 0:
            self.output_names.append("nms_scores")

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The outputs in the order of `output_names`."""
        output = self.model(to_tensor(image) if self.uint8_input else image)
        return [getattr(output, name) for name in self.output_names]


class ColmapGraph(nn.Module):
    """COLMAP's contract: how many keypoints there are is decided when the file runs.

    `image` float32 [1, 3, H, W] in [0, 1], padded to a multiple of 32 by the caller;
    `max_keypoints` int64 scalar; `min_score` float32 scalar, for the score at the maximum.
    Returns keypoints [1, K, 2] with the centres of the corner pixels at -1 and 1, descriptors
    [1, K, D] and scores [1, K], in descending order of the score at the maximum.
    """

    output_names = ("keypoints", "descriptors", "scores")

    def __init__(self, model: ALIKED):
        super().__init__()
        self.model = model

    def forward(
        self, image: torch.Tensor, max_keypoints: torch.Tensor, min_score: torch.Tensor
    ) -> list[torch.Tensor]:
        """The outputs in the order of `output_names`."""
        features, score_map = self.model.encode(image)
        candidates = inner(suppress_non_maxima(score_map, self.model.form))
        passing = (candidates > min_score.clamp(min=0)).sum()
        k = torch.minimum(max_keypoints, passing).clamp(min=0)
        if torch.jit.is_tracing():
            # A Reshape of no keypoints cannot infer a length: one row at least, cut off below.
            rows = k.clamp(min=1)
        else:  # a trace keeps the tensor, torch.export wants a symbol
            rows = k = k.item()
            torch._check(k >= 0)
            torch._check(k <= candidates.shape[1])
        found = refine(score_map, *candidates.topk(rows, dim=1), self.model.form)
        output = self.model.describe(features, found)
        height, width = image.shape[-2:]
        x, y = output.keypoints.unbind(2)
        keypoints = torch.stack((x * 2 / (width - 1) - 1, y * 2 / (height - 1) - 1), dim=2)
        outputs = [keypoints, output.descriptors, output.scores]
        return [values[:, :k] for values in outputs] if torch.jit.is_tracing() else outputs


class OpenCVGraph(nn.Module):
    """The contract of OpenCV's `cv2.ALIKED`: outputs without the batch axis and without fill-ins.

    `image` float32 [1, 3, H, W] RGB in [0, 1]; OpenCV resizes to its `Params.inputSize`, which has
    to be this size. Returns keypoints [N, 2] as x * 2 / W - 1, which OpenCV scales to the size of
    its own image: exact where that is H x W; s times as large, (s - 1) / 2 pixels too far up and
    left. Descriptors [N, D] and scores [N]; in descending order of the score at the maximum.
    """

    output_names = ("keypoints", "descriptors", "scores")

    def __init__(self, model: ALIKED):
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The outputs in the order of `output_names`."""
        output = self.model(image)
        kept = (output.nms_scores[0] > 0).nonzero()[:, 0]
        keypoints, descriptors, scores = (rows[0][kept] for rows in output[:3])
        height, width = image.shape[-2:]
        x, y = keypoints.unbind(1)
        return [torch.stack((x * 2 / width - 1, y * 2 / height - 1), dim=1), descriptors, scores]


CONTRACTS = {"colmap": ColmapGraph, "opencv": OpenCVGraph}
OPSETS = (17, 18, 19)
MAX_SIDE = 8192  # pixels, of a dynamic export


@dataclass(frozen=True)
class ExportOptions:
    """How to write the file."""

    height: int  # of the images, pixels
    width: int
    opset: int = 19
    deform_conv: str = "gridsample"  # or "gather"; "native": DeformConv, which fewer runtimes have
    dynamic: bool = False  # batch, height and width symbolic
    uint8_input: bool = False  # uint8 [B, H, W, 3] instead of float32 [B, 3, H, W]
    io: str = "default"  # or "colmap", "opencv"


def check_options(options: ExportOptions, model: ALIKED) -> None:
    """Raise `InputError` for options that cannot give a right file of `model`."""
    if options.opset > OPSETS[-1]:
        raise InputError(
            f"opset {options.opset} is not written: opset 20 renamed GridSample's modes, and "
            "TensorRT silently reads the new names as nearest neighbour; pass --opset_version 19"
        )
    if options.opset < OPSETS[0]:
        raise InputError(f"opset {options.opset} is too old; pass --opset_version 17, 18 or 19")
    if options.deform_conv == "native" and options.opset < 19:
        raise InputError(
            f"opset {options.opset} has no DeformConv; pass --deform_conv gridsample or gather, "
            "or --opset_version 19"
        )
    if options.io != "default" and options.uint8_input:
        raise InputError(
            f"COLMAP and OpenCV feed float images; leave out --uint8_input with --io {options.io}"
        )
    if options.io != "default" and model.top_k <= 0:
        raise InputError(f"--io {options.io} takes the best keypoints; leave out --top_k 0")
    if options.io == "colmap":
        return
    if options.io == "opencv":
        _check_opencv(options, model)
    rows = model.top_k if model.top_k > 0 else model.n_limit
    check_room(rows, options.width, options.height)


def check_room(rows: int, width: int, height: int) -> None:
    """Raise `InputError` where an image has fewer pixels to choose from than a file has rows."""
    room = most_rows(height, width)
    if rows > room:
        raise InputError(
            f"{rows} keypoints are more than a {width}x{height} image can give ({room}); pass a "
            "smaller --top_k or --n_limit"
        )


def _check_opencv(options: ExportOptions, model: ALIKED) -> None:
    """Refuse what OpenCV's own runtime does not run, or nobody has seen it run."""
    taken = {
        "--dynamic": options.dynamic,
        "--deform_conv native": options.deform_conv == "native",
        "--precision fp16": model.precision == "fp16",
    }
    for option, wanted in taken.items():
        if wanted:
            raise InputError(f"OpenCV does not run such a file; leave out {option} or --io opencv")


def make_graph(model: ALIKED, options: ExportOptions) -> nn.Module:
    """The module whose inputs and outputs are those of the file."""
    if options.io in CONTRACTS:
        return CONTRACTS[options.io](model).eval()
    return ImageGraph(model, options.uint8_input).eval()


def example_inputs(options: ExportOptions) -> dict[str, torch.Tensor]:
    """Inputs by name, random, of the size of the export or one near it where that is symbolic."""
    batch, height, width = 1, options.height, options.width
    if symbolic_axes(options):
        # torch.export cannot follow symbolic padding from an example that is padded.
        height, width = (math.ceil(side / STRIDE) * STRIDE for side in (height, width))
    if options.io == "colmap":
        return {
            "image": torch.rand(1, 3, height, width),
            "max_keypoints": torch.tensor(1000),
            "min_score": torch.tensor(0.0),
        }
    if options.dynamic:
        batch = 2  # torch.export would take a batch of 1 for a constant
    if options.uint8_input:
        return {"image": torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)}
    return {"image": torch.rand(batch, 3, height, width)}


def symbolic_axes(options: ExportOptions) -> dict[int, str]:
    """The axes of `image` that stay symbolic, and their names."""
    if options.io == "colmap":
        return {2: "height", 3: "width"}
    if not options.dynamic:
        return {}
    if options.uint8_input:
        return {0: "batch", 1: "height", 2: "width"}
    return {0: "batch", 2: "height", 3: "width"}


def export_native(
    graph: nn.Module, options: ExportOptions, verbose: bool, rows: int
) -> onnx.ModelProto:
    """What torch.export's exporter writes of `graph`, with opset 19's DeformConv."""
    inputs = example_inputs(options)
    smallest = max(32, 2 * RADIUS + math.isqrt(max(rows, 1)) + 1)  # has room for `rows`
    bounds = {"batch": (1, 4096), "height": (smallest, MAX_SIDE), "width": (smallest, MAX_SIDE)}
    axes = {
        axis: torch.export.Dim(name, min=bounds[name][0], max=bounds[name][1])
        for axis, name in symbolic_axes(options).items()
    }
    program = torch.onnx.export(
        graph,
        tuple(inputs.values()),
        dynamo=True,
        verbose=verbose,
        opset_version=options.opset,
        input_names=list(inputs),
        output_names=list(graph.output_names),
        dynamic_shapes=[axes or None] + [None] * (len(inputs) - 1),
        custom_translation_table=NATIVE_TRANSLATION,
    )
    return program.model_proto


def export_standard(
    graph: nn.Module, options: ExportOptions, verbose: bool, rows: int
) -> onnx.ModelProto:
    """What TorchScript's exporter writes of `graph`, with standard operators only."""
    inputs = example_inputs(options)
    axes = {"image": symbolic_axes(options)} if symbolic_axes(options) else {}
    symbol = {1: "num_keypoints"} if options.io == "colmap" else {0: "batch"}
    if axes:
        axes |= {name: symbol for name in graph.output_names}
    with standard_deform_conv(options.deform_conv, options.opset):
        return trace(graph, inputs, axes, options.opset)


def trace(
    graph: nn.Module,
    inputs: dict[str, torch.Tensor],
    axes: dict[str, dict[int, str]],
    opset: int,
) -> onnx.ModelProto:
    """What TorchScript's exporter writes of `graph`, whose `axes` stay symbolic, folded."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter says that it is deprecated, but for standard operators there is no other;
        # the tracer says what torchvision and `longest_side` do with sizes, which is meant. What it
        # does not fold of constants, `fold_constants` does.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.onnx.export(
            graph,
            tuple(inputs.values()),
            buffer,
            dynamo=False,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(graph.output_names),
            dynamic_axes=axes,
        )
    return fold_constants(onnx.load_from_string(buffer.getvalue()))


def fold_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Without arithmetic on constants and without repetition: a third to a half of the nodes.

    The optimiser of onnxscript does this and then rewrites patterns, which takes five to ten times
    as long and saves one node in a hundred.
    """
    model = onnx_ir.from_proto(proto)
    onnxscript.optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        # Left alone by default, as it can grow a file; here it makes shapes and small grids.
        should_fold=lambda node: True if node.op_type == "ConstantOfShape" else None,
    )
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
    ):
        tidy(model)
    return onnx_ir.to_proto(model)


def square_kernels(proto: onnx.ModelProto) -> None:
    """Write convolutions along the last axis as 1x1 ones: OpenCV 5.0.0 computes others wrongly.

    Each has the whole axis as its kernel: [B, C, N, T] to [B, out, N, 1].
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = []
    for node in proto.graph.node:
        kernel = weights[node.input[1]].dims if node.op_type == "Conv" else []
        if len(kernel) == 4 and kernel[2] != kernel[3]:
            out, channels, _, taps = kernel
            name = node.output[0]
            shape = onnx.numpy_helper.from_array(
                np.array([0, channels * taps, -1, 1]), f"{name} shape"
            )
            values = onnx.numpy_helper.to_array(weights[node.input[1]])
            weight = onnx.numpy_helper.from_array(
                values.reshape(out, channels * taps, 1, 1), f"{name} weight"
            )
            proto.graph.initializer.extend([shape, weight])
            proto.graph.initializer.remove(weights[node.input[1]])
            turned, rows = f"{name} turned", f"{name} rows"
            nodes += [
                onnx.helper.make_node("Transpose", node.input[:1], [turned], perm=[0, 1, 3, 2]),
                onnx.helper.make_node("Reshape", [turned, shape.name], [rows]),
            ]
            node.input[0], node.input[1] = rows, weight.name
            for attribute in node.attribute:
                if attribute.name == "kernel_shape":
                    attribute.ints[:] = [1, 1]
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


# The exporters register operators, catch warnings and redirect the output of the whole process.
exporting = threading.Lock()


def export_onnx(
    model: ALIKED, path: Path, options: ExportOptions, verbose: bool = False
) -> onnx.ModelProto:
    """Write `model` to `path`, whole or not at all, checked by ONNX's full checker.

    Returns what was written. Raises `InputError` for options that cannot give a right file.
    Threads that export wait for each other; `model` can run in others meanwhile.
    """
    rows = model.top_k if model.top_k > 0 else model.n_limit
    check_options(options, model)
    # OpenCV's runtime lacks operators that TensorRT is fast with.
    model = in_exported_form(model, bool(symbolic_axes(options)), options.io != "opencv")
    graph = make_graph(model, options)
    export = export_native if options.deform_conv == "native" else export_standard
    with exporting, torch.inference_mode(), silence(not verbose):
        proto = export(graph, options, verbose, 0 if options.io == "colmap" else rows)
    if options.io == "opencv":
        square_kernels(proto)
    if options.uint8_input:
        measure_behind_the_cast(proto)
    spell_out_selu(proto)
    name_axes(proto, options, rows)
    onnx.helper.set_model_props(proto, describe(model, options))
    onnx.checker.check_model(proto, full_check=True)
    with whole_file(path) as partial:
        onnx.save(proto, partial)
    return proto


def in_exported_form(model: ALIKED, dynamic: bool, exported: bool = True) -> ALIKED:
    """A model of the same weights that writes itself for runtimes; how it samples stays."""
    model = copy.copy(model)
    model.form = Form(model.form.sampling, exported, dynamic)
    return model


def silence(quiet: bool) -> contextlib.AbstractContextManager:
    """Keep the exporters' progress lines off the terminal, where that is to be `quiet`."""
    return contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()


def measure_behind_the_cast(proto: onnx.ModelProto) -> None:
    """Take the sizes of `image` from its cast to float: TensorRT only casts uint8."""
    cast = next(n for n in proto.graph.node if n.op_type == "Cast" and n.input[0] == "image")
    others = [node for node in proto.graph.node if node != cast]
    for node in others:
        if node.op_type == "Shape" and node.input[0] == "image":
            node.input[0] = cast.output[0]
    del proto.graph.node[:]
    proto.graph.node.extend([cast, *others])


def name_axes(proto: onnx.ModelProto, options: ExportOptions, rows: int) -> None:
    """Declare the outputs' first two axes, which the exporters name at random or leave unknown."""
    for output in proto.graph.output:
        if options.io == "opencv":
            output.type.tensor_type.shape.dim[0].dim_param = "num_keypoints"
            continue
        batch, keypoints = output.type.tensor_type.shape.dim[:2]
        if options.dynamic and options.io == "default":
            batch.dim_param = "batch"
        else:
            batch.dim_value = 1
        if options.io == "colmap":
            keypoints.dim_param = "num_keypoints"
        else:
            keypoints.dim_value = rows


def describe(model: ALIKED, options: ExportOptions) -> dict[str, str]:
    """The file's own metadata: enough to know what it is without its manifest."""
    facts = {
        "model": model.name,
        "precision": model.precision,
        "sampling": model.form.sampling,
        "top_k": model.top_k,
        "scores_th": model.scores_th,
        "n_limit": model.n_limit,
        "strict": model.strict,
        "weights_sha256": model.weights_sha256,
        **asdict(options),
    }
    return {f"aliked.{name}": json.dumps(value) for name, value in facts.items()}
