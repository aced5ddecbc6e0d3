#!/usr/bin/env python3
"""Stage 3: time and memory of every runtime, each row in a process of its own.

Every row is measured by two clocks: compute, from device tensors to device tensors, and end to
end, from a uint8 image in host memory to NumPy arrays. Decoding is never included. Each row is
compared with PyTorch in float32 on the same images; one outside tolerance is shown, not ranked.
"""

import argparse
import time
from pathlib import Path

from tqdm import tqdm

from aliked import cli
from aliked.backends import BACKENDS, Spec, get_backend
from aliked.backends.pytorch import COMPILE_MODES
from aliked.cli import cosine, positive, seed, share, whole
from aliked.configs import CONFIGS, PRECISIONS, get_config
from aliked.download import offer_download
from aliked.errors import InputError
from aliked.files import only_writer, real_path, writable_folder
from aliked.matching import LIGHTGLUE_DIM, MATCHERS, check_descriptor_length
from aliked.options import (
    add_device_option,
    add_matcher_weights,
    add_size_option,
    add_weights_option,
    check_selection,
)
from benchmark.artifacts import check_model_file
from benchmark.plots import write_report
from benchmark.records import AnyRecord, load_records, resume
from benchmark.report import footnotes, milliseconds, rows_text, summary_table
from benchmark.rows import Grid, ImageSet, Row, load_image_sets
from benchmark.runner import Run, open_run, run_rows
from benchmark.timing import Limits

EVERY_BACKEND = [name for name in BACKENDS if name != "onnxruntime"]  # which chooses among others


def parser() -> argparse.ArgumentParser:
    """The command line: what demo_pair.py takes, where that takes one of a kind several."""
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "folders",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="folders of images, or images; those of each size are rows of their own",
    )
    # What the positional argument was called once.
    p.add_argument("--images", type=Path, nargs="+", default=[], help=argparse.SUPPRESS)
    add_grid_options(p.add_argument_group("what to measure: every combination is a row"))
    add_matching_options(p.add_argument_group("matching each image with the next"))
    add_file_options(p.add_argument_group("files"))
    add_limit_options(p.add_argument_group("how long"))
    return p


def add_grid_options(group: argparse._ArgumentGroup) -> None:
    """Backends, models, K, precisions, batches, the device."""
    group.add_argument(
        "--backends",
        "--backend",
        nargs="+",
        default=["pytorch", "onnxruntime"],
        metavar="NAME",
        help=f"any of {', '.join(BACKENDS)}, or all (default: pytorch onnxruntime)",
    )
    group.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[Spec.model],
        metavar="NAME",
        help=f"any of {', '.join(CONFIGS)}, or all (default: {Spec.model})",
    )
    group.add_argument(
        "--top_k",
        type=whole(-1),
        nargs="+",
        default=[Spec.top_k],
        metavar="K",
        help="keypoints per image, the best by score; 0: all above --scores_th "
        f"(default: {Spec.top_k})",
    )
    group.add_argument(
        "--scores_th", type=share, metavar="SCORE", help="with --top_k 0: lowest score, 0 to 1"
    )
    group.add_argument(
        "--n_limit",
        type=whole(1),
        default=Spec.n_limit,
        metavar="N",
        help="with --top_k 0: at most this many keypoints per image (default: %(default)s)",
    )
    group.add_argument(
        "--precisions",
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="of the model (default: fp32; of a backend that has no other fp16); tf32 is float32 "
        "that TensorRT multiplies in TF32",
    )
    group.add_argument(
        "--batch",
        type=whole(1),
        nargs="+",
        default=[1],
        metavar="B",
        help="images per run (default: 1)",
    )
    add_device_option(group)
    group.add_argument(
        "--compile_mode",
        default=Spec.compile_mode,
        metavar="MODE",
        help="of torch.compile, in backend pytorch-compile (default: %(default)s: CUDA graphs)",
    )
    add_size_option(group)


def add_matching_options(group: argparse._ArgumentGroup) -> None:
    """What is done with the features of an image and the next."""
    group.add_argument(
        "--min_similarity",
        type=cosine,
        metavar="COSINE",
        help="also count the matches of at least this descriptor similarity, -1 to 1 (default: no "
        "matching)",
    )
    group.add_argument(
        "--matcher",
        choices=MATCHERS,
        help="lightglue: time two images to its matches, and the matcher alone, each image with "
        "the next, instead of extractors (default: mutual, which is not timed)",
    )
    add_matcher_weights(group)
    # Of demo_pair.py, so that its command line is taken here too.
    group.add_argument("--lines", help=argparse.SUPPRESS)


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Weights, model file, output."""
    add_weights_option(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of this kind (default: one made for every "
        "row that needs one)",
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
        metavar="PATH",
        help="FILE.jsonl for the records, a line per row; tables and plots go into a folder of the "
        "same name. Or a folder for all of it (default: output/timings-DATE-TIME.jsonl)",
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
        type=whole(2),
        default=limits.repeats,
        metavar="N",
        help="timed runs per clock and row (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=whole(0),
        default=limits.warmup,
        metavar="N",
        help="most warm-up runs; they end when run times have settled (default: %(default)s)",
    )
    group.add_argument(
        "--max_seconds",
        type=positive,
        default=limits.max_seconds,
        metavar="S",
        help="seconds per clock and row after which fewer timed runs have to do, but at least 10 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--processes",
        type=whole(1),
        default=limits.processes,
        metavar="N",
        help="processes that measure a row, one after another, each to these limits: more than 1 "
        "show what differs from process to process (default: %(default)s)",
    )
    group.add_argument(
        "--jobs",
        type=whole(1),
        default=1,
        metavar="N",
        help="references, model files and, with --compiler_cache, kernels to make at a time, "
        "before anything is timed; more than 1 makes build times longer, and TensorRT choose worse "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=seed, default=0, help="decides the order of the rows (default: %(default)s)"
    )


def grid_from(args: argparse.Namespace) -> Grid:
    """What to measure; `InputError` where it cannot be, or an option would be ignored."""
    backends = EVERY_BACKEND if "all" in args.backends else args.backends
    models = list(CONFIGS) if "all" in args.models else args.models
    for model in models:
        get_config(model)
    check_grid_options(args, backends)
    check_lightglue(args, backends, models)
    if args.matcher == "lightglue":
        backends = [name for name in backends if get_backend(name).lightglue]
    grid = Grid(
        backends,
        models,
        args.top_k,
        args.precisions,
        args.batch,
        Spec.scores_th if args.scores_th is None else args.scores_th,
        args.n_limit,
        args.compile_mode,
        ("pair", "matcher") if args.matcher == "lightglue" else ("extractor",),
    )
    for name in backends if "all" not in args.backends else ():
        if not grid.precisions_of(name):
            raise InputError(
                f"backend {name} has no {' or '.join(args.precisions)}; pass --precision "
                f"{' '.join(get_backend(name).precisions)}, or leave the backend out"
            )
    return grid


def check_grid_options(args: argparse.Namespace, backends: list[str]) -> None:
    """Refuse options that none of the backends, or none of the K, would use."""
    suffixes = [get_backend(name).suffix for name in backends]
    file = args.model_path
    if file and file.suffix not in suffixes:
        raise InputError(
            f"none of the backends {', '.join(backends)} runs {file}; choose one that does"
        )
    by_threshold = [k for k in args.top_k if k <= 0]
    check_selection(min(by_threshold or args.top_k), args.scores_th, args.n_limit)
    if args.compile_mode not in COMPILE_MODES:
        raise InputError(
            f"unknown compile mode {args.compile_mode!r}; choose one of {', '.join(COMPILE_MODES)}"
        )
    if args.compile_mode != Spec.compile_mode and "pytorch-compile" not in backends:
        raise InputError(
            "--compile_mode is for backend pytorch-compile, which is not measured; leave it out"
        )
    if args.compiler_cache and not any(get_backend(name).compiles for name in backends):
        raise InputError(
            f"none of the backends {', '.join(backends)} compiles; leave --compiler_cache out"
        )


def check_lightglue(args: argparse.Namespace, backends: list[str], models: list[str]) -> None:
    """Refuse what LightGlue does not match, and options that its rows would ignore."""
    if args.matcher != "lightglue":
        if args.matcher_weights:
            raise InputError("--matcher_weights are LightGlue's; pass --matcher lightglue as well")
        return
    for model in models:
        check_descriptor_length(get_config(model).dim, LIGHTGLUE_DIM)
    for name in backends if "all" not in args.backends else ():
        if not get_backend(name).lightglue:
            raise InputError(f"backend {name} does not run LightGlue; leave it out")
    refused = {
        "--min_similarity": args.min_similarity is not None,
        "--batch": args.batch != [1],
        "--top_k 0": min(args.top_k) <= 0,
        "--model_path": args.model_path is not None,
    }
    for option, given in refused.items():
        if given:
            raise InputError(
                f"LightGlue is timed one pair at a time, with K keypoints of each image and files "
                f"that are made for it; leave {option} out"
            )


def check_pairs(args: argparse.Namespace, image_sets: list[ImageSet]) -> None:
    """Refuse images without a next one where one is to be matched with the next."""
    counts = [len(images.paths) for images in image_sets]
    if args.min_similarity is not None and max(counts) < 2:
        raise InputError("--min_similarity matches an image with the next; give two of one size")
    if args.matcher == "lightglue" and min(counts) < 2:
        raise InputError("LightGlue matches an image with the next; give two of each size")


def output_from(args: argparse.Namespace) -> tuple[Path, Path]:
    """The file of records and the folder of tables and plots.

    `InputError` where that would overwrite some or cannot be written.
    """
    if args.resume and args.output is None:
        raise InputError("--resume goes on with a file; pass --output as well")
    output = args.output or Path("output") / time.strftime("timings-%Y%m%d-%H%M%S.jsonl")
    if output.is_dir() or not output.suffix:
        path, folder = output / "timings.jsonl", output
    elif output.suffix == ".jsonl":
        path, folder = output, output.with_suffix("")
    else:
        raise InputError(f"--output {output} is not the name of a .jsonl file or folder; give one")
    if path.exists() and not args.resume:
        raise InputError(f"{path} exists; pass --resume to go on with it, or another --output")
    if args.resume and not path.exists():
        raise InputError(f"there is no {path} to go on with; leave --resume out")
    writable_folder(path.parent)
    return path, folder


def announce(run: Run, rows: list[Row], done: set[Row]) -> None:
    """Say what is about to run, and where."""
    if run.device == "cpu":
        print(f"no CUDA device is used: timing on the CPU ({run.machine['cpu']})")
    else:
        print(f"timing on {run.device} ({run.machine['gpu']})")
    for images in run.image_sets:
        print(f"images: {images.name}, {len(images.paths)} of {images.width}x{images.height}")
    print(rows_text(len(rows)) + (f", {len(done)} of them measured already" if done else ""))


def describe(record: AnyRecord) -> str:
    """A row's outcome in a line."""
    if record.row is None:
        return f"{record.runtime}: {record.status}: {record.reason}"
    if not record.measured:
        return f"{record.row}: {record.status}: {record.reason}"
    verdict = "" if record.ranked else " - not ranked"
    return (
        f"{record.row}: compute {milliseconds(record.compute_ms.p50)} ms, end to end "
        f"{milliseconds(record.end_to_end_ms.p50)} ms, {record.compute_ms.runs} runs{verdict}"
    )


def main(args: argparse.Namespace) -> int:
    """Measure every row, then write the table, the records and the plots."""
    sources = [*args.folders, *args.images]
    if not sources:
        raise InputError("there is nothing to run on; give a folder of images")
    grid, output = grid_from(args), output_from(args)
    for source in sources:
        offer_download(source)
    image_sets = load_image_sets(sources, args.max_size)
    check_pairs(args, image_sets)
    run = open_run(
        args.device,
        grid.backends,
        image_sets=image_sets,
        limits=Limits(args.repeats, args.warmup, args.max_seconds, args.processes),
        weights=args.weights,
        model_path=args.model_path,
        compiler_cache=args.compiler_cache and real_path(args.compiler_cache),
        min_similarity=args.min_similarity,
        lightglue=args.matcher == "lightglue",
        matcher_weights=args.matcher_weights,
        command=cli.command_line(),
    )
    rows = grid.rows(image_sets, run.device, args.seed)
    weights = {model: run.weights_sha256(model) for model in grid.models}
    if args.model_path:
        own = [row for row in rows if get_backend(row.backend).suffix == args.model_path.suffix]
        check_model_file(args.model_path, own, weights)
    with only_writer(output[0]):
        measure(run, rows, weights, output[0], args.jobs)
        return conclude(*output)


def measure(run: Run, rows: list[Row], weights: dict[str, str], output: Path, jobs: int) -> None:
    """Measure the rows that `output` does not hold yet."""
    done = resume(output, rows, run.configuration, weights) if output.exists() else set()
    announce(run, rows, done)
    try:
        for record in run_rows(run, [row for row in rows if row not in done], output, jobs):
            tqdm.write(describe(record))
    except (KeyboardInterrupt, SystemExit):
        print(f"\nto go on, give the same command with --output {output} --resume")
        raise


def conclude(output: Path, folder: Path) -> int:
    """Print the table and write the report; 1 where a row failed or none could be measured."""
    records = load_records([output])
    print("\n" + "\n\n".join([summary_table(records), *footnotes(records)]) + "\n")
    print(f"records: {output}")
    for path in write_report(records, folder):
        print(f"wrote {path}")
    statuses = {record.status for record in records}
    return int("failed" in statuses or "ok" not in statuses)


if __name__ == "__main__":
    cli.run(main, parser())
