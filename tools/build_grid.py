"""Export the whole grid of graphs and build each with the installed TensorRT; a JSON line each.

    python -m tools.build_grid --output results/tensorrt/builds.jsonl

TensorRT for RTX builds without a GPU, so this says what builds, not how fast it runs. Weights are
random, which build as trained ones do.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from aliked import cli
from aliked.backends.tensorrt_library import COMPUTE_CAPABILITIES
from aliked.configs import OFFICIAL
from aliked.errors import InputError
from aliked.export.builder import BuildOptions, Shape, build_plan
from aliked.export.engine import choose_library
from aliked.export.onnx_export import OPSETS, ExportOptions, export_onnx
from aliked.model import ALIKED
from benchmark.environment import git_commit

# Batch, height and width of a dynamic engine: least, most usual, largest.
PROFILE = ((1, 96, 128), (1, 480, 640), (4, 512, 1248))
# How each mode selects keypoints.
MODES = {
    "top_k": {"top_k": 1000},
    "threshold": {"top_k": 0, "scores_th": 0.2, "n_limit": 1000},
}
AXES = {
    "precision": ("fp32", "fp16"),
    "dynamic": (False, True),
    "uint8_input": (False, True),
    "opset": OPSETS,
}


def grid(models: list[str], modes: list[str]) -> Iterator[dict]:
    """Every model, selection, precision, form of sizes, input type and opset, one after another."""
    for values in itertools.product(models, modes, *AXES.values()):
        yield dict(zip(("model", "mode", *AXES), values, strict=True))


def export(row: dict, path: Path, height: int, width: int) -> None:
    """Write the file of one combination."""
    torch.manual_seed(0)
    model = ALIKED(row["model"], **MODES[row["mode"]]).eval().fold_batch_norm()
    forms = {name: row[name] for name in ("opset", "dynamic", "uint8_input")}
    export_onnx(model.set_precision(row["precision"]), path, ExportOptions(height, width, **forms))


def shapes(row: dict) -> tuple[Shape, ...] | None:
    """The profile of a file of symbolic sizes."""
    if not row["dynamic"]:
        return None
    return tuple((b, h, w, 3) if row["uint8_input"] else (b, 3, h, w) for b, h, w in PROFILE)


def build(path: Path, options: BuildOptions) -> dict:
    """Build one file by the library that `convert_onnx_to_trt.py` takes; what came of it."""
    library, _ = choose_library(None)
    facts = {
        "library": library.name,
        "version": library.version,
        "compute_capabilities": list(options.compute_capabilities),
    }
    start = time.perf_counter()
    try:
        plan = build_plan(library, path, options)
    except InputError as refusal:
        return facts | {"built": False, "reason": str(refusal).replace(str(path), path.name)}
    seconds = round(time.perf_counter() - start, 1)
    return facts | {"built": True, "seconds": seconds, "mib": round(len(plan) / 2**20, 1)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="python -m tools.build_grid", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(OFFICIAL), choices=OFFICIAL)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="to append to")
    parser.add_argument("--height", type=int, default=480, help="of the images, pixels")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument(
        "--compute_capability",
        nargs="+",
        choices=COMPUTE_CAPABILITIES,
        default=[],
        help="GPUs of an engine by TensorRT for RTX (default: Ampere and later)",
    )
    return parser


def main(args: argparse.Namespace) -> int:
    """Build the grid, a line of the output each as it goes; 1 where one was refused."""
    refused, common = 0, {"height": args.height, "width": args.width, "commit": git_commit()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, args.output.open("a") as output:
        path = Path(folder) / "model.onnx"
        for row in grid(args.models, args.modes):
            export(row, path, args.height, args.width)
            options = BuildOptions(tuple(args.compute_capability), shapes=shapes(row))
            outcome = row | common | build(path, options)
            refused += not outcome["built"]
            print(*row.values(), outcome.get("reason", "built"), flush=True)
            output.write(json.dumps(outcome) + "\n")
            output.flush()
    return int(refused > 0)


if __name__ == "__main__":
    cli.run(main, parser())
