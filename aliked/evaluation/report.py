"""The tables and plots of evaluations, from their records."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from aliked.benchmark.results import Result
from aliked.evaluation.records import Outcome
from aliked.evaluation.tables import section_text, sections
from aliked.files import whole_file


def report_text(outcomes: Sequence[Outcome], timings: Sequence[Result]) -> str:
    """The tables of all sections, as Markdown; the same records give the same bytes."""
    return "\n\n".join(section_text(own, timings) for own in sections(outcomes)) + "\n"


def write_report(
    outcomes: Sequence[Outcome], timings: Sequence[Result], folder: Path
) -> list[Path]:
    """Write `evaluation.md` and the plots into `folder`; the paths written."""
    from aliked.evaluation.plots import draw_section  # here, because tables need no matplotlib

    tables = folder / "evaluation.md"
    with whole_file(tables) as partial:
        partial.write_text(report_text(outcomes, timings))
    names, written = Counter(), [tables]
    for own in sections(outcomes):
        name = f"{own[0].record['task']} {own[0].record['dataset']['name']}"
        names[name] += 1
        numbered = name if names[name] == 1 else f"{name} {names[name]}"
        written += draw_section(own, timings, folder, numbered)
    return written
