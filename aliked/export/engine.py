"""From an ONNX file to an engine, which is compared with PyTorch before it gets its name.

TensorRT for RTX builds without a GPU. Such an engine is kept as not yet verified, and `verify`
compares it later, on a machine with a GPU.
"""

import dataclasses
import functools
import glob
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from aliked import gpu
from aliked.backends.cuda_memory import create_memory
from aliked.backends.tensorrt import (
    BUILDER,
    INPUT,
    TensorRTExtractor,
    describe_targets,
    deserialize,
    is_export,
    manifest_path,
    mismatch,
    precision_of,
    read_manifest,
)
from aliked.backends.tensorrt_library import BUILDERS, LIBRARIES, RTX, Library, tf32_is_off
from aliked.backends.tensorrt_lightglue import LIGHTGLUE_BUILDER
from aliked.configs import Selection
from aliked.errors import InputError
from aliked.export.builder import (
    BuildOptions,
    Shape,
    build_plan,
    check_options,
    has_weak_fp16,
    layer_information,
    targets_of,
)
from aliked.export.onnx_checks import check_model
from aliked.export.onnx_graph import Target, graph_precision, load_model
from aliked.features import OUTPUTS
from aliked.files import (
    check_outputs,
    read_text,
    real_path,
    scratch_folder,
    sha256,
    write_json,
    write_text,
)
from aliked.images import list_images
from aliked.matching import TENSORS
from aliked.parity import TOLERANCES

if TYPE_CHECKING:
    from aliked.backends.pytorch import PyTorchExtractor
    from aliked.export.verify import NamedImages


@dataclass(frozen=True)
class Source:
    """An ONNX file of this project."""

    path: Path
    model: onnx.ModelProto
    export: dict  # what the export wrote into it: model, top_k, ...; empty where it is not there
    shape: Shape  # of the input `image`, -1 for each dynamic size
    precision: str  # "FP32" or "FP16"

    @property
    def images(self) -> Path | None:
        """The folder of images that the export was checked on, where its manifest says."""
        try:
            named = json.loads(read_text(manifest_path(self.path)))["images"]
            return Path(named)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

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
    if any(set(names) == set(taken) for taken, _ in TENSORS.values()):
        raise InputError(
            f"{path} holds LightGlue, whose engines {LIGHTGLUE_BUILDER} makes and "
            "measure_timings.py --matcher lightglue judges; give a file of a model"
        )
    if names != [INPUT] or not set(OUTPUTS) <= set(outputs):
        raise InputError(
            f"{path} has inputs {names} and outputs {outputs}, not {INPUT} and "
            f"{', '.join(OUTPUTS)}; give a file that convert_pytorch_to_onnx.py wrote with its "
            "default --io"
        )
    dims = inputs[0].type.tensor_type.shape.dim
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
    export = _export_metadata(path, model)
    if export.get("io", "default") != "default":
        raise InputError(
            f"{path} was exported with --io {export['io']}, for another program's runtime; export "
            "it with the default --io"
        )
    # A float32 export counts maxima in half precision, which holds small whole numbers exactly.
    said = str(export.get("precision", "")).upper()
    precision = said if said in ("FP32", "FP16") else graph_precision(model)
    return Source(path, model, export, shape, precision)


def _export_metadata(path: Path, model: onnx.ModelProto, prefix: str = "aliked.") -> dict:
    try:
        export = {
            entry.key.removeprefix(prefix): json.loads(entry.value)
            for entry in model.metadata_props
            if entry.key.startswith(prefix)
        }
    except (ValueError, RecursionError):
        export = None
    if not is_export(export):
        raise InputError(f"the metadata of {path} are not this project's; export it again")
    return export


def check_source(source: Source, target: Target) -> str:
    """The findings of the file as text; `InputError` with all of them where one is an error."""
    findings = check_model(source.model, target)
    text = "\n".join(map(str, findings))
    if any(finding.severity == "error" for finding in findings):
        raise InputError(f"{target.library} would refuse or misread {source.path}:\n{text}")
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
    elif {"scores_th", "n_limit"} <= made.keys():
        words.append(f"--top_k 0 --scores_th {made['scores_th']} --n_limit {made['n_limit']}")
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
    _check_room(source, smallest)
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


def _check_room(source: Source, smallest: Shape) -> None:
    """`InputError` where the smallest image has fewer pixels than the file gives keypoints."""
    if not {"top_k", "n_limit"} <= source.export.keys():
        return
    selection = Selection(source.export["top_k"], n_limit=source.export["n_limit"])
    height, width = smallest[1:3] if source.uint8 else smallest[2:4]
    room = selection.rows(height, width)
    if room < selection.limit:
        raise InputError(
            f"--min_shape {list(smallest)} has room for {room} keypoints and {source.path} gives "
            f"{selection.limit}; give a larger one, or export it for fewer"
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
    engine_path: Path | None = None  # None: the ONNX path, ending in .trt or .rtx
    # `shapes` and `weak_fp16` follow from the file.
    options: BuildOptions = field(default_factory=BuildOptions)
    builder: str | None = None  # "tensorrt" or "tensorrt-rtx"; None: the first that can
    precision: str | None = None  # "FP32" or "FP16"; None: as the file is
    shapes: tuple[Shape | None, ...] = (None, None, None)  # min, opt, max
    verify: bool = True
    judged_by: str | None = None  # who compares an engine that is not verified here
    images: Path | None = None  # None: those of the export
    num_images: int = 10  # of that folder
    weights: Path | None = None  # of the PyTorch reference
    memory: str = "torch"  # of the verification
    script: str = f"python {BUILDER}"  # as the user calls this


def choose_library(builder: str | None) -> tuple[Library, str]:
    """Return the library that builds here, and why it and not another one.

    By default TensorRT, where it is installed and finds a GPU, or else TensorRT for RTX, which
    needs none. `InputError` where the library, or all of them, cannot build.
    """
    wanted = [LIBRARIES[name] for name in ([builder] if builder else BUILDERS)]
    reasons = {library: library.cannot_build() for library in wanted}
    for library in wanted:
        if reasons[library] is None:
            passed_over = wanted[: wanted.index(library)]
            why = "; ".join(f"{other} cannot: {reasons[other]}" for other in passed_over)
            return library, why or ("as asked for" if builder else "the first choice")
    why = "; ".join(f"{library}: {reasons[library]}" for library in wanted)
    raise InputError(f"no engine can be built here: {why}")


def convert(request: Request) -> bool:
    """Build an engine, compare it with PyTorch, and keep it under its name or as `.rejected`.

    Everything that can be wrong with the request is found before the build, which can take
    minutes: `InputError`. Where there is no GPU to compare it on, it is kept as not yet verified.
    Writes the engine, its manifest and, with `options.detailed`, its layers, all or none; what
    was there before stays until then. Returns whether the engine was accepted.
    """
    source = read_source(request.onnx_path)
    shapes = check_shapes(source, request.shapes)
    if request.images:
        list_images(request.images)  # which a later --verify is told to take, too
    library, why = choose_library(request.builder)
    request = _named(request, library)
    check_options(library, request.options)
    target = Target(library.title, request.options.version_compatible, _batch(shapes))
    if findings := check_source(source, target):
        print(findings)
    weak_fp16 = _weak_fp16(library, source, request.precision)
    tf32 = request.options.tf32 and not tf32_is_off()
    options = dataclasses.replace(request.options, shapes=shapes, weak_fp16=weak_fp16, tf32=tf32)
    manifest = _manifest(request, source, options, library)
    print(f"building with {library} {library.version} ({why}) for {_gpus(manifest)}")
    unverified = _unverifiable(manifest, library) if request.verify else "--no_verify"
    judge = None if unverified else _prepare_verification(request, source, shapes)
    if unverified and not request.judged_by:
        manifest["verify_with"] = _verify_command(request, manifest)
    if options.detailed and (reason := library.unavailable()):
        raise InputError(f"--inspect needs a GPU to ask the engine on, and {reason}; leave it out")
    with scratch_folder(request.engine_path.parent) as folder:
        draft = folder / request.engine_path.name
        _build(source.path, options, library, manifest, draft)
        try:
            passed = judge is None or judge(draft)
        except InputError:  # an engine that does not even run
            _keep(draft, request.engine_path, passed=False)
            raise
        _keep(draft, request.engine_path, passed)
    if manifest["verify_with"]:
        print(f"NOT YET VERIFIED ({unverified}); where there is a GPU: {manifest['verify_with']}")
    return passed


def _named(request: Request, library: Library) -> Request:
    """The request with its engine's path, by default of the suffix that benchmarks use.

    `InputError` where no engine can be written there, or the file that it is built from lies there.
    """
    suffix = ".rtx" if library is RTX else ".trt"
    path = request.engine_path or request.onnx_path.with_suffix(suffix)
    kinds = ("", ".json", *LAYER_SUFFIXES)
    files = [Path(f"{path}{name}{kind}") for name in ("", ".rejected") for kind in kinds]
    check_outputs(files, "--model_trt_path")
    source = (request.onnx_path, manifest_path(request.onnx_path))
    if not set(map(real_path, files)).isdisjoint(map(real_path, source)):
        raise InputError(
            f"the engine {path} would take the place of {request.onnx_path} or its manifest; give "
            "another --model_trt_path"
        )
    return dataclasses.replace(request, engine_path=path)


def _batch(shapes: tuple[Shape, ...] | None) -> int | None:
    return shapes[2][0] if shapes else None


def _gpus(manifest: dict) -> str:
    if manifest["gpu"]:
        return "{name} ({compute_capability})".format(**manifest["gpu"])
    return describe_targets(manifest["compute_capabilities"])


def _unverifiable(manifest: dict, library: Library) -> str | None:
    """Why the engine that this manifest describes cannot be run on this machine, or None."""
    return library.unavailable() or mismatch(manifest, library, gpu.devices()[0])


def _prepare_verification(
    request: Request, source: Source, shapes: tuple[Shape, ...] | None
) -> Callable[[Path], bool]:
    """Return what judges a draft, after checking that all is there that the judgement needs."""
    from aliked.export.verify import (  # they load PyTorch
        check_telling,
        create_reference,
        load_fitting_images,
    )

    folder = request.images or source.images
    if folder is None:
        raise InputError(
            f"an engine is verified on photographs, and the manifest of {source.path} names none; "
            "pass --images FOLDER, or --no_verify"
        )
    smallest, _, largest = shapes or (source.shape,) * 3
    images = load_fitting_images(folder, request.num_images, source.uint8, smallest, largest)
    create_memory(request.memory, index=0)
    reference = create_reference(source.path, source.export, request.weights)
    check_telling(reference, images)
    open_draft = functools.partial(TensorRTExtractor, memory=request.memory)
    return lambda draft: _judge(open_draft(draft), folder, images, reference)


def verify(
    engine: Path, images: Path | None, num_images: int, weights: Path | None, memory: str
) -> bool:
    """Compare an engine that exists with PyTorch and write the verdict into its manifest.

    `images` is a folder, by default that of the export. A wrong engine is renamed to
    `.rejected`. Returns whether it was accepted; `InputError` where it cannot be compared here.
    """
    from aliked.export.verify import (  # they load PyTorch
        check_telling,
        create_reference,
        load_fitting_images,
    )

    manifest = read_manifest(engine)
    folder = images or manifest["source"].get("images")
    if folder is None:
        raise InputError(f"the manifest of {engine} names no photographs; pass --images FOLDER")
    quiet = manifest | {"verify_with": None}
    extractor = TensorRTExtractor(engine, memory=memory, manifest=quiet)
    uint8, limits = extractor.dtype.name == "uint8", extractor.limits()
    found = load_fitting_images(Path(folder), num_images, uint8, *limits)
    reference = create_reference(engine, manifest["source"]["export"], weights)
    check_telling(reference, found)
    passed = _judge(extractor, Path(folder), found, reference)
    if not passed:
        _keep(engine, engine, passed)
    return passed


def _judge(
    extractor: TensorRTExtractor, folder: Path, images: "NamedImages", reference: "PyTorchExtractor"
) -> bool:
    """Compare the engine with the reference, and write the verdict into its manifest."""
    from aliked.export.verify import verify_engine

    manifest = read_manifest(extractor.path)
    limits = TOLERANCES[precision_of(manifest)]
    verdict = verify_engine(extractor, reference, images, limits)
    print(verdict.text)
    manifest["verified"] = {
        "images": str(folder),
        "passed": verdict.passed,
        "text": verdict.text.splitlines(),
    }
    manifest["verify_with"] = None
    write_json(manifest_path(extractor.path), manifest)
    return verdict.passed


def _weak_fp16(library: Library, source: Source, precision: str | None) -> bool:
    weak = needs_weak_fp16(source, precision or source.precision, has_weak_fp16(library.load()))
    if weak:
        print(
            "the file is FP32: TensorRT chooses where to use FP16, for coordinates and sampling "
            "too; a file exported with --precision fp16 keeps these in float32"
        )
    return weak


def _build(
    onnx_path: Path, options: BuildOptions, library: Library, manifest: dict, draft: Path
) -> None:
    """Write the engine, its manifest and, if asked for, its layers."""
    draft.write_bytes(build_plan(library, onnx_path, options))
    write_json(manifest_path(draft), {"sha256": sha256(draft), **manifest})
    if options.detailed:
        engine = deserialize(draft, options.version_compatible, library)
        information = layer_information(library.load(), engine)
        table = layer_table(information)
        as_json, as_text = _layer_files(draft)
        write_json(as_json, information)
        write_text(as_text, table + "\n")
        print(table)


def _manifest(request: Request, source: Source, options: BuildOptions, library: Library) -> dict:
    """What is known of the engine before it is built: all but its SHA-256 and the verdict."""
    images = request.images or source.images
    made_of = _made_of(source.path, source.export, str(images) if images else None)
    precision = request.precision or source.precision
    return _description(library, options, precision, made_of, request.judged_by)


def _made_of(onnx_path: Path, export: dict, images: str | None = None) -> dict:
    """What a manifest says of the ONNX file."""
    file = {"file": onnx_path.name, "sha256": sha256(onnx_path)}
    return {**file, "export": export, "images": images}


def _description(
    library: Library, options: BuildOptions, precision: str, made_of: dict, judged_by: str | None
) -> dict:
    """The fields of a manifest but for the engine's SHA-256."""
    flags = dataclasses.asdict(options)
    flags["timing_cache"] = str(options.timing_cache) if options.timing_cache else None
    flags["compute_capabilities"] = targets_of(options)
    built_on = None if library is RTX else gpu.devices()[0]
    return {
        "library": library.name,
        "version": library.version,
        "gpu": built_on
        and {"name": built_on.name, "compute_capability": built_on.compute_capability},
        "precision": precision,
        **flags,
        "source": made_of,
        "verified": None,
        "judged_by": judged_by,
        "verify_with": None,
    }


def build_lightglue(
    onnx_path: Path, path: Path, library: Library, options: BuildOptions, judged_by: str
) -> None:
    """Build the engine `path` of a file that holds LightGlue, with its manifest, unverified."""
    options = dataclasses.replace(options, tf32=options.tf32 and not tf32_is_off())
    model = load_model(onnx_path)
    export = _export_metadata(onnx_path, model, "lightglue.")
    made_of = _made_of(onnx_path, export)
    manifest = _description(library, options, export["precision"].upper(), made_of, judged_by)
    with scratch_folder(path.parent) as folder:
        draft = folder / path.name
        _build(onnx_path, options, library, manifest, draft)
        _keep(draft, path, passed=True)


def _verify_command(request: Request, manifest: dict) -> str:
    """The command that does later what the request asked for and cannot be done here."""
    words = [*request.script.split(), "--verify", str(request.engine_path)]
    for name in ("num_images", "weights", "memory"):
        if getattr(request, name) != getattr(Request, name):
            words += [f"--{name}", str(getattr(request, name))]
    return shlex.join(words) + ("" if manifest["source"]["images"] else " --images FOLDER")


def _keep(draft: Path, engine_path: Path, passed: bool) -> None:
    """Give the draft's files their names; those of a wrong engine end in `.rejected`."""
    kept = engine_path if passed else engine_path.with_name(engine_path.name + ".rejected")
    for file in _layer_files(kept):  # of an earlier build, which this engine is not
        file.unlink(missing_ok=True)
    caches = draft.parent.glob(f"{glob.escape(draft.name)}.*.cache")
    for file in (draft, manifest_path(draft), *_layer_files(draft), *caches):
        if file.exists():
            os.replace(file, kept.with_name(kept.name + file.name.removeprefix(draft.name)))
    print(f"wrote {kept}" if passed else f"wrong results: the engine is kept only as {kept}")


def _layer_files(engine: Path) -> list[Path]:
    return [engine.with_name(engine.name + suffix) for suffix in LAYER_SUFFIXES]
