"""Tables of records, and the notes that belong below them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aliked.backends.tensorrt_library import HOPPER, numbers
from aliked.cli import markdown
from benchmark.records import (
    CLOCKS,
    UNRANKED,
    UNSTABLE,
    AnyRecord,
    Measured,
    MeasuredTwice,
    case,
    runtime_order,
    sections,
)
from benchmark.rows import SUBJECTS, Row
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
    text: Callable[[Measured], str]


def compute_text(record: Measured) -> str:
    """Return median ms and MiB."""
    return f"{milliseconds(record.compute_ms.p50)}, {record.mib}"


def end_to_end_text(record: Measured) -> str:
    """Return median ms."""
    return milliseconds(record.end_to_end_ms.p50)


def throughput_text(record: Measured) -> str:
    """Return images per second by the compute clock."""
    return f"{record.images_per_second.compute:.0f}"


COMPUTE = View("compute: ms, MiB", "compute_ms", compute_text)
END_TO_END = View("end to end: ms", "end_to_end_ms", end_to_end_text)
THROUGHPUT = View("compute: images per second", "compute_ms", throughput_text)


def milliseconds(value: float) -> str:
    """Return a time with four digits or so."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def summary_table(records: list[AnyRecord]) -> str:
    """Return a table for the terminal: a heading per case, its runtimes below, the fastest first.

    Those that are not ranked come last. At most 120 characters wide.
    """
    parts = []
    measured = [r for r in records if r.measured]
    for _, group in itertools.groupby(measured, lambda r: (case(r.row), r.row.precision)):
        own = sorted(group, key=lambda r: (not r.ranked, r.compute_ms.p50))
        row = own[0].row
        batch = f", batches of {row.batch}" if row.batch > 1 else ""
        lines = [[*_summary_line(r, place)] for place, r in enumerate(own, 1)]
        header = [[*line] for line in SUMMARY]
        if any(r.matches is not None for r in own):
            counts = ["?" if r.matches is None else f"{r.matches:.1f}" for r in own]
            for line, cell in zip([*header, *lines], ["", "matches", *counts], strict=True):
                line.append(cell)
        title = f"{row.subject}, K {row.selection}, {row.images}{batch}, {row.precision}"
        parts.append(f"{title}\n{aligned([*header, *lines])}")
    return "\n\n".join(parts) or "No row could be measured."


SUMMARY = (
    ("", "", "compute", "", "end to end", "", "", "build", "load", "first", "in"),
    ("runtime", "rank", "ms", "p90", "ms", "images/s", "MiB", "s", "s", "run s", "common"),
)


def _summary_line(record: Measured, place: int) -> tuple[str, ...]:
    return (
        record.runtime,
        (str(place) if record.ranked else "") + record.marks(),
        milliseconds(record.compute_ms.p50),
        milliseconds(record.compute_ms.p90),
        milliseconds(record.end_to_end_ms.p50),
        f"{record.images_per_second.compute:.3g}",
        record.mib,
        f"{record.build_s:.1f}",
        f"{record.load_s:.1f}",
        f"{record.first_run_s:.1f}",
        f"{record.parity.in_common:.2%}",
    )


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def wide_table(records: list[AnyRecord], view: View) -> str:
    """Return rows of model, K, image, perhaps batch; a column per runtime; the fastest in bold."""
    in_batches = any(r.row.batch > 1 for r in records)
    in_order = sorted(records, key=lambda r: runtime_order(r.row))
    runtimes = list(dict.fromkeys(r.runtime for r in in_order if r.measured))
    lines = []
    for _, group in itertools.groupby(records, lambda r: case(r.row)):
        by_runtime = {r.runtime: r for r in group}
        best = fastest(by_runtime.values(), view.clock)
        row = next(iter(by_runtime.values())).row
        cells = [_wide_cell(by_runtime.get(name), best, view) for name in runtimes]
        batch = [str(row.batch)] if in_batches else []
        lines.append([row.model, str(row.selection), row.images, *batch, *cells])
    header = ["model", "K", "image", *(["batch"] if in_batches else [])]
    return markdown([*header, *runtimes], lines, left=len(header))


def fastest(records: Iterable[AnyRecord], clock: str) -> Measured | None:
    """Return the quickest by its median of those that are ranked."""
    ranked = [r for r in records if r.ranked]
    return min(ranked, key=lambda r: r.clock_of(clock).p50, default=None)


def _wide_cell(record: AnyRecord | None, best: Measured | None, view: View) -> str:
    if record is None:
        return ""
    if not record.measured:
        return record.status
    text = view.text(record)
    return (f"**{text}**" if record is best else text) + record.marks(view.clock)


def report_text(records: list[AnyRecord]) -> str:
    """Return the tables of all sections, as Markdown; the same records give the same bytes."""
    parts = ((section_text(own), repeats_text(own)) for own in sections(records))
    return "\n\n".join(filter(None, itertools.chain(*parts))) + "\n"


def section_text(records: list[AnyRecord]) -> str:
    """Return all tables of one section."""
    parts = [f"### {records[0].device_name}", describe_section(records)]
    of_rows = [r for r in records if r.row]
    for kind in dict.fromkeys(map(_kind, of_rows)):
        chosen = [r for r in of_rows if _kind(r) == kind]
        if not any(r.measured for r in chosen):
            continue
        graph, precision, in_batches = kind
        title = precision.upper() + SUBJECTS[graph] + (", batches" if in_batches else "")
        for view in (COMPUTE, END_TO_END, *([THROUGHPUT] if in_batches else [])):
            parts += [f"**{title}, {view.title}**", wide_table(chosen, view)]
    return "\n\n".join([*parts, *footnotes(records)])


def _kind(record: AnyRecord) -> tuple[str, str, bool]:
    """What shares a table: the graph, the precision, and whether images come in batches."""
    return record.row.graph, record.row.precision, record.row.batch > 1


USERS_ROWS = {
    "models": ("aliked-t16", "aliked-n16rot"),
    "top_k": (1000, 2000),
    "precision": "fp16",
}


def small_table(records: list[AnyRecord]) -> str:
    """Return one table of single images by the compute clock, of two models and two K.

    It is of the models, K and precision that `USERS_ROWS` names, on the device with most of them
    (the first such); "" where there is none.
    """
    chosen = [
        [r for r in section if r.measured and r.row.batch == 1 and _is_users(r.row)]
        for section in sections(records)
    ]
    most = max(chosen, key=lambda own: len({case(r.row) for r in own}), default=[])
    if not most:
        return ""
    title = f"**{most[0].device_name}, {USERS_ROWS['precision'].upper()}: ms, MiB**"
    return f"{title}\n\n{wide_table(most, COMPUTE)}\n"


def _is_users(row: Row) -> bool:
    wanted = (
        row.graph == "extractor",
        row.model in USERS_ROWS["models"],
        row.top_k in USERS_ROWS["top_k"],
    )
    return all(wanted) and row.precision == USERS_ROWS["precision"]


def describe_section(records: list[AnyRecord]) -> str:
    """Return hardware, versions, code and method in a paragraph."""
    measured = [r for r in records if r.measured]
    configurations = [r.configuration for r in records]
    hardware = _distinct((_hardware(c.machine) for c in configurations), " and ")
    software = [f"{name} {v}" for name, v in sorted(configurations[0].versions.items()) if v]
    runs = sorted(r.clock_of(clock).runs for r in measured for clock in CLOCKS) or [0]
    count = f"{runs[0]}" if runs[0] == runs[-1] else f"{runs[0]} to {runs[-1]}"
    memory = [MEMORY[method] for method in sorted({r.memory.method for r in measured})]
    return (
        f"{hardware}. {', '.join(software)}. "
        f"Code: commit {_distinct(r.commit or 'unknown' for r in records)}. "
        f"Median of {count} runs over the images in turn. Compute: device tensors to device "
        f"tensors, by {_distinct((r.clock for r in measured), ' and ')}. End to end: uint8 image "
        f"in host memory to NumPy arrays, decoding excluded. MiB: {'; '.join(memory)}. "
        f"Bold: fastest of its line.{_unsupported(records)}"
    )


def _unsupported(records: list[AnyRecord]) -> str:
    """What is to be said of rows on a GPU that their library does not support."""
    on_hopper = any(
        numbers(str(r.configuration.machine.get("compute_capability"))) == HOPPER
        for r in records
        if r.measured and "tensorrt-rtx" in r.runtime
    )
    return " This GPU is outside NVIDIA's support list of TensorRT for RTX." if on_hopper else ""


def _hardware(machine: dict) -> str:
    host = f"{machine['cpu']}, {machine['cpu_threads']} threads, {machine['system']}"
    return f"Driver {machine['driver']}; {host}" if machine.get("driver") else host


def _distinct(values: Iterable[str], separator: str = ", ") -> str:
    return separator.join(sorted(set(values)))


def footnotes(records: list[AnyRecord]) -> list[str]:
    """Return why which rows are marked, missing or failed."""
    measured = [r for r in records if r.measured]
    unranked = [(r, "; ".join(r.objections())) for r in measured if not r.ranked]
    unstable = [(r, "; ".join(r.unstable())) for r in measured if r.unstable()]
    absent: dict[str, int] = {}
    for record in (r for r in records if not r.measured):
        reason = f"{record.runtime}, {record.status}: {record.reason}"
        absent[reason] = absent.get(reason, 0) + record.rows
    notes = {
        f"{UNRANKED} not within tolerance, or not what it claims to be: shown, never ranked": (
            _by_runtime(unranked)
        ),
        f"{UNSTABLE} unstable": _by_runtime(unstable),
        "Rows without a time": [f"{why} ({rows_text(n)})" for why, n in absent.items()],
    }
    return [
        "\n".join([f"{title}:", "", *(f"- {line}" for line in lines)])
        for title, lines in notes.items()
        if lines
    ]


def _by_runtime(remarks: list[tuple[Measured, str]]) -> list[str]:
    """A line per runtime and precision: how many rows, and the first with its remark."""
    groups: dict[tuple, list[tuple[Measured, str]]] = {}
    for record, text in sorted(remarks, key=lambda remark: runtime_order(remark[0].row)):
        groups.setdefault((record.runtime, record.row.precision), []).append((record, text))
    lines = []
    for group in groups.values():
        record, text = group[0]
        more = f" (and {len(group) - 1} more of this runtime)" if len(group) > 1 else ""
        lines.append(f"{record.row}: {text}{more}")
    return lines


def rows_text(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count} row" if count == 1 else f"{count} rows"


Pair = tuple[Measured, Measured]  # in the order in which they were measured


def repeats_text(records: Sequence[AnyRecord]) -> str:
    """Return a table of how far `records` and another run agree; "" where there is none."""
    pairs: list[Pair] = [
        tuple(sorted((r, r.other), key=lambda record: record.measured_at))
        for r in records
        if isinstance(r, MeasuredTwice)
    ]
    if not pairs:
        return ""
    commits = (sorted({str(pair[i].commit) for pair in pairs}) for i in (0, 1))
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


def _medians_by_runtime(pairs: list[Pair]) -> Iterable[tuple[tuple[str, str], list[Pair]]]:
    ordered = sorted(pairs, key=lambda pair: (runtime_order(pair[1].row), pair[1].row.precision))
    groups = itertools.groupby(ordered, lambda pair: (pair[1].runtime, pair[1].row.precision))
    return ((kind, list(group)) for kind, group in groups)


def _agreement(pairs: list[Pair], clock: str) -> list[str]:
    """The change in percent, and how many rows are within `REPEATED_WITHIN`."""
    medians = np.array([[r.clock_of(clock).p50 for r in pair] for pair in pairs])
    change = medians[:, 1] / medians[:, 0] - 1
    low, middle, high = (f"{100 * value:+.1f}" for value in np.percentile(change, (0, 50, 100)))
    within = sum(apart(pair) <= REPEATED_WITHIN for pair in medians)
    return [f"{middle} [{low}, {high}] %", str(within)]
