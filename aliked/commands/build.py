"""Stage 2: build a TensorRT engine and prove on real images that it is still the model."""

import argparse
from pathlib import Path

from aliked.backends.tensorrt import SEVERITIES
from aliked.export.builder import BuildOptions, Shape
from aliked.export.onnx_checks import Target, check_file


def shape(text: str) -> Shape:
    """A shape such as 1x3x480x640."""
    sizes = tuple(int(size) for size in text.split("x"))
    if min(sizes) < 1:
        raise ValueError(text)
    return sizes


def positive(text: str) -> int:
    """A whole number above zero."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status: 0 done, 1 findings or a wrong engine, 2 bad input.",
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--model_onnx_path", type=Path, help="file of convert_pytorch_to_onnx.py to build from"
    )
    task.add_argument(
        "--check_only",
        type=Path,
        metavar="MODEL",
        help="only say what TensorRT would refuse or misread in this ONNX file; needs no TensorRT",
    )
    parser.add_argument(
        "--model_trt_path", type=Path, help="engine to write (default: the ONNX path with .trt)"
    )
    parser.add_argument(
        "--precision_mode",
        choices=["FP32", "FP16"],
        help="must be the file's own, except that TensorRT 10 can choose FP16 for an FP32 file "
        "(default: the file's own)",
    )
    add_build_options(parser)
    add_verification_options(parser)
    return parser


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """What TensorRT is told."""
    group = parser.add_argument_group("build")
    group.add_argument(
        "--optimization_level",
        type=int,
        choices=range(6),
        default=3,
        help="0 takes the first kernel that works and ignores the timing cache, 5 compares all "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max_workspace_size",
        type=positive,
        metavar="MiB",
        help="device memory that one layer may use as scratch space (default: no limit)",
    )
    group.add_argument(
        "--timing_cache", type=Path, metavar="FILE", help="kernel timings to reuse and extend"
    )
    for name, text in (("min", "smallest"), ("opt", "usual"), ("max", "largest")):
        group.add_argument(
            f"--{name}_shape",
            type=shape,
            metavar="BxCxHxW",
            help=f"{text} input of a dynamic file, such as 1x3x480x640 (BxHxWx3 for uint8 input)",
        )
    group.add_argument(
        "--version_compatible",
        action="store_true",
        help="engine for newer TensorRT versions and the lean runtime too; not with DeformConv",
    )
    group.add_argument(
        "--hardware_compatible",
        action="store_true",
        help="engine for every GPU from Ampere on, slower",
    )
    group.add_argument(
        "--no_tf32", action="store_true", help="full float32 products, held to float32's tolerance"
    )
    group.add_argument(
        "--max_aux_streams",
        type=int,
        metavar="N",
        help="streams beside the main one; 0 takes less memory (default: TensorRT's choice)",
    )
    group.add_argument(
        "--builder_log",
        choices=SEVERITIES,
        default="warning",
        help="least severe message shown (default: %(default)s)",
    )
    group.add_argument(
        "--inspect",
        action="store_true",
        help="write the engine's layers beside it, as .layers.json and .layers.txt",
    )


def add_verification_options(parser: argparse.ArgumentParser) -> None:
    """How the engine is judged."""
    group = parser.add_argument_group("verification against PyTorch in float32")
    group.add_argument("--images", type=Path, metavar="FOLDER", help="photographs to compare on")
    group.add_argument(
        "--num_images",
        type=positive,
        default=10,
        metavar="N",
        help="how many of the folder to compare on (default: %(default)s)",
    )
    group.add_argument("--weights", type=Path, help="of the PyTorch model (default: looked up)")
    group.add_argument(
        "--memory",
        choices=["torch", "pycuda"],
        default="torch",
        help="who gives the engine device memory (default: %(default)s)",
    )
    group.add_argument(
        "--no_verify", action="store_true", help="keep the engine without comparing it"
    )


def check(path: Path, target: Target) -> int:
    """Print what TensorRT would refuse or misread; status 1 where there are errors."""
    findings = check_file(path, target)
    for finding in findings:
        print(finding)
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{path}: {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0


def build_options(args: argparse.Namespace) -> BuildOptions:
    """The command line's part of what TensorRT is told."""
    return BuildOptions(
        optimization_level=args.optimization_level,
        max_workspace_size_mib=args.max_workspace_size,
        timing_cache=args.timing_cache,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        tf32=not args.no_tf32,
        max_aux_streams=args.max_aux_streams,
        detailed=args.inspect,
        log_level=args.builder_log,
    )


def main(args: argparse.Namespace) -> int:
    """Check the file; then build, verify and keep the engine."""
    if args.check_only:
        max_batch = args.max_shape[0] if args.max_shape else None
        return check(args.check_only, Target(args.version_compatible, max_batch))
    from aliked.export.engine import Request, convert

    request = Request(
        onnx_path=args.model_onnx_path,
        engine_path=args.model_trt_path or args.model_onnx_path.with_suffix(".trt"),
        options=build_options(args),
        precision=args.precision_mode,
        shapes=(args.min_shape, args.opt_shape, args.max_shape),
        verify=not args.no_verify,
        images=args.images,
        num_images=args.num_images,
        weights=args.weights,
        memory=args.memory,
    )
    return 0 if convert(request) else 1
