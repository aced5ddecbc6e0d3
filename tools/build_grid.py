"""Export the whole grid of graphs and build each with the installed TensorRT; a JSON line each.

    python -m tools.build_grid --output results/engines/builds.jsonl

Parser and builder of TensorRT for RTX need no GPU, so this says what builds, not how fast it runs.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

from aliked.configs import OFFICIAL
from aliked.export.builder import set_compute_capabilities
from aliked.export.onnx_export import OPSETS, ExportOptions, export_onnx
from aliked.model import ALIKED

LIBRARIES = ("tensorrt", "tensorrt_rtx")
# Batch, height and width of a dynamic engine: least, most usual, largest.
PROFILE = ((1, 96, 128), (1, 480, 640), (4, 512, 1248))


def library() -> ModuleType | None:
    """The installed TensorRT, else TensorRT for RTX, else None."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    return None


def make_logger(trt: ModuleType):
    """A logger of the library that keeps the error messages in `errors`."""

    class Logger(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    return Logger()


def add_profile(trt: ModuleType, builder, network, config) -> None:
    """Give a network of symbolic sizes the bounds of `PROFILE`."""
    image = network.get_input(0)
    if -1 not in tuple(image.shape):
        return
    channels_last = image.shape[-1] == 3
    shapes = [(b, h, w, 3) if channels_last else (b, 3, h, w) for b, h, w in PROFILE]
    profile = builder.create_optimization_profile()
    profile.set_shape(image.name, *shapes)
    config.add_optimization_profile(profile)


def build(path: Path, capabilities: tuple[str, ...] = ()) -> dict:
    """Parse and build one file; returns the outcome, the seconds and the MiB of the engine.

    `capabilities` are the GPUs to build for by TensorRT for RTX; (): its default.
    """
    trt = library()
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    outcome = {"library": trt.__name__, "version": trt.__version__, "built": False, "reason": None}
    if not parser.parse(path.read_bytes()):
        return outcome | {"reason": f"parse: {parser.get_error(0).desc()}"}
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if capabilities:
        set_compute_capabilities(trt, config, capabilities)
    add_profile(trt, builder, network, config)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    outcome["seconds"] = round(time.perf_counter() - start, 1)
    if engine is None:
        return outcome | {"reason": f"build: {(logger.errors or ['no message'])[0][:500]}"}
    return outcome | {"built": True, "mib": round(engine.nbytes / 2**20, 1)}


def grid(names: list[str]):
    """Every model, selection, precision, form of sizes, input type and opset, one after another."""
    return itertools.product(
        names, ("top_k", "threshold"), ("fp32", "fp16"), (False, True), (False, True), OPSETS
    )


def run_one(row: tuple, folder: Path, height: int, width: int) -> dict:
    """Export one combination with random weights, which build as trained ones do, and build it."""
    name, mode, precision, dynamic, uint8_input, opset = row
    facts = dict(
        zip(("model", "mode", "precision", "dynamic", "uint8_input", "opset"), row, strict=True)
    )
    torch.manual_seed(0)
    selection = {"top_k": 1000} if mode == "top_k" else {"scores_th": 0.2, "n_limit": 1000}
    model = ALIKED(name, **selection).eval().fold_batch_norm().set_precision(precision)
    path = folder / "model.onnx"
    options = ExportOptions(
        height, width, opset, "gridsample", dynamic=dynamic, uint8_input=uint8_input
    )
    export_onnx(model, path, options)
    return facts | build(path)


def main() -> None:
    """Build the grid and append to the output as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(OFFICIAL), choices=OFFICIAL)
    parser.add_argument("--output", type=Path, default=Path("results/engines/builds.jsonl"))
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=640)
    args = parser.parse_args()
    if library() is None:
        raise SystemExit(f"none of {', '.join(LIBRARIES)} is installed; pip install tensorrt_rtx")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.output.open("a") as output:
        for row in grid(args.models):
            outcome = run_one(row, Path(folder), args.height, args.width)
            print(*row, "built" if outcome["built"] else outcome["reason"], flush=True)
            output.write(json.dumps(outcome) + "\n")
            output.flush()


if __name__ == "__main__":
    main()
