#!/usr/bin/env python3
"""Stage 3: time and memory of every runtime, each row in a process of its own.

Every row is measured by two clocks: compute, from device tensors to device tensors, and end to
end, from a uint8 image in host memory to NumPy arrays. Decoding is never included. Each row is
compared with PyTorch in float32 on the same images; one outside tolerance is shown, not ranked.
"""

import argparse
import sys
import time
from pathlib import Path

from tqdm import tqdm

from aliked import cli
from aliked.backends import BACKENDS, Spec, get_backend
from aliked.cli import add_device_option, add_weights_option, check_selection
from aliked.configs import CONFIGS, get_config
from aliked.download import offer_download
from aliked.errors import InputError
from aliked.files import writable_folder
from benchmark.records import AnyRecord, load_records, resume
from benchmark.report import footnotes, milliseconds, summary_table
from benchmark.rows import Grid, Row, load_image_sets
from benchmark.runner import Run, open_run, run_rows
from benchmark.timing import Limits
from draw_report import write_report

EVERY_BACKEND = [name for name in BACKENDS if name != "onnxruntime"]  # which chooses among others


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="folders of images, or images"
    )
    p.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="the same, as an option",
    )
    add_grid_options(p.add_argument_group("what to measure: every combination is a row"))
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
        help="with --top_k 0: at most this many keypoints per image (default: %(default)s)",
    )
    group.add_argument(
        "--precisions",
        "--precision",
        nargs="+",
        choices=("fp32", "fp16"),
        help="of the model (default: fp32, of a backend that has no other fp16)",
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
    suffixes = [get_backend(name).suffix for name in backends]
    file = args.model_path
    if file and file.suffix not in suffixes:
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


def output_from(args: argparse.Namespace) -> Path:
    """Where the records go; `InputError` where that would overwrite some or cannot be written."""
    path = args.output or Path("output") / time.strftime("timings-%Y%m%d-%H%M%S.jsonl")
    if path.suffix != ".jsonl" or path.is_dir():
        raise InputError(f"--output {path} is not the name of a .jsonl file; give one")
    if path.exists() and not args.resume:
        raise InputError(f"{path} exists; pass --resume to go on with it, or another --output")
    writable_folder(path.parent)
    return path


def announce(run: Run, rows: list[Row], done: set[Row]) -> None:
    """Say what is about to run, and where."""
    if run.device == "cpu":
        print(f"no CUDA device is used: timing on the CPU ({run.machine['cpu']})")
    else:
        print(f"timing on {run.device} ({run.machine['gpu']})")
    for images in run.image_sets:
        print(f"images: {images.name}, {len(images.paths)} of {images.width}x{images.height}")
    print(f"{len(rows)} rows" + (f", {len(done)} of them measured already" if done else ""))


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
    grid, limits, output = grid_from(args), limits_from(args), output_from(args)
    for source in sources:
        offer_download(source)
    image_sets = load_image_sets(sources)
    run = open_run(
        args.device,
        grid.backends,
        image_sets=image_sets,
        limits=limits,
        weights=args.weights,
        model_path=args.model_path,
        compiler_cache=args.compiler_cache and args.compiler_cache.resolve(),
        command=" ".join(["python", *sys.argv]),
    )
    rows = grid.rows(image_sets, run.device, args.seed)
    weights = {model: run.weights_sha256(model) for model in grid.models}
    done = resume(output, rows, run.configuration, weights) if output.exists() else set()
    announce(run, rows, done)
    try:
        pending = [row for row in rows if row not in done]
        for record in run_rows(run, pending, output, args.jobs):
            tqdm.write(describe(record))
    except KeyboardInterrupt:
        print(f"\nto go on, give the same command with --output {output} --resume")
        raise
    return conclude(output)


def conclude(output: Path) -> int:
    """Print the table and write the report; 1 where a row failed or none could be measured."""
    records = load_records([output])
    print("\n" + "\n\n".join([summary_table(records), *footnotes(records)]) + "\n")
    print(f"records: {output}")
    for path in write_report(records, output.with_suffix("")):
        print(f"wrote {path}")
    statuses = {record.status for record in records}
    return int("failed" in statuses or "ok" not in statuses)


if __name__ == "__main__":
    cli.run(main, parser())
