"""Stage 2: build a TensorRT engine and prove on real images that it is still the model.

With TensorRT, on the GPU that is to run the engine, or with TensorRT for RTX, which builds on any
machine for every RTX GPU; such an engine is compared later, with --verify, where there is a GPU.
"""

import argparse
from pathlib import Path

from aliked.backends.tensorrt_library import (
    BUILDERS,
    COMPUTE_CAPABILITIES,
    LIBRARIES,
    SEVERITIES,
    Library,
)
from aliked.cli import Parser, is_command, whole
from aliked.errors import InputError
from aliked.export.builder import BuildOptions, Shape, parse_file
from aliked.export.engine import Request, convert, verify
from aliked.export.onnx_checks import NOT_VALID, check_file
from aliked.export.onnx_graph import Target


def shape(text: str) -> Shape:
    """A shape such as 1x3x480x640."""
    return tuple(map(whole(1), text.split("x")))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        description=__doc__,
        epilog="Exit status: 0 done, 1 findings or a wrong engine, 2 bad input.",
    )
    add_task_options(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument(
        "--model_trt_path",
        type=Path,
        help="engine to write (default: the ONNX path, ending in .trt or, by TensorRT for RTX, "
        ".rtx)",
    )
    parser.add_argument(
        "--builder",
        choices=BUILDERS,
        help="default: TensorRT where it is installed and finds a GPU, else TensorRT for RTX",
    )
    parser.add_argument(
        "--precision_mode",
        choices=["FP32", "FP16"],
        help="must be the file's own, except that TensorRT 10 can choose FP16 for an FP32 file "
        "(default: the file's own)",
    )
    build = parser.add_argument_group("build")
    add_build_options(build)
    add_engine_options(build)
    add_verification_options(parser.add_argument_group("verification against PyTorch in float32"))
    return parser


def add_task_options(task: argparse._ActionsContainer) -> None:
    """What to do: build, check a file or compare an engine."""
    task.add_argument(
        "--model_onnx_path", type=Path, help="file of convert_pytorch_to_onnx.py to build from"
    )
    task.add_argument(
        "--check_only",
        type=Path,
        metavar="MODEL",
        help="only say what TensorRT would refuse or misread in this ONNX file: what is known of "
        "it, and what the parsers of the installed libraries say",
    )
    task.add_argument(
        "--verify",
        type=Path,
        metavar="ENGINE",
        help="compare an engine that exists, such as one built without a GPU",
    )


def add_build_options(group: argparse._ArgumentGroup) -> None:
    """For which GPUs and inputs the builder searches, and how long."""
    group.add_argument(
        "--compute_capability",
        nargs="+",
        choices=COMPUTE_CAPABILITIES,
        default=[],
        metavar="SM",
        help="GPUs of an engine by TensorRT for RTX, of "
        f"{', '.join(COMPUTE_CAPABILITIES)}; CURRENT, the GPU of this machine, only on its own "
        "(default: Ampere and later; Turing, SM75, has to be named)",
    )
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
        type=whole(1),
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


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """What the engine can do and takes, and what is told of it."""
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
        type=whole(0),
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


def add_verification_options(group: argparse._ArgumentGroup) -> None:
    """How the engine is judged."""
    group.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="photographs to compare on (default: those of the export, by its manifest)",
    )
    group.add_argument(
        "--num_images",
        type=whole(1),
        default=10,
        metavar="N",
        help="how many of the folder to compare on (default: %(default)s)",
    )
    group.add_argument(
        "--weights", type=Path, help="the PyTorch model's weights (default: looked up)"
    )
    group.add_argument(
        "--memory",
        choices=["torch", "pycuda"],
        default="torch",
        help="who gives the engine device memory (default: %(default)s)",
    )
    group.add_argument(
        "--no_verify", action="store_true", help="keep the engine without comparing it"
    )


def check(path: Path, args: argparse.Namespace) -> int:
    """Print what a library would misread or refuse, and what its parser says; 1 if it is refused.

    A parser that is not installed, or that needs a GPU where there is none, is not asked.
    """
    libraries = [LIBRARIES[name] for name in ([args.builder] if args.builder else BUILDERS)]
    batch = args.max_shape[0] if args.max_shape else None
    findings = check_file(path, Target(libraries[0].title, args.version_compatible, batch))
    for finding in findings:
        print(finding)
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{path}: {errors} errors, {len(findings) - errors} warnings")
    if any(finding.node == NOT_VALID for finding in findings):
        return 1  # some parsers end the process over such a file
    verdicts = [parser_verdict(library, path) for library in libraries]
    return 1 if errors or not all(verdicts) else 0


def parser_verdict(library: Library, path: Path) -> bool:
    """Print what the parser of `library` says of a file; whether it did not refuse it."""
    reason = library.cannot_build()
    if reason:
        print(f"the parser of {library} was not asked: {reason}")
        return True
    try:
        parse_file(library, path, BuildOptions())
    except InputError as refusal:
        print(refusal)
        return False
    print(f"the parser of {library} {library.version} takes it")
    return True


def refuse_ignored(args: argparse.Namespace, task: str, used: set[str]) -> None:
    """`InputError` for an option, other than those `used`, that `task` would do nothing with."""
    default = parser().get_default
    given = {name for name, value in vars(args).items() if value != default(name)}
    ignored = given - used - {task}
    if ignored:
        raise InputError(f"--{task} does not use --{min(ignored)}; leave it out")


def build_options(args: argparse.Namespace) -> BuildOptions:
    """The command line's part of what the builder is told."""
    return BuildOptions(
        compute_capabilities=tuple(dict.fromkeys(args.compute_capability)),
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
    """Check the file, or compare an engine, or build, compare and keep one."""
    if args.check_only:
        refuse_ignored(args, "check_only", {"builder", "version_compatible", "max_shape"})
        return check(args.check_only, args)
    if args.verify:
        refuse_ignored(args, "verify", {"images", "num_images", "weights", "memory"})
        judged = verify(args.verify, args.images, args.num_images, args.weights, args.memory)
        return 0 if judged else 1
    request = Request(
        onnx_path=args.model_onnx_path,
        engine_path=args.model_trt_path,
        options=build_options(args),
        builder=args.builder,
        precision=args.precision_mode,
        shapes=(args.min_shape, args.opt_shape, args.max_shape),
        verify=not args.no_verify,
        images=args.images,
        num_images=args.num_images,
        weights=args.weights,
        memory=args.memory,
        script="aliked build" if is_command() else Request.script,
    )
    return 0 if convert(request) else 1
