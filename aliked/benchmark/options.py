"""The timing script's options, and what they mean together."""

import argparse
from pathlib import Path

from aliked.backends import BACKENDS, Spec, load_backend
from aliked.benchmark.rows import Grid
from aliked.benchmark.timing import Limits
from aliked.configs import CONFIGS, get_config
from aliked.errors import InputError
from aliked.options import add_device_option, add_weights_option, check_selection

EVERY_BACKEND = [name for name in BACKENDS if name != "onnxruntime"]  # which chooses among others


def add_grid_options(group: argparse._ArgumentGroup) -> None:
    """Backends, models, K, precisions, batches, the device."""
    group.add_argument(
        "--backends",
        "--backend",
        nargs="+",
        default=["pytorch", "onnxruntime"],
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)}; all (default: pytorch onnxruntime)",
    )
    group.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[Spec.model],
        metavar="NAME",
        help=f"of {', '.join(CONFIGS)}; all (default: {Spec.model})",
    )
    group.add_argument(
        "--top_k",
        type=int,
        nargs="+",
        default=[Spec.top_k],
        metavar="K",
        help="keypoints per image, the best by score; 0: all above --scores_th "
        f"(default: {Spec.top_k})",
    )
    group.add_argument(
        "--scores_th", type=float, metavar="SCORE", help="with --top_k 0: lowest score, 0 to 1"
    )
    group.add_argument(
        "--n_limit",
        type=int,
        default=Spec.n_limit,
        metavar="N",
        help="with --top_k 0: at most so many keypoints per image (default: %(default)s)",
    )
    group.add_argument(
        "--precisions",
        "--precision",
        nargs="+",
        choices=("fp32", "fp16"),
        default=["fp32"],
        help="of the model (default: fp32)",
    )
    group.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="B", help="images per run (default: 1)"
    )
    add_device_option(group)
    group.add_argument(
        "--compile_mode",
        default=Spec.compile_mode,
        metavar="MODE",
        help="of torch.compile, for backend pytorch-compile (default: %(default)s: CUDA graphs)",
    )


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Weights, model file, output."""
    add_weights_option(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of this kind (default: made when needed)",
    )
    group.add_argument(
        "--compiler_cache",
        type=Path,
        metavar="DIR",
        help="keep what Inductor and Triton compile, so that start times are those of a second "
        "start (default: an empty cache for every row)",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="records, a line per row; tables and plots go into a folder of the same name "
        "(default: output/timings-DATE-TIME.jsonl)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the rows that --output lacks; refused if it is of other settings",
    )


def add_limit_options(group: argparse._ArgumentGroup) -> None:
    """Runs and seconds."""
    limits = Limits()
    group.add_argument(
        "--repeats",
        type=int,
        default=limits.repeats,
        metavar="N",
        help="timed runs per clock and row (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=limits.warmup,
        metavar="N",
        help="most warm-up runs; they end when run times have settled (default: %(default)s)",
    )
    group.add_argument(
        "--max_seconds",
        type=float,
        default=limits.max_seconds,
        metavar="S",
        help="seconds per clock and row after which fewer timed runs have to do, but at least 10 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--processes",
        type=int,
        default=limits.processes,
        metavar="N",
        help="processes that measure a row, one after another, each to these limits: more than 1 "
        "show what differs from process to process (default: %(default)s)",
    )
    group.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="references, model files and, with --compiler_cache, kernels to make at a time, "
        "before anything is timed; more than 1 makes build times longer, and TensorRT choose worse "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of the order of the rows (default: %(default)s)"
    )


def grid_from(args: argparse.Namespace) -> Grid:
    """What to measure; `InputError` where it cannot be."""
    backends = EVERY_BACKEND if "all" in args.backends else args.backends
    models = list(CONFIGS) if "all" in args.models else args.models
    for model in models:
        get_config(model)
    modules = [load_backend(name) for name in backends]
    file = args.model_path
    if file and all(getattr(module, "SUFFIX", None) != file.suffix for module in modules):
        raise InputError(
            f"none of the backends {', '.join(backends)} runs {file}; choose one that does"
        )
    check_selection(min(args.top_k), args.scores_th)
    if min(*args.batch, args.jobs) < 1:
        raise InputError(f"--batch {args.batch} and --jobs {args.jobs}: give at least 1 of each")
    return Grid(
        backends,
        models,
        args.top_k,
        args.precisions,
        args.batch,
        args.scores_th,
        args.n_limit,
        args.compile_mode,
    )


def limits_from(args: argparse.Namespace) -> Limits:
    """Runs and seconds; `InputError` where nothing would be timed."""
    if args.repeats < 2 or args.warmup < 0 or args.max_seconds <= 0 or args.processes < 1:
        raise InputError(
            f"--repeats {args.repeats}, --warmup {args.warmup}, --max_seconds "
            f"{args.max_seconds} and --processes {args.processes} time nothing; give at least 2, "
            "0, more than 0 and 1"
        )
    return Limits(args.repeats, args.warmup, args.max_seconds, args.processes)
