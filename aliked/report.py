"""Tables and plots of measured records.

usage: python -m aliked.report results/*.jsonl
"""

import argparse
import itertools
from pathlib import Path

from aliked import cli
from aliked.benchmark.results import Result, load_results, sections
from aliked.benchmark.tables import section_text
from aliked.errors import InputError
from aliked.files import whole_file

BEGIN, END = "<!-- timings:begin -->", "<!-- timings:end -->"


def report_text(results: list[Result]) -> str:
    """The tables of all sections, as Markdown; the same records give the same bytes."""
    return "\n\n".join(map(section_text, sections(results))) + "\n"


def write_report(results: list[Result], folder: Path) -> list[Path]:
    """Write `tables.md` and the plots into `folder`; the paths written."""
    from aliked.benchmark.plots import draw_all  # here, because tables need no matplotlib

    tables = folder / "tables.md"
    with whole_file(tables) as partial:
        partial.write_text(report_text(results))
    return [tables, *itertools.chain(*(draw_all(own, folder) for own in sections(results)))]


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a Markdown file; `InputError` without them."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path} has no lines {BEGIN} and {END}; add them where the tables go")
    with whole_file(path) as partial:
        partial.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m aliked.report", description="Tables and plots of measured records."
    )
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="JSONL files")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for tables.md and the plots (default: report/ beside the first file)",
    )
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"put the tables between {BEGIN} and {END}"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, write them and the plots."""
    results = load_results(args.records)
    text = report_text(results)
    print(text)
    for path in write_report(results, args.output or args.records[0].parent / "report"):
        print(f"wrote {path}")
    if args.readme:
        put_between_markers(args.readme, text)
        print(f"put the tables into {args.readme}")


if __name__ == "__main__":
    cli.run(main, parser())
