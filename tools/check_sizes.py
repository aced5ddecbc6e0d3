"""Run one dynamic engine at several sizes and batches beside PyTorch in float32; a JSON line each.

    python -m tools.check_sizes assets/sequence_640x480 assets/sequence_1241x376 \
        --output results/tensorrt/h200-sizes.jsonl

Needs a GPU. Of sizes that no folder has, parts of the first folder's images are taken. Lines of
FP16 also say whether PyTorch's own half precision passes: where K is about as many as an image has
maxima, it does not always.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from aliked import cli, gpu
from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.backends.tensorrt import TensorRTExtractor
from aliked.backends.tensorrt_library import BUILDERS
from aliked.configs import OFFICIAL, PRECISIONS
from aliked.export.build import build_onnx
from aliked.export.builder import BuildOptions
from aliked.export.engine import Request, convert
from aliked.features import Features
from aliked.images import list_images, load_image
from aliked.parity import compare_features
from aliked.ties import Expected
from benchmark.environment import git_commit
from benchmark.subjects import judged_features

SIZES = ((640, 480), (1241, 376), (333, 251), (97, 65))  # width, height
BATCHES = (1, 4)
# Batch, height and width of the engine's input: least, most usual, largest.
PROFILE = ((1, 65, 97), (1, 480, 640), (4, 480, 1248))


def build(spec: Spec, builder: str, path: Path) -> None:
    """Export the model of `spec` with symbolic sizes and build its engine."""
    onnx_path = path.with_suffix(".onnx")
    build_onnx(spec, PROFILE[2], onnx_path)
    options = BuildOptions(tf32=spec.tf32)
    shapes = tuple((*sizes, 3) for sizes in PROFILE)
    judged_by = "python -m tools.check_sizes"
    convert(
        Request(onnx_path, path, options, builder, shapes=shapes, verify=False, judged_by=judged_by)
    )


def images_of(folders: list[Path], width: int, height: int) -> np.ndarray:
    """Four images of a size, uint8 [4, H, W, 3]: whole ones where a folder has them, or parts."""
    found = [[load_image(path) for path in list_images(folder)[:4]] for folder in folders]
    whole = [images for images in found if images[0].shape[:2] == (height, width)]
    return np.stack([image[:height, :width] for image in (whole or found)[0]])


def outcome(expected: list[Expected], found: list[Features], precision: str) -> dict:
    """The verdict on the features of several images, and its figures."""
    pairs = {
        str(i): compare_features(e.features, f, ties=e.ties)
        for i, (e, f) in enumerate(zip(expected, found, strict=True))
    }
    return judged_features(pairs, precision)


def check(
    engine: TensorRTExtractor, reference: PyTorchExtractor, spec: Spec, folders: list[Path]
) -> Iterator[dict]:
    """Compare at every size, in every batch; yields the figures and the verdict of each."""
    half = PyTorchExtractor(spec) if spec.precision == "fp16" else None
    for width, height in SIZES:
        images = images_of(folders, width, height)
        expected = [reference.expect(image) for image in images]
        beside = {}
        if half:
            own = outcome(expected, half.extract_batch(images), spec.precision)
            beside["pytorch"] = {key: own[key] for key in ("passed", "reasons")}
        for batch in BATCHES:
            parts = np.split(images, len(images) // batch)
            found = [features for part in parts for features in engine.extract_batch(part)]
            size = {"width": width, "height": height, "batch": batch}
            yield size | outcome(expected, found, spec.precision) | beside


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(prog="python -m tools.check_sizes", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of images")
    parser.add_argument("--models", nargs="+", default=["aliked-t16"], choices=OFFICIAL)
    parser.add_argument("--precision", default="fp16", choices=PRECISIONS)
    parser.add_argument("--builder", choices=BUILDERS, default="tensorrt-rtx")
    parser.add_argument("--cuda_graph", action="store_true", help="record each size as one")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="to append to")
    return parser


def main(args: argparse.Namespace) -> int:
    """Build and check an engine of every model; 1 where one is outside tolerance."""
    wrong = 0
    args.output.parent.mkdir(parents=True, exist_ok=True)
    card = gpu.devices()[0].name
    with tempfile.TemporaryDirectory() as folder, args.output.open("a") as output:
        for model in args.models:
            spec, path = Spec(model, top_k=1000), Path(folder) / f"{model}.engine"
            own = replace(spec, precision=args.precision)
            build(own, args.builder, path)
            engine = TensorRTExtractor(path, cuda_graph=args.cuda_graph)
            builder = engine.engine.library
            library = {"library": builder.name, "version": builder.version}
            row = {"model": model, "precision": args.precision, "cuda_graph": args.cuda_graph}
            for found in check(engine, PyTorchExtractor(spec), own, args.folders):
                line = row | found | library | {"gpu": card, "commit": git_commit()}
                wrong += not found["passed"]
                print(json.dumps(row | found), flush=True)
                output.write(json.dumps(line) + "\n")
                output.flush()
    return int(wrong > 0)


if __name__ == "__main__":
    cli.run(main, parser())
