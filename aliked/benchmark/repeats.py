"""How far two runs of the same rows agree."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from aliked.benchmark.results import CLOCKS, Result, device_name, runtime_order
from aliked.benchmark.tables import markdown

WITHIN = 0.05  # of the earlier median
Pair = tuple[Result, Result]  # earlier, later


def repeats_text(results: Sequence[Result], earlier: Sequence[Result]) -> str:
    """A table of what changed from `earlier` to `results`; empty where they share no row."""
    pairs = _pairs(results, earlier)
    if not pairs:
        return ""
    commits = (sorted({str(pair[i].record["commit"]) for pair in pairs}) for i in (0, 1))
    before, now = map(", ".join, commits)
    title = (
        f"**Measured twice**: change of the medians of the same rows from an earlier run (commit "
        f"{before}) to this one (commit {now}); median, smallest and largest, and how many rows "
        f"are within {WITHIN:.0%}."
    )
    columns = [f"{name}: {what}" for name in CLOCKS.values() for what in ("change", "within")]
    lines = [
        [*kind, str(len(group)), *itertools.chain(*(_agreement(group, clock) for clock in CLOCKS))]
        for kind, group in _by_runtime(pairs)
    ]
    return f"{title}\n\n{markdown(['runtime', 'precision', 'rows', *columns], lines, left=2)}"


def _pairs(results: Sequence[Result], earlier: Sequence[Result]) -> list[Pair]:
    """Measured results of the same row on the same kind of device, in the order of `results`."""
    before = {(device_name(r), r.row): r for r in earlier if r.measured}
    keys = [(device_name(r), r.row) for r in results]
    return [
        (before[key], result)
        for key, result in zip(keys, results, strict=True)
        if result.measured and key in before
    ]


def _by_runtime(pairs: list[Pair]) -> Iterable[tuple[tuple[str, str], list[Pair]]]:
    ordered = sorted(pairs, key=lambda pair: (runtime_order(pair[1]), pair[1].row.precision))
    groups = itertools.groupby(ordered, lambda pair: (pair[1].row.runtime, pair[1].row.precision))
    return ((kind, list(group)) for kind, group in groups)


def _agreement(pairs: list[Pair], clock: str) -> list[str]:
    """The change in percent, and how many rows are within `WITHIN`."""
    medians = np.array([[r.record[clock]["p50"] for r in pair] for pair in pairs])
    change = medians[:, 1] / medians[:, 0] - 1
    low, middle, high = (f"{100 * value:+.1f}" for value in np.percentile(change, (0, 50, 100)))
    return [f"{middle} [{low}, {high}] %", str((np.abs(change) <= WITHIN).sum())]
