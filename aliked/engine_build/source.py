"""The ONNX file that an engine is to be built from, and whether it fits what was asked for."""

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from aliked.backends.tensorrt_manifest import Shape
from aliked.errors import InputError
from aliked.onnx_checks import Target, check_model, graph_precision, load_model

INPUT, OUTPUTS = "image", ("keypoints", "descriptors", "scores")


@dataclass(frozen=True)
class Source:
    """An ONNX file of this project."""

    path: Path
    model: onnx.ModelProto
    export: dict  # what the export wrote into it: model, top_k, ...; empty where it is not there
    shape: Shape  # of the input `image`, -1 for each dynamic size
    precision: str  # "FP32" or "FP16"

    @property
    def uint8(self) -> bool:
        """Whether the input is uint8 [B, H, W, 3], not float [B, 3, H, W]."""
        return self.model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def read_source(path: Path) -> Source:
    """Read an ONNX file and what its export wrote into it; `InputError` for one of other making."""
    model = load_model(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    names = [value.name for value in inputs]
    outputs = [value.name for value in model.graph.output]
    if names != [INPUT] or not set(OUTPUTS) <= set(outputs):
        raise InputError(
            f"{path} has inputs {names} and outputs {outputs}, not {INPUT} and "
            f"{', '.join(OUTPUTS)}; give a file that convert_pytorch_to_onnx.py wrote with its "
            "default --io"
        )
    dims = inputs[0].type.tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    return Source(path, model, _export_metadata(model), shape, graph_precision(model))


def _export_metadata(model: onnx.ModelProto) -> dict:
    prefix = "aliked."
    return {
        entry.key.removeprefix(prefix): json.loads(entry.value)
        for entry in model.metadata_props
        if entry.key.startswith(prefix)
    }


def check_source(source: Source, target: Target) -> str:
    """The findings of the file as text; `InputError` with all of them where one is an error."""
    findings = check_model(source.model, target)
    text = "\n".join(map(str, findings))
    if any(finding.severity == "error" for finding in findings):
        raise InputError(f"TensorRT would refuse or misread {source.path}:\n{text}")
    return text


def needs_weak_fp16(source: Source, asked: str, available: bool) -> bool:
    """Whether TensorRT has to choose FP16 by itself, where it can (`available`).

    `InputError` where the file is FP16 and FP32 was asked for, or the other way round and this
    TensorRT takes the types of the file.
    """
    if asked == source.precision:
        return False
    if asked == "FP32":
        raise InputError(
            f"{source.path} is FP16 and FP32 was asked for; pass --precision_mode FP16, or export "
            f"in FP32 and build from that:\n  {export_command(source, 'fp32')}"
        )
    if not available:
        raise InputError(
            f"{source.path} is FP32 and FP16 was asked for, but this TensorRT takes the types of "
            f"the file; export in FP16 and build from that:\n  {export_command(source, 'fp16')}"
        )
    return True


def export_command(source: Source, precision: str) -> str:
    """The command that exports the same model in another precision."""
    made = source.export
    output = source.path.with_name(f"{source.path.stem}-{precision}.onnx")
    words = ["python convert_pytorch_to_onnx.py IMAGES", f"--model {made.get('model', 'MODEL')}"]
    if made.get("top_k", 0) > 0:
        words.append(f"--top_k {made['top_k']}")
    elif made:
        words.append(f"--scores_th {made['scores_th']} --n_limit {made['n_limit']}")
    else:
        words.append("--top_k K")
    if -1 in source.shape:
        words.append("--dynamic")
    if source.uint8:
        words.append("--uint8_input")
    return " ".join([*words, f"--precision {precision} --model_output {output}"])


def check_shapes(source: Source, shapes: tuple[Shape | None, ...]) -> tuple[Shape, ...] | None:
    """Min, opt and max shape for a dynamic file, None for a static one.

    `InputError` where they are missing, superfluous or contradict each other or the file.
    """
    given = [shape for shape in shapes if shape is not None]
    if -1 not in source.shape:
        if given:
            raise InputError(
                f"{source.path} has the fixed input {list(source.shape)}; leave --min_shape, "
                "--opt_shape and --max_shape out, or export it with --dynamic"
            )
        return None
    if len(given) != 3:
        raise InputError(
            f"{source.path} has the dynamic input {list(source.shape)}; give --min_shape, "
            "--opt_shape and --max_shape"
        )
    for shape in given:
        _check_fits(source, shape)
    smallest, usual, largest = given
    if not all(low <= mid <= high for low, mid, high in zip(*given, strict=True)):
        raise InputError(
            f"--min_shape {list(smallest)}, --opt_shape {list(usual)} and --max_shape "
            f"{list(largest)} must not decrease in any place"
        )
    return smallest, usual, largest


def _check_fits(source: Source, shape: Shape) -> None:
    fits = len(shape) == len(source.shape) and all(
        fixed in (-1, size) and size > 0 for fixed, size in zip(source.shape, shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"the shape {list(shape)} does not fit the input {list(source.shape)} of "
            f"{source.path}; give one with the same fixed sizes, such as "
            f"{'x'.join(str(size if size > 0 else 'N') for size in source.shape)}"
        )
