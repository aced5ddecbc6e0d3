"""From an ONNX file to an engine that was compared with PyTorch before it gets its name."""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aliked import gpu
from aliked.backends.cuda_memory import create_memory
from aliked.backends.tensorrt_manifest import BuildOptions, Shape, manifest_path, read_manifest
from aliked.backends.tensorrt_runtime import deserialize, runtime_module, unavailable
from aliked.engine_build.layers import layer_table
from aliked.engine_build.source import (
    Source,
    check_shapes,
    check_source,
    needs_weak_fp16,
    read_source,
)
from aliked.errors import InputError
from aliked.files import sha256, writable_folder, write_json
from aliked.onnx_checks import Target

if TYPE_CHECKING:
    from aliked.backends.pytorch import PyTorchExtractor  # which `--no_verify` does without

__all__ = ["Request", "convert"]

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
    from aliked.engine_build.verify import create_reference, load_fitting_images

    if request.images is None:
        raise InputError(
            "an engine is verified on photographs; pass --images FOLDER, or --no_verify"
        )
    smallest, _, largest = shapes or (source.shape,) * 3
    images = load_fitting_images(
        request.images, request.num_images, source.uint8, smallest, largest
    )
    create_memory(request.memory, index=0)
    reference = create_reference(source, request.weights)
    return lambda draft: _verify(request, reference, images, draft)


def _weak_fp16(source: Source, precision: str | None) -> bool:
    from aliked.backends.tensorrt_builder import has_weak_fp16

    weak = needs_weak_fp16(source, precision or source.precision, has_weak_fp16())
    if weak:
        print(
            "the file is FP32: TensorRT chooses where to use FP16, for coordinates and sampling "
            "too; a file exported with --precision fp16 keeps these in float32"
        )
    return weak


def _build(source: Source, options: BuildOptions, draft: Path, precision: str) -> None:
    """Write the engine, its manifest and, if asked for, its layers."""
    from aliked.backends.tensorrt_builder import build_plan, layer_information

    draft.write_bytes(build_plan(source.path, options))
    write_json(manifest_path(draft), _manifest(source, options, draft, precision))
    if options.detailed:
        information = layer_information(deserialize(draft, options.version_compatible))
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
    from aliked.engine_build.verify import tolerance, verify

    manifest = read_manifest(draft)
    limits = tolerance(manifest["precision"], manifest["tf32"])
    verdict = verify(draft, reference, images, limits, request.memory)
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
