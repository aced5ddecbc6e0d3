"""How far two runs of the same rows agree."""

import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime

import numpy as np

from aliked.benchmark.results import CLOCKS, Result, runtime_order
from aliked.benchmark.stationarity import REPEATED_WITHIN, apart
from aliked.benchmark.tables import markdown

Pair = tuple[Result, Result]  # in the order in which they were measured


def repeats_text(results: Sequence[Result]) -> str:
    """A table of how far `results` and the other run agree; empty where none was measured again."""
    pairs = [tuple(sorted((r, r.again), key=measured_at)) for r in results if r.again]
    if not pairs:
        return ""
    commits = (sorted({str(pair[i].record["commit"]) for pair in pairs}) for i in (0, 1))
    first, second = map(", ".join, commits)
    title = (
        f"**Measured twice**: change of the medians of the same rows from a first run (commit "
        f"{first}) to a second (commit {second}); median, smallest and largest, and how many rows "
        f"are within {REPEATED_WITHIN:.0%}."
    )
    columns = [f"{name}: {what}" for name in CLOCKS.values() for what in ("change", "within")]
    lines = [
        [*kind, str(len(group)), *itertools.chain(*(_agreement(group, clock) for clock in CLOCKS))]
        for kind, group in _by_runtime(pairs)
    ]
    return f"{title}\n\n{markdown(['runtime', 'precision', 'rows', *columns], lines, left=2)}"


def measured_at(result: Result) -> datetime:
    """When the row was done."""
    return datetime.fromisoformat(result.record["measured_at"])


def _by_runtime(pairs: list[Pair]) -> Iterable[tuple[tuple[str, str], list[Pair]]]:
    ordered = sorted(pairs, key=lambda pair: (runtime_order(pair[1]), pair[1].row.precision))
    groups = itertools.groupby(ordered, lambda pair: (pair[1].row.runtime, pair[1].row.precision))
    return ((kind, list(group)) for kind, group in groups)


def _agreement(pairs: list[Pair], clock: str) -> list[str]:
    """The change in percent, and how many rows are within `REPEATED_WITHIN`."""
    medians = np.array([[r.record[clock]["p50"] for r in pair] for pair in pairs])
    change = medians[:, 1] / medians[:, 0] - 1
    low, middle, high = (f"{100 * value:+.1f}" for value in np.percentile(change, (0, 50, 100)))
    within = sum(apart(pair) <= REPEATED_WITHIN for pair in medians)
    return [f"{middle} [{low}, {high}] %", str(within)]
