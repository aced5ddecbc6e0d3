"""Markdown tables of results, and the notes that belong below them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from benchmark.records import CLOCKS, UNRANKED, UNSTABLE, Result, case, device_name, runtime_order
from benchmark.timing import REPEATED_WITHIN, apart

MEMORY = {
    "process": "GPU memory of the process as NVML counts it",
    "difference": "GPU memory that came into use with the process, by NVML",
    "host peak": "on the CPU, the largest resident memory of the process",
    "unknown": "? where the system does not tell",
}


@dataclass(frozen=True)
class View:
    """What a table shows in each cell."""

    title: str
    clock: str
    text: Callable[[Result], str]


def compute_text(result: Result) -> str:
    """Median ms and MiB."""
    return f"{milliseconds(result.compute_ms)}, {result.mib}"


def end_to_end_text(result: Result) -> str:
    """Median ms."""
    return milliseconds(result.record["end_to_end_ms"]["p50"])


def throughput_text(result: Result) -> str:
    """Images per second by the compute clock."""
    return f"{result.record['images_per_second']['compute']:.0f}"


COMPUTE = View("compute: ms, MiB", "compute_ms", compute_text)
END_TO_END = View("end to end: ms", "end_to_end_ms", end_to_end_text)
THROUGHPUT = View("compute: images per second", "compute_ms", throughput_text)


def markdown(header: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table, the first `left` columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def milliseconds(value: float) -> str:
    """Four digits or so."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def summary_table(results: list[Result]) -> str:
    """Every measured result on a line of its own, the fastest of each case first.

    Those that are not ranked come last.
    """
    statistics = ("mean", "p50", "p90", "p99", "min", "max")
    header = ["model", "K", "image", "batch", "precision", "runtime", "rank"]
    header += ["compute ms: mean", *statistics[1:], "runs", "end to end ms: p50", "images/s"]
    header += ["MiB", "start s", "in common"]
    lines = []
    for _, group in itertools.groupby(results, lambda r: (case(r), r.row.precision)):
        measured = [r for r in group if r.measured]
        measured.sort(key=lambda r: (not r.ranked, r.compute_ms))
        lines += [_summary_line(r, place, statistics) for place, r in enumerate(measured, 1)]
    return markdown(header, lines, left=6) if lines else "No row could be measured."


def _summary_line(result: Result, place: int, statistics: tuple[str, ...]) -> list[str]:
    record, row = result.record, result.row
    clock = record["compute_ms"]
    return [
        row.model,
        row.selection,
        row.images,
        str(row.batch),
        row.precision,
        row.runtime,
        (str(place) if result.ranked else "") + result.marks(),
        *(milliseconds(clock[name]) for name in statistics),
        str(clock["runs"]),
        end_to_end_text(result),
        f"{record['images_per_second']['compute']:.3g}",
        result.mib,
        f"{record['build_s'] + record['load_s'] + record['first_run_s']:.1f}",
        f"{record['parity']['keypoints_in_common']:.2%}",
    ]


def wide_table(results: list[Result], view: View) -> str:
    """Rows model, K, image, perhaps batch; a column per runtime; the fastest ranked one in bold."""
    in_batches = any(r.row.batch > 1 for r in results)
    in_order = sorted(results, key=runtime_order)
    runtimes = list(dict.fromkeys(r.row.runtime for r in in_order if r.measured))
    lines = []
    for _, group in itertools.groupby(results, case):
        by_runtime = {r.row.runtime: r for r in group}
        best = fastest(by_runtime.values(), view.clock)
        row = next(iter(by_runtime.values())).row
        cells = [_wide_cell(by_runtime.get(name), best, view) for name in runtimes]
        batch = [str(row.batch)] if in_batches else []
        lines.append([row.model, row.selection, row.images, *batch, *cells])
    header = ["model", "K", "image", *(["batch"] if in_batches else [])]
    return markdown([*header, *runtimes], lines, left=len(header))


def fastest(results: Iterable[Result], clock: str) -> Result | None:
    """The quickest by its median of those that are ranked."""
    ranked = [r for r in results if r.ranked]
    return min(ranked, key=lambda r: r.record[clock]["p50"], default=None)


def _wide_cell(result: Result | None, best: Result | None, view: View) -> str:
    if result is None:
        return ""
    if not result.measured:
        return result.record["status"]
    text = view.text(result)
    return (f"**{text}**" if result is best else text) + result.marks(view.clock)


def section_text(results: list[Result]) -> str:
    """All tables of one section."""
    parts = [f"### {device_name(results[0])}", describe_section(results)]
    for kind in dict.fromkeys(map(_kind, results)):
        chosen = [r for r in results if _kind(r) == kind]
        if not any(r.measured for r in chosen):
            continue
        precision, in_batches = kind
        title = precision.upper() + (", batches" if in_batches else "")
        for view in (COMPUTE, END_TO_END, *([THROUGHPUT] if in_batches else [])):
            parts += [f"**{title}, {view.title}**", wide_table(chosen, view)]
    return "\n\n".join([*parts, *footnotes(results)])


def _kind(result: Result) -> tuple[str, bool]:
    """What shares a table: the precision, and whether images come in batches."""
    return result.row.precision, result.row.batch > 1


def describe_section(results: list[Result]) -> str:
    """Hardware, versions, code and method in a paragraph."""
    records = [r.record for r in results if r.measured]
    configurations = [r.record["configuration"] for r in results]
    hardware = _distinct((_hardware(c["machine"]) for c in configurations), " and ")
    software = [f"{name} {v}" for name, v in sorted(configurations[0]["versions"].items()) if v]
    clocks = ("compute_ms", "end_to_end_ms")
    runs = sorted(r[clock]["runs"] for r in records for clock in clocks) or [0]
    count = f"{runs[0]}" if runs[0] == runs[-1] else f"{runs[0]} to {runs[-1]}"
    memory = [MEMORY[method] for method in sorted({r["memory"]["method"] for r in records})]
    return (
        f"{hardware}. {', '.join(software)}. "
        f"Code: commit {_distinct(r.record['commit'] or 'unknown' for r in results)}. "
        f"Median of {count} runs over the images in turn. Compute: device tensors to device "
        f"tensors, by {_distinct((r['clock'] for r in records), ' and ')}. End to end: uint8 image "
        f"in host memory to NumPy arrays, decoding excluded. MiB: {'; '.join(memory)}. "
        f"Bold: fastest of its line."
    )


def _hardware(machine: dict) -> str:
    host = f"{machine['cpu']}, {machine['cpu_threads']} threads, {machine['system']}"
    return f"Driver {machine['driver']}; {host}" if machine.get("driver") else host


def _distinct(values: Iterable[str], separator: str = ", ") -> str:
    return separator.join(sorted(set(values)))


def footnotes(results: list[Result]) -> list[str]:
    """Why which rows are marked, missing or failed."""
    measured = [r for r in results if r.measured]
    unranked = [(r, "; ".join(r.objections())) for r in measured if not r.ranked]
    unstable = [(r, "; ".join(r.unstable())) for r in measured if r.unstable()]
    absent: dict[str, int] = {}
    for result in (r for r in results if not r.measured):
        reason = f"{result.row.runtime}, {result.record['status']}: {result.record['reason']}"
        absent[reason] = absent.get(reason, 0) + 1
    notes = {
        f"{UNRANKED} not within tolerance, or not what it claims to be: shown, never ranked": (
            _by_runtime(unranked)
        ),
        f"{UNSTABLE} unstable": _by_runtime(unstable),
        "Rows without a time": [f"{why} ({_rows(n)})" for why, n in absent.items()],
    }
    return [
        "\n".join([f"{title}:", "", *(f"- {line}" for line in lines)])
        for title, lines in notes.items()
        if lines
    ]


def _by_runtime(remarks: list[tuple[Result, str]]) -> list[str]:
    """A line per runtime and precision: how many rows, and the first with its remark."""
    groups: dict[tuple, list[tuple[Result, str]]] = {}
    for result, text in sorted(remarks, key=lambda remark: runtime_order(remark[0])):
        groups.setdefault((result.row.runtime, result.row.precision), []).append((result, text))
    lines = []
    for group in groups.values():
        result, text = group[0]
        more = f" (and {len(group) - 1} more of this runtime)" if len(group) > 1 else ""
        lines.append(f"{result.row}: {text}{more}")
    return lines


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


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
        for kind, group in _medians_by_runtime(pairs)
    ]
    return f"{title}\n\n{markdown(['runtime', 'precision', 'rows', *columns], lines, left=2)}"


def measured_at(result: Result) -> datetime:
    """When the row was done."""
    return datetime.fromisoformat(result.record["measured_at"])


def _medians_by_runtime(pairs: list[Pair]) -> Iterable[tuple[tuple[str, str], list[Pair]]]:
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
