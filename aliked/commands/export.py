"""Stage 1: export ALIKED to ONNX and prove on real images that the file is still the model."""

import argparse
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from aliked.backends.onnxruntime import CPU, deform_conv_missing, provider_missing
from aliked.cli import Parser, command_line, whole
from aliked.configs import Form
from aliked.doctor import installed_versions
from aliked.download import offer_download
from aliked.errors import InputError
from aliked.export.onnx_export import CONTRACTS, ExportOptions, export_onnx
from aliked.export.verify import verify_onnx
from aliked.files import check_outputs, scratch_file, sha256, writable_folder, write_json
from aliked.images import list_images, load_image, require_same_size
from aliked.model import ALIKED, DTYPES
from aliked.options import add_model_options, add_selection_options, check_selection
from aliked.parity import Verdict
from aliked.sampling import SAMPLERS
from aliked.weights import describe_weights, find_weights

# What decides the content of the file and the verdict.
PACKAGES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        description=__doc__,
        epilog="In threshold mode (--top_k 0) the file has --n_limit rows per image in descending "
        "order; those below the threshold have score 0, and its output nms_scores can be cut "
        "higher.",
    )
    p.add_argument(
        "images", type=Path, metavar="FOLDER", help="images: give the input size and the check"
    )
    p.add_argument(
        "--model_output",
        type=Path,
        metavar="FILE",
        help="file to write (default: converted_model/MODEL-topK-PRECISION-FOLDER.onnx)",
    )
    p.add_argument(
        "--num_images",
        type=whole(1),
        default=10,
        metavar="N",
        help="check on the first N images of the folder (default: %(default)s)",
    )
    p.add_argument("--verbose", action="store_true", help="the exporter's log, operators, shapes")
    model = p.add_argument_group("model")
    add_model_options(model)
    add_selection_options(model)
    add_graph_options(p.add_argument_group("graph"))
    return p


def add_graph_options(group: argparse._ArgumentGroup) -> None:
    """How the model is written."""
    group.add_argument(
        "--opset_version",
        type=int,
        default=19,
        metavar="N",
        help="17, 18 or 19; TensorRT misreads GridSample of 20 and later (default: %(default)s)",
    )
    group.add_argument(
        "--precision",
        choices=tuple(DTYPES),
        help="of convolutions, products and feature maps (default: fp32)",
    )
    group.add_argument("--amp", action="store_true", help="the same as --precision fp16")
    group.add_argument("--dynamic", action="store_true", help="batch, height and width symbolic")
    group.add_argument("--uint8_input", action="store_true", help="input uint8 [B, H, W, 3] RGB")
    group.add_argument(
        "--io",
        choices=("default", *CONTRACTS),
        default="default",
        help="inputs and outputs: this project's, or those that COLMAP's ALIKED extractor or "
        "cv2.ALIKED of OpenCV 5 loads (default: %(default)s)",
    )
    add_operator_options(group)


def add_operator_options(group: argparse._ArgumentGroup) -> None:
    """Which ONNX operators express deformable convolution and bilinear sampling."""
    group.add_argument(
        "--deform_conv",
        choices=("native", "gridsample", "gather"),
        help="gridsample, gather: standard operators, which every TensorRT builds; native: "
        "DeformConv of opset 19, which TensorRT runs by a plugin that needs cuBLAS and TensorRT "
        "for RTX and ONNX Runtime before 1.25 lack (default: gridsample)",
    )
    group.add_argument(
        "--sampling",
        choices=tuple(SAMPLERS),
        help="of scores and features: GridSample, or look-ups and arithmetic for runtimes that "
        "lack it or run it wrongly (default: gridsample)",
    )
    group.add_argument(
        "--portable",
        action="store_true",
        help="no DeformConv and no GridSample: --deform_conv gather --sampling gather",
    )


def export_options(args: argparse.Namespace, height: int, width: int) -> ExportOptions:
    """The command line as `ExportOptions`."""
    return ExportOptions(
        height=height,
        width=width,
        opset=args.opset_version,
        deform_conv=args.deform_conv,
        dynamic=args.dynamic,
        uint8_input=args.uint8_input,
        io=args.io,
    )


def output_path(args: argparse.Namespace) -> Path:
    """Where the file goes, after making sure that it can."""
    rows = f"top{args.top_k}" if args.top_k > 0 else f"th{args.scores_th}"
    name = f"{args.model}-{rows}-{args.precision}-{args.images.resolve().name}.onnx"
    path = args.model_output or Path("converted_model") / name
    return checked_output(path)


def checked_output(path: Path) -> Path:
    """`path`, after making sure that an .onnx file and its manifest can be written there."""
    if path.suffix != ".onnx":
        raise InputError(f"--model_output {path} is not the name of an .onnx file; give one")
    suffixes = ("", ".json", ".rejected", ".rejected.json")
    check_outputs((Path(f"{path}{suffix}") for suffix in suffixes), "--model_output")
    writable_folder(path.parent)
    return path


def load_models(args: argparse.Namespace) -> tuple[ALIKED, ALIKED]:
    """The model to export and the float32 reference to judge it by."""
    selection = (args.model, args.top_k, args.scores_th, args.n_limit, args.weights)
    model = ALIKED.from_pretrained(*selection, precision=args.precision)
    model.form = Form(args.sampling)
    return model, ALIKED.from_pretrained(*selection)


def print_graph(proto: onnx.ModelProto) -> None:
    """The operators and the inputs and outputs of what was written."""
    counts = Counter(node.op_type for node in proto.graph.node)
    print("operators:", ", ".join(f"{name} {n}" for name, n in counts.most_common()))
    for tensor in (*proto.graph.input, *proto.graph.output):
        dims = [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
        print(f"  {tensor.name} {dims}")


def resolve(args: argparse.Namespace) -> None:
    """Settle the options that stand for others, and refuse what cannot be exported here."""
    missing = provider_missing(CPU)
    if missing:
        raise InputError(f"ONNX Runtime checks what is exported, but {missing}")
    args.scores_th = check_selection(args.top_k, args.scores_th, args.n_limit)
    settle(args, "precision", "fp32", "amp", "fp16")
    settle(args, "deform_conv", "gridsample", "portable", "gather")
    settle(args, "sampling", "gridsample", "portable", "gather")
    too_old = deform_conv_missing() if args.deform_conv == "native" else None
    if too_old:
        raise InputError(f"{too_old}, or leave out --deform_conv native")


def settle(args: argparse.Namespace, option: str, usual: str, switch: str, meant: str) -> None:
    """Give `option` its value; `InputError` where it contradicts the switch that stands for it."""
    given, switched = getattr(args, option), getattr(args, switch)
    if switched and given not in (None, meant):
        raise InputError(f"--{switch} means --{option} {meant}, not {given}; leave one of them out")
    setattr(args, option, meant if switched else given or usual)


def load_check_images(args: argparse.Namespace) -> list[tuple[str, np.ndarray]]:
    """The images to check on, by name; of one size where the file will be static."""
    offer_download(args.images)
    paths = list_images(args.images)[: args.num_images]
    images = ((path, load_image(path)) for path in paths)
    if not args.dynamic and args.io != "colmap":
        images = require_same_size(images)
    return [(path.name, image) for path, image in images]


def main(args: argparse.Namespace) -> int:
    """Export, check, judge, and only then give the file its name."""
    resolve(args)
    images = load_check_images(args)
    options = export_options(args, *images[0][1].shape[:2])
    path = output_path(args)
    model, reference = load_models(args)
    with scratch_file(path) as candidate:
        proto = export_onnx(model, candidate, options, args.verbose)
        print(
            f"exported {args.model} ({describe_weights(args.model, args.weights)}) to ONNX opset "
            f"{options.opset}; ONNX's full check passed"
        )
        if args.verbose:
            print_graph(proto)
        progress = tqdm(images, "PyTorch fp32 and ONNX Runtime", unit="image", disable=None)
        verdict = verify_onnx(candidate, reference, args.precision, options, progress)
        return conclude(candidate, path, verdict, facts_of(args, options))


def facts_of(args: argparse.Namespace, options: ExportOptions) -> dict:
    """What the file is and what it was made from, for its manifest."""
    weights = find_weights(args.model, args.weights)
    return {
        "model": args.model,
        "precision": args.precision,
        "top_k": args.top_k,
        "scores_th": args.scores_th,
        "n_limit": args.n_limit,
        "sampling": args.sampling,
        **asdict(options),
        "images": str(args.images),
        "weights": {"file": weights.name, "sha256": sha256(weights)},
    }


def conclude(candidate: Path, path: Path, verdict: Verdict, facts: dict) -> int:
    """Give a judged file its name, or NAME.rejected, and its manifest; the exit status.

    `facts` are what the manifest says of the file beside its checksum and how it was judged.
    """
    print(verdict.text)
    if not verdict.passed:
        path = path.with_name(f"{path.name}.rejected")
    os.replace(candidate, path)
    judged = {
        "verdict": {"passed": verdict.passed, "text": verdict.text.splitlines()},
        "versions": installed_versions(PACKAGES),
        "command": command_line(),
    }
    manifest = path.with_name(f"{path.name}.json")
    write_json(manifest, {"file": path.name, "sha256": sha256(path)} | facts | judged)
    print(f"{'wrote' if verdict.passed else 'kept the wrong file as'} {path} and {manifest}")
    return 0 if verdict.passed else 1
