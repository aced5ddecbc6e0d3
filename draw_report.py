"""Tables and plots of measured records.

usage: python draw_report.py results/*.jsonl
"""

import argparse
from pathlib import Path

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file
from benchmark.plots import draw_all
from benchmark.records import AnyRecord, MeasuredTwice, is_evaluation, load_records, pair_runs
from benchmark.report import report_text
from evaluation import report as evaluation
from evaluation.scores import load_outcomes

BEGIN, END = "<!-- timings:begin -->", "<!-- timings:end -->"
EVALUATION = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"


def write_report(records: list[AnyRecord], folder: Path) -> list[Path]:
    """Write `tables.md` and the plots into `folder`; the paths written."""
    tables = folder / "tables.md"
    with whole_file(tables) as partial:
        partial.write_text(report_text(records))
    return [tables, *draw_all(records, folder)]


def put_between_markers(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers of a Markdown file; `InputError` without them."""
    before, first, rest = path.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise InputError(f"{path} has no lines {begin} and {end}; add them where the tables go")
    with whole_file(path) as partial:
        partial.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python draw_report.py", description="Tables and plots of measured records."
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="JSONL files")
    parser.add_argument(
        "--other_run",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="JSONL files of another run of the same rows: how far both agree, and a mark on what "
        "differs though the code is the same",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for tables.md and the plots (default: report/ beside the first file)",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"put the tables between {BEGIN} and {END}, those of evaluations between "
        + " and ".join(EVALUATION),
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, write them and the plots."""
    folder = args.output or args.records[0].parent / "report"
    of_evaluation = [path for path in args.records if is_evaluation(path)]
    of_timings = [path for path in args.records if path not in of_evaluation]
    timings = load_records(of_timings) if of_timings or not of_evaluation else []
    if args.other_run:
        timings = paired_with(args.other_run, timings)
    if timings:
        written = write_report(timings, folder)
        show(report_text(timings), written, args.readme, (BEGIN, END))
    if of_evaluation:
        outcomes = load_outcomes(of_evaluation)
        written = evaluation.write_report(outcomes, timings, folder)
        show(evaluation.report_text(outcomes, timings), written, args.readme, EVALUATION)


def paired_with(paths: list[Path], timings: list[AnyRecord]) -> list[AnyRecord]:
    """Return `timings` with what another run measured of them; `InputError` where that is none."""
    names = ", ".join(map(str, paths))
    paired = pair_runs(timings, load_records(paths))
    twice = [record for record in paired if isinstance(record, MeasuredTwice)]
    if not twice:
        raise InputError(
            f"no row of {names} was measured on the same device in the other files; leave "
            "--other_run out, or give another run of the same rows"
        )
    if any(record.other in timings for record in twice):
        raise InputError(
            f"{names} has records of the files that it is to be compared with; give another run of "
            "the same rows"
        )
    return paired


def show(text: str, written: list[Path], readme: Path | None, markers: tuple[str, str]) -> None:
    """Print the tables, and put them into the README if there is one."""
    print(text)
    for path in written:
        print(f"wrote {path}")
    if readme:
        put_between_markers(readme, text, *markers)
        print(f"put the tables into {readme}")


if __name__ == "__main__":
    cli.run(main, parser())
