"""The files that backends run instead of the model, made for one row of a benchmark."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.pytorch import NamedOutputs, load_model, plain_float32
from aliked.backends.tensorrt_library import RTX, TENSORRT, THIS_GPU
from aliked.export.builder import BuildOptions
from aliked.export.engine import Request, build_lightglue, convert, read_source
from aliked.export.lightglue import MatcherOptions, PairOptions, export_matcher, export_pair
from aliked.export.onnx_export import ExportOptions, export_onnx
from aliked.files import whole_file
from aliked.lightglue import LightGlue
from aliked.model import to_tensor
from aliked.transfer import choose_device

Shape = tuple[int, int, int]  # B, H, W
JUDGE = "whoever times it"


def build_onnx(spec: Spec, shape: Shape, path: Path) -> None:
    """Export the model of `spec` for uint8 images of `shape` to `path`."""
    batch, height, width = shape
    model = load_model(spec.in_its_types(), choose_device("cpu"))
    # A static file holds a batch of 1. Bytes are a quarter of the copy, converted on the device.
    options = ExportOptions(height=height, width=width, dynamic=batch > 1, uint8_input=True)
    export_onnx(model, path, options)


def build_engine(spec: Spec, shape: Shape, path: Path, builder: str = "tensorrt") -> None:
    """Export the model of `spec` for images of `shape` and build its engine by `builder`.

    It is not verified: whoever times it compares what it gives. One of TensorRT for RTX and of one
    size is for the GPU of this machine, where there is one.
    """
    here = builder == RTX.name and shape[0] == 1 and gpu.unavailable() is None
    options = BuildOptions(tf32=spec.tf32, compute_capabilities=(THIS_GPU,) if here else ())
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder) / f"{path.stem}.onnx"
        build_onnx(spec, shape, onnx_path)
        request = Request(
            onnx_path,
            path,
            options,
            builder=builder,
            shapes=((*shape, 3),) * 3 if -1 in read_source(onnx_path).shape else (None,) * 3,
            verify=False,
            judged_by=JUDGE,
        )
        convert(request)


def build_package(spec: Spec, shape: Shape, path: Path) -> None:
    """Compile the model of `spec` for images of `shape` into the AOTInductor package `path`."""
    device = choose_device(spec.device)
    model = NamedOutputs(load_model(spec, device))
    # As `to_device` makes them: a package takes its input's strides for granted.
    images = to_tensor(torch.zeros(*shape, 3, dtype=torch.uint8, device=device))
    with torch.no_grad(), plain_float32(), whole_file(path) as partial:
        program = torch.export.export(model, (images,))
        # The package does not check its input's shape; the extractor does, by what is noted here.
        noted = {
            "shape": ",".join(map(str, images.shape)),
            "device": device.type,
            "model": spec.model,
            "selection": str(spec.selection),
            "precision": spec.precision,
        }
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(partial),
            inductor_configs={"aot_inductor.metadata": noted},
        )


def build_lightglue_file(
    spec: Spec, graph: str, size: tuple[int, int], matcher_weights: Path | None, path: Path
) -> None:
    """Export LightGlue alone ("matcher") or behind the model ("pair") to `path`, ONNX or engine.

    For `spec.top_k` keypoints and images of `size`, (width, height). A path that ends in .rtx is an
    engine of TensorRT for RTX, .trt of TensorRT; neither is verified, as in `build_engine`.
    """
    own = spec.in_its_types()
    matcher = LightGlue.from_pretrained(matcher_weights, precision=own.precision)

    def export(onnx_path: Path) -> None:
        if graph == "matcher":
            export_matcher(matcher, onnx_path, MatcherOptions(spec.top_k))
        else:
            model, options = load_model(own, choose_device("cpu")), PairOptions(size, size)
            export_pair(model, matcher, onnx_path, replace(options, uint8_input=True))

    if path.suffix == ".onnx":
        return export(path)
    with tempfile.TemporaryDirectory() as folder:
        onnx_path = Path(folder) / f"{path.stem}.onnx"
        export(onnx_path)
        library = RTX if path.suffix == ".rtx" else TENSORRT
        build_lightglue(onnx_path, path, library, BuildOptions(tf32=spec.tf32), JUDGE)


BUILDERS: dict[str, Callable[[Spec, Shape, Path], None]] = {
    ".onnx": build_onnx,
    ".trt": build_engine,
    ".rtx": functools.partial(build_engine, builder="tensorrt-rtx"),
    ".pt2": build_package,
}


def build_model_file(spec: Spec, shape: Shape, path: Path) -> None:
    """Make the file `path`, of the kind that its suffix says, for images of `shape`."""
    BUILDERS[path.suffix](spec, shape, path)
