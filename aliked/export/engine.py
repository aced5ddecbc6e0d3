"""From an ONNX file to an engine that was compared with PyTorch before it gets its name."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from aliked import gpu
from aliked.backends.cuda_memory import create_memory
from aliked.backends.tensorrt import (
    deserialize,
    manifest_path,
    read_manifest,
    runtime_module,
    unavailable,
)
from aliked.errors import InputError
from aliked.export.builder import BuildOptions, Shape, build_plan, has_weak_fp16, layer_information
from aliked.export.onnx_checks import Target, check_model, graph_precision, load_model
from aliked.files import sha256, writable_folder, write_json

if TYPE_CHECKING:
    from aliked.backends.pytorch import PyTorchExtractor


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


def layer_table(information: dict) -> str:
    """One line per layer: number, type, name, output types and tactic, as far as they are given.

    Without detailed profiling verbosity the inspector gives names only.
    """
    rows = [("#", "type", "name", "outputs", "tactic")]
    for index, layer in enumerate(information.get("Layers", [])):
        if isinstance(layer, str):
            rows.append((str(index), "", layer, "", ""))
            continue
        outputs = ", ".join(_describe(tensor) for tensor in layer.get("Outputs", []))
        tactic = layer.get("TacticName", layer.get("TacticValue", ""))
        rows.append(
            (str(index), layer.get("LayerType", ""), layer.get("Name", ""), outputs, str(tactic))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _describe(tensor: dict) -> str:
    """Shape and type of a tensor; TensorRT 11 gives in two fields what 10 gives in one."""
    kinds = ("Format/Datatype", "Format", "Datatype", "DataType")
    kind = " ".join(str(tensor[name]) for name in kinds if name in tensor)
    return f"{tensor.get('Dimensions', '')} {kind}".strip()


LAYER_SUFFIXES = (".layers.json", ".layers.txt")


@dataclass(frozen=True)
class Request:
    """What to build, and on which images to judge it."""

    onnx_path: Path
    engine_path: Path
    options: BuildOptions  # `shapes` and `weak_fp16` follow from the file
    precision: str | None = None  # "FP32" or "FP16"; None: as the file is
    shapes: tuple[Shape | None, ...] = (None, None, None)  # min, opt, max
    verify: bool = True
    images: Path | None = None
    num_images: int = 10  # of that folder
    weights: Path | None = None  # of the PyTorch reference
    memory: str = "torch"  # of the verification


def convert(request: Request) -> bool:
    """Build an engine, compare it with PyTorch, and keep it under its name or as `.rejected`.

    Everything that can be wrong with the request is found before the build, which takes minutes:
    `InputError`. Writes the engine, its manifest and, with `options.detailed`, its layers, all or
    none; what was there before stays until then. Returns whether the engine was accepted.
    """
    source = read_source(request.onnx_path)
    shapes = check_shapes(source, request.shapes)
    max_batch = shapes[2][0] if shapes else None
    findings = check_source(source, Target(request.options.version_compatible, max_batch))
    if findings:
        print(findings)
    reason = unavailable()
    if reason:
        raise InputError(f"no engine can be built here: {reason}")
    judge = _prepare_verification(request, source, shapes) if request.verify else None
    options = dataclasses.replace(
        request.options, shapes=shapes, weak_fp16=_weak_fp16(source, request.precision)
    )
    writable_folder(request.engine_path.parent)
    with tempfile.TemporaryDirectory(dir=request.engine_path.parent, prefix=".build-") as folder:
        draft = Path(folder) / request.engine_path.name
        _build(source, options, draft, request.precision or source.precision)
        try:
            passed = judge is None or judge(draft)
        except InputError:  # an engine that does not even run
            _keep(draft, request.engine_path, passed=False)
            raise
        _keep(draft, request.engine_path, passed)
    return passed


def _prepare_verification(
    request: Request, source: Source, shapes: tuple[Shape, ...] | None
) -> Callable[[Path], bool]:
    """What judges a draft, after checking that everything is there that the judgement needs."""
    from aliked.export.verify import create_reference, load_fitting_images

    if request.images is None:
        raise InputError(
            "an engine is verified on photographs; pass --images FOLDER, or --no_verify"
        )
    smallest, _, largest = shapes or (source.shape,) * 3
    images = load_fitting_images(
        request.images, request.num_images, source.uint8, smallest, largest
    )
    create_memory(request.memory, index=0)
    reference = create_reference(source.path, source.export, request.weights)
    return lambda draft: _verify(request, reference, images, draft)


def _weak_fp16(source: Source, precision: str | None) -> bool:

    weak = needs_weak_fp16(
        source, precision or source.precision, has_weak_fp16(runtime_module(lean=False))
    )
    if weak:
        print(
            "the file is FP32: TensorRT chooses where to use FP16, for coordinates and sampling "
            "too; a file exported with --precision fp16 keeps these in float32"
        )
    return weak


def _build(source: Source, options: BuildOptions, draft: Path, precision: str) -> None:
    """Write the engine, its manifest and, if asked for, its layers."""

    draft.write_bytes(build_plan(runtime_module(lean=False), source.path, options))
    write_json(manifest_path(draft), _manifest(source, options, draft, precision))
    if options.detailed:
        information = layer_information(
            runtime_module(lean=False), deserialize(draft, options.version_compatible)
        )
        table = layer_table(information)
        as_json, as_text = (draft.with_name(draft.name + suffix) for suffix in LAYER_SUFFIXES)
        write_json(as_json, information)
        as_text.write_text(table + "\n")
        print(table)


def _manifest(source: Source, options: BuildOptions, draft: Path, precision: str) -> dict:
    device = gpu.devices()[0]
    flags = dataclasses.asdict(options)
    flags["timing_cache"] = str(options.timing_cache) if options.timing_cache else None
    return {
        "sha256": sha256(draft),
        "tensorrt": runtime_module(lean=False).__version__,
        "gpu": {"name": device.name, "compute_capability": device.compute_capability},
        "precision": precision,
        **flags,
        "source": {
            "file": source.path.name,
            "sha256": sha256(source.path),
            "export": source.export,
        },
        "verified": None,
    }


def _verify(request: Request, reference: "PyTorchExtractor", images: list, draft: Path) -> bool:
    """Judge the draft, and write the verdict into its manifest."""
    from aliked.export.verify import tolerance, verify_engine

    manifest = read_manifest(draft)
    limits = tolerance(manifest["precision"], manifest["tf32"])
    verdict = verify_engine(draft, reference, images, limits, request.memory)
    print(verdict.text)
    manifest["verified"] = {
        "images": str(request.images),
        "passed": verdict.passed,
        "text": verdict.text.splitlines(),
    }
    write_json(manifest_path(draft), manifest)
    return verdict.passed


def _keep(draft: Path, engine_path: Path, passed: bool) -> None:
    """Give the draft's files their names; those of a wrong engine end in `.rejected`."""
    kept = engine_path if passed else engine_path.with_name(engine_path.name + ".rejected")
    for suffix in LAYER_SUFFIXES:  # of an earlier build, which this engine is not
        kept.with_name(kept.name + suffix).unlink(missing_ok=True)
    for file in sorted(draft.parent.iterdir()):
        os.replace(file, kept.with_name(kept.name + file.name.removeprefix(draft.name)))
    print(f"wrote {kept}" if passed else f"wrong results: the engine is kept only as {kept}")
