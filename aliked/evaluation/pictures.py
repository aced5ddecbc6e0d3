"""A page of the pairs that went worst, each as a picture."""

import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from aliked.drawing import write_picture
from aliked.evaluation.records import Outcome
from aliked.evaluation.scores import kind_of
from aliked.evaluation.tables import reference_of
from aliked.files import whole_file

STYLE = """
body { font-family: sans-serif; margin: 2em; background: #fff; color: #222; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 48em; }
img { width: 100%; }
figcaption { font-size: small; }
"""
Draw = Callable[[Outcome, dict], np.ndarray]


def worst_rows(outcome: Outcome, count: int) -> list[dict]:
    """The pairs of one system that went worst, the worst first."""
    badness = kind_of(outcome.record["task"]).badness
    return sorted(outcome.pairs, key=lambda row: (-badness(row), row["name"]))[:count]


def write_page(folder: Path, outcomes: Sequence[Outcome], count: int, draw: Draw) -> Path:
    """Write `worst.html` and its pictures into `folder`: `count` pairs of every system."""
    parts = [
        "<!doctype html>",
        '<meta charset="utf-8">',
        f"<title>Worst pairs</title><style>{STYLE}</style>",
        f"<h1>The {count} worst pairs of each system</h1>",
    ]
    for outcome in outcomes:
        parts.append(f"<h2>{html.escape(str(outcome.system))}</h2>")
        for place, row in enumerate(worst_rows(outcome, count), 1):
            name = re.sub(r"\W+", "-", f"{outcome.system} {place}").strip("-")
            write_picture(folder / "worst" / f"{name}.jpg", draw(outcome, row))
            caption = html.escape(caption_of(row, outcome, reference_of(outcome, outcomes)))
            parts.append(
                f'<figure><img src="worst/{name}.jpg" alt=""><figcaption>{caption}</figcaption>'
                "</figure>"
            )
    page = folder / "worst.html"
    with whole_file(page) as partial:
        partial.write_text("\n".join(parts) + "\n")
    return page


def caption_of(row: dict, outcome: Outcome, reference: Outcome | None) -> str:
    """The pair, how bad it is, and how bad it is with PyTorch in float32."""
    kind = kind_of(outcome.record["task"])
    text = f"{row['name']}: {kind.badness_text.format(kind.badness(row))}"
    same = [other for other in reference.pairs if other["name"] == row["name"]] if reference else []
    return text + "".join(f"; {reference.system}: {kind.badness(other):.1f}" for other in same)
