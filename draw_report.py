"""Tables and plots of measured records.

usage: python draw_report.py results/*.jsonl
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from aliked import cli
from aliked.errors import InputError
from aliked.files import read_text, write_text
from benchmark.plots import write_report
from benchmark.records import AnyRecord, MeasuredTwice, is_evaluation, load_records, pair_runs
from benchmark.report import report_text, small_table
from evaluation import report as evaluation
from evaluation.records import load_outcomes

BEGIN, END = "<!-- timings:begin -->", "<!-- timings:end -->"
EVALUATION = "<!-- evaluation:begin -->", "<!-- evaluation:end -->"


Blocks = dict[tuple[str, str], str]  # text by the markers that it goes between


def put_between_markers(paths: list[Path], blocks: Blocks) -> list[Path]:
    """Replace what stands between the markers of Markdown files; the paths written.

    Each file has the markers of one block at least, each block has a place in one file at least.
    `InputError`, and every file unchanged, where that is not so.
    """
    texts, placed = {}, set()
    for path in paths:
        texts[path] = read_text(path)
        for (begin, end), text in blocks.items():
            before, first, rest = texts[path].partition(begin)
            _, last, after = rest.partition(end)
            if first and last:
                texts[path] = f"{before}{begin}\n\n{text}\n{end}{after}"
                placed |= {path, begin}
    for path in paths:
        if path not in placed:
            names = ", or ".join(" and ".join(markers) for markers in blocks)
            raise InputError(f"{path} has no lines {names}; add them where the tables go")
    for begin, end in blocks if paths else ():
        if begin not in placed:
            names = ", ".join(map(str, paths))
            raise InputError(f"{names} has no lines {begin} and {end}; add them to one of these")
    for path, text in texts.items():
        write_text(path, text)
    return paths


def check_commits(commits: Iterable[str | None]) -> None:
    """Refuse results of code that is in no commit: nobody could run it again.

    Those of an older version only say that there were changes: they are named, once.
    """
    commits = {commit or "unknown" for commit in commits}
    dirty = sorted(commit for commit in commits if "+dirty." in commit)
    if dirty:
        raise InputError(
            f"there are records of code that is in no commit ({dirty[0]}); commit it, measure "
            "again, and draw those"
        )
    changed = sorted(commit for commit in commits if commit.endswith("+changes"))
    if changed:
        warn(f"measured with changes that the records do not tell: {', '.join(changed)}")


def warn(text: str) -> None:
    """Say what does not stop the report."""
    print(f"draw_report.py: {text}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
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
        "--docs",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"put all tables between {BEGIN} and {END}, those of evaluations between "
        + " and ".join(EVALUATION),
    )
    parser.add_argument(
        "--readme",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"put one small table of timings between {BEGIN} and {END}",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, write them and the plots."""
    folder = args.output or args.records[0].parent / "report"
    published = bool(args.docs or args.readme)
    of_evaluation = [path for path in args.records if is_evaluation(path)]
    of_timings = [path for path in args.records if path not in of_evaluation]
    timings, outcomes = [], load_outcomes(of_evaluation)
    if of_timings or not outcomes:
        timings = load_records(of_timings, None if published else warn)
    if args.other_run:
        timings = paired_with(args.other_run, timings)
    small = small_table(timings)
    if args.readme and not small:
        raise InputError("there are no timings for the small table of --readme; leave it out")
    if published:
        commits = [record.commit for record in timings]
        check_commits([*commits, *(outcome.record.get("commit") for outcome in outcomes)])
    blocks, written = {}, []
    if timings:
        blocks[BEGIN, END] = report_text(timings)
        written += write_report(timings, folder)
    if outcomes:
        blocks[EVALUATION] = evaluation.report_text(outcomes, timings)
        written += evaluation.write_report(outcomes, timings, folder)
    put_between_markers(args.docs, blocks)
    put_between_markers(args.readme, {(BEGIN, END): small})
    for text in blocks.values():
        print(text)
    for path in [*written, *args.docs, *args.readme]:
        print(f"wrote {path}")


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


if __name__ == "__main__":
    cli.run(main, parser())
