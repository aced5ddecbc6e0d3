"""Tables and plots of measured records.

usage: python draw_report.py results/*.jsonl
"""

import argparse
import itertools
from pathlib import Path

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file
from benchmark.records import Result, load_results, pair_runs, read_records, sections
from benchmark.report import repeats_text, section_text
from evaluation import report as evaluation
from evaluation.scores import is_evaluation, load_outcomes

BEGIN, END = "<!-- timings:begin -->", "<!-- timings:end -->"
EVALUATION = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"


def report_text(results: list[Result]) -> str:
    """The tables of all sections, as Markdown; the same records give the same bytes."""
    parts = ((section_text(own), repeats_text(own)) for own in sections(results))
    return "\n\n".join(filter(None, itertools.chain(*parts))) + "\n"


def write_report(results: list[Result], folder: Path) -> list[Path]:
    """Write `tables.md` and the plots into `folder`; the paths written."""
    from benchmark.plots import draw_all

    tables = folder / "tables.md"
    with whole_file(tables) as partial:
        partial.write_text(report_text(results))
    return [tables, *itertools.chain(*(draw_all(own, folder) for own in sections(results)))]


def put_between_markers(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace what stands between the markers of a Markdown file; `InputError` without them."""
    before, first, rest = path.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise InputError(f"{path} has no lines {begin} and {end}; add them where the tables go")
    with whole_file(path) as partial:
        partial.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def split_files(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files of measure_timings.py, and those of evaluate.py, by their first record."""
    of_evaluation = [path for path in paths if any(map(is_evaluation, read_records(path)[:1]))]
    return [path for path in paths if path not in of_evaluation], of_evaluation


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
        nargs="+",
        metavar="FILE",
        help=f"put the tables between {BEGIN} and {END}, those of evaluations between "
        + " and ".join(EVALUATION)
        + ", of every file that has these lines",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, write them and the plots."""
    folder = args.output or args.records[0].parent / "report"
    of_timings, of_evaluation = split_files(args.records)
    timings = load_results(of_timings) if of_timings or not of_evaluation else []
    if args.other_run:
        timings = pair_runs(timings, load_results(args.other_run))
        if not any(result.again for result in timings):
            raise InputError(
                f"no row of {', '.join(map(str, args.other_run))} was measured on the same device "
                "in the other files; leave --other_run out, or give another run of the same rows"
            )
        if any(result.again and result.again.record == result.record for result in timings):
            raise InputError(
                f"{', '.join(map(str, args.other_run))} has records of the files that it is to be "
                "compared with; give another run of the same rows"
            )
    if timings:
        written = write_report(timings, folder)
        show(report_text(timings), written, args.readme, (BEGIN, END))
    if of_evaluation:
        outcomes = load_outcomes(of_evaluation)
        written = evaluation.write_report(outcomes, timings, folder)
        show(evaluation.report_text(outcomes, timings), written, args.readme, EVALUATION)


def show(
    text: str, written: list[Path], pages: list[Path] | None, markers: tuple[str, str]
) -> None:
    """Print the tables, and put them into the pages that have the markers; at least one must."""
    print(text)
    for path in written:
        print(f"wrote {path}")
    for page in [page for page in pages or [] if markers[0] in page.read_text()] or pages or []:
        put_between_markers(page, text, *markers)
        print(f"put the tables into {page}")


if __name__ == "__main__":
    cli.run(main, parser())
