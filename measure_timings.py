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
from aliked.download import offer_download
from aliked.errors import InputError
from aliked.files import writable_folder
from benchmark.records import load_results, resume
from benchmark.report import footnotes, summary_table
from benchmark.rows import (
    Row,
    add_file_options,
    add_grid_options,
    add_limit_options,
    grid_from,
    limits_from,
    row_of,
)
from benchmark.runner import Session, load_image_sets, open_session, run_rows
from draw_report import write_report


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


def output_from(args: argparse.Namespace) -> Path:
    """Where the records go; `InputError` where that would overwrite some or cannot be written."""
    path = args.output or Path("output") / time.strftime("timings-%Y%m%d-%H%M%S.jsonl")
    if path.suffix != ".jsonl" or path.is_dir():
        raise InputError(f"--output {path} is not the name of a .jsonl file; give one")
    if path.exists() and not args.resume:
        raise InputError(f"{path} exists; pass --resume to go on with it, or another --output")
    writable_folder(path.parent)
    return path


def announce(session: Session, rows: list[Row], done: set[Row]) -> None:
    """Say what is about to run, and where."""
    machine = session.machine
    if session.device == "cpu":
        print(f"no CUDA device is used: timing on the CPU ({machine['cpu']})")
    else:
        print(f"timing on {session.device} ({machine['gpu']})")
    for images in session.image_sets.values():
        print(f"images: {images.name}, {len(images.paths)} of {images.width}x{images.height}")
    print(f"{len(rows)} rows" + (f", {len(done)} of them measured already" if done else ""))


def describe(record: dict) -> str:
    """A row's outcome in a line."""
    row = row_of(record)
    if record["status"] != "ok":
        return f"{row}: {record['status']}: {record['reason']}"
    compute, end_to_end = record["compute_ms"], record["end_to_end_ms"]
    verdict = "" if record["ranked"] else " - not ranked"
    return (
        f"{row}: compute {compute['p50']:.3f} ms, end to end {end_to_end['p50']:.3f} ms, "
        f"{compute['runs']} runs{verdict}"
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
    session = open_session(
        args.device,
        grid.backends,
        image_sets,
        limits,
        weights=args.weights,
        model_path=args.model_path,
        compiler_cache=args.compiler_cache and args.compiler_cache.resolve(),
        command=" ".join(["python", *sys.argv]),
    )
    rows = grid.rows(image_sets, session.device, args.seed)
    done = resume(output, rows, session.configuration()) if output.exists() else set()
    announce(session, rows, done)
    try:
        pending = [row for row in rows if row not in done]
        for record in run_rows(session, pending, output, args.jobs):
            tqdm.write(describe(record))
    except KeyboardInterrupt:
        print(f"\nto go on, give the same command with --output {output} --resume")
        raise
    return conclude(output)


def conclude(output: Path) -> int:
    """Print the table and write the report; 1 where a row failed or none could be measured."""
    results = load_results([output])
    print("\n" + "\n\n".join([summary_table(results), *footnotes(results)]) + "\n")
    print(f"records: {output}")
    for path in write_report(results, output.with_suffix("")):
        print(f"wrote {path}")
    statuses = {result.record["status"] for result in results}
    return int("failed" in statuses or "ok" not in statuses)


if __name__ == "__main__":
    cli.run(main, parser())
