"""Evaluations as tables, plots and pictures: the answer, what changes, groups, worst pairs."""

import html
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aliked.cli import markdown
from aliked.configs import CONFIGS
from aliked.drawing import write_picture
from aliked.files import write_text
from benchmark.plots import plain_ticks, save_figure
from benchmark.records import UNRANKED, UNSTABLE, Measured
from benchmark.report import milliseconds
from evaluation.records import Outcome, reference_of, sections, timing_of
from evaluation.systems import DETECTORS
from evaluation.task import Score, Task, paired_difference

SPEED_NOTES = (
    "ms: median of the compute clock of measure_timings.py on the same machine, with K and image "
    f"size as here ({UNRANKED} and {UNSTABLE} as in its tables); MiB: memory of that process."
)
HEADER = ["model", "runtime", "precision"]
NOT_MEASURED = "not measured"


def section_text(section: Sequence[Outcome], timings: Sequence[Measured]) -> str:
    """All tables of one section."""
    record = section[0].record
    task = section[0].task
    measured = [outcome for outcome in section if outcome.measured]
    parts = [f"### {record['task']}: {record['dataset']['name']}", describe(section)]
    if measured:
        timed = any(timing_of(outcome, timings) for outcome in measured)
        notes = f"{task.notes} {SPEED_NOTES}" if timed else task.notes
        parts += [answer_table(measured, task, timings), notes]
        changes = difference_table(measured, task, record["parameters"]["seed"])
        groups = group_table(measured, task.score(task.headline))
        parts += [part for part in (changes, groups) if part]
    return "\n\n".join([*parts, *footnotes(section)])


def describe(section: Sequence[Outcome]) -> str:
    """The data, the keypoints, the machine."""
    record = section[0].record
    dataset, parameters = record["dataset"], record["parameters"]
    sizes = sorted(dataset["sizes"].items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} of {size}" for size, count in sizes[:3])
    rest = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
    machines = {_machine(outcome) for outcome in section}
    pairs = max((len(o.pairs) for o in section if o.measured), default=0)
    keypoints = next((o.system for o in section if not o.system.baseline), section[0].system)
    return (
        f"{pairs} pairs of {dataset['images']} images ({shown}{rest}), keypoints: "
        f"{keypoints.selection}, seed {parameters['seed']}. {'; '.join(sorted(machines))}."
    )


def _machine(outcome: Outcome) -> str:
    configuration = outcome.record["configuration"]
    machine, versions = configuration["machine"], configuration["versions"]
    names = ("torch", "onnxruntime", "opencv-python-headless", "poselib")
    packages = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    return f"{machine.get('gpu', machine['cpu'])}, {packages}"


def name_cells(outcome: Outcome) -> list[str]:
    """What stands at the left of every line."""
    system = outcome.system
    model = system.model.upper() if system.baseline else system.model
    return [model + system.matched, system.runtime, system.precision]


def answer_table(measured: Sequence[Outcome], task: type[Task], timings: Sequence[Measured]) -> str:
    """Accuracy, speed and memory of every system."""
    scores = [score for score in task.scores if _has_numbers(score, measured)]
    lines = []
    for outcome in measured:
        values = [score.text(score.value(outcome.pairs)) for score in scores]
        lines.append([*name_cells(outcome), *values, *speed_cells(timing_of(outcome, timings))])
    width, height = measured[0].size
    header = [*HEADER, *(score.name for score in scores), f"ms at {width}x{height}", "MiB"]
    return markdown(header, lines, left=3)


def speed_cells(timing: Measured | None) -> list[str]:
    """Milliseconds and MiB, marked as the tables of timings mark them."""
    if timing is None:
        return [NOT_MEASURED, ""]
    return [milliseconds(timing.compute_ms.p50) + timing.marks("compute_ms"), timing.mib]


def _has_numbers(score: Score, measured: Sequence[Outcome]) -> bool:
    """Whether anything is known of it: PoseLib may have been missing."""
    return not all(np.isnan(score.values(outcome.pairs)).all() for outcome in measured)


def difference_table(measured: Sequence[Outcome], task: type[Task], seed: int) -> str | None:
    """What changes against PyTorch in float32 of the same model, with intervals."""
    scores = [s for s in map(task.score, task.compared) if _has_numbers(s, measured)]
    lines = []
    for outcome in measured:
        reference = reference_of(outcome, measured)
        if reference is None or outcome.system.baseline:
            continue
        cells = []
        for score in scores:
            cells.append(_change_cell(score, outcome.pairs, reference.pairs, seed))
        lines.append([*name_cells(outcome), *cells])
    if not lines:
        return None
    several = any(outcome.system.matched for outcome in measured)
    matched = " and matcher (of that itself: against mutual nearest neighbours)" if several else ""
    title = (
        f"Change against PyTorch FP32 of the same model{matched}, the same pairs; in brackets the "
        "bootstrap interval over the pairs that holds 95 %:"
    )
    table = markdown([*HEADER, *(score.name for score in scores)], lines, left=3)
    return f"{title}\n\n{table}"


def _change_cell(score: Score, pairs: list[dict], reference: list[dict], seed: int) -> str:
    """The change of a score with its interval; a dash where one side was not measured by it."""
    if np.isnan(score.value(pairs)) or np.isnan(score.value(reference)):
        return "-"
    change = paired_difference(score, pairs, reference, seed)
    mean, *interval = map(score.change_text, (change.mean, change.low, change.high))
    return f"{mean} [{', '.join(interval)}]"


def group_table(measured: Sequence[Outcome], score: Score) -> str | None:
    """One score, group by group."""
    groups = list(dict.fromkeys(row["group"] for row in measured[0].pairs))
    if len(groups) < 2:
        return None
    lines = []
    for outcome in measured:
        by_group = [[r for r in outcome.pairs if r["group"] == group] for group in groups]
        lines.append([*name_cells(outcome), *(score.text(score.value(rows)) for rows in by_group)])
    counts = [sum(row["group"] == group for row in measured[0].pairs) for group in groups]
    header = [f"{group} ({count})" for group, count in zip(groups, counts, strict=True)]
    table = markdown([*HEADER, *header], lines, left=3)
    return f"{score.name} by kind of pair (how many):\n\n{table}"


def footnotes(section: Sequence[Outcome]) -> list[str]:
    """Why which systems have no numbers."""
    absent = [outcome for outcome in section if not outcome.measured]
    reasons = [f"- {o.system}, {o.record['status']}: {o.record['reason']}" for o in absent]
    return ["\n".join(["Not in the table:", "", *reasons])] if reasons else []


MARKERS = {"fp32": "o", "fp16": "s", "": "x"}
LINES = {"fp32": "-", "fp16": "--", "": ":"}
WIDTHS = {"mutual": 1.5, "ratio": 0.75, "lightglue": 3.0}


def draw_section(
    section: Sequence[Outcome], timings: Sequence[Measured], folder: Path, name: str
) -> list[Path]:
    """Every plot that a section has the data for, in files of this name; the paths written."""
    measured = [outcome for outcome in section if outcome.measured]
    if not measured:
        return []
    task = measured[0].task
    title = f"{task.name} {measured[0].record['dataset']['name']}"
    timed = [(o, t) for o in measured if (t := timing_of(o, timings))]
    figures = {}
    if timed:
        figures["accuracy and speed"] = draw_pareto(timed, task, title)
    if task.curve:
        figures["accuracy"] = draw_curves(measured, task, title)
    return [save_figure(figure, folder, f"{name} {what}") for what, figure in figures.items()]


def draw_pareto(timed: Sequence[tuple[Outcome, Measured]], task: type[Task], title: str) -> Figure:
    """The headline score against milliseconds; a line through those that no other one beats."""
    figure, axis = _figure()
    score = task.score(task.headline)
    points = []
    for outcome, timing in timed:
        system = outcome.system
        points.append((timing.compute_ms.p50, score.scale * score.value(outcome.pairs)))
        marker, colour = MARKERS[system.precision], model_colour(system.model)
        axis.plot(*points[-1], marker, color=colour, label=f"{system.model} {system.precision}")
        offset = (0, -12 if system.precision == "fp32" else 6)  # points; both often lie together
        text = {"textcoords": "offset points", "ha": "center", "fontsize": "x-small"}
        axis.annotate(system.runtime, points[-1], offset, **text)
    axis.plot(*zip(*frontier(points), strict=True), "-", color="0.6", linewidth=1, zorder=0)
    axis.set_xscale("log")
    axis.margins(0.12)  # room for the names
    plain_ticks(axis.xaxis)
    axis.set_xlabel("ms per image (median, compute)")
    axis.set_ylabel(score.name + (", %" if score.percent else ""))
    return _finished(figure, axis, title)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, value) that no cheaper one reaches or exceeds, the cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def draw_curves(measured: Sequence[Outcome], task: type[Task], title: str) -> Figure:
    """A score over its thresholds, a line per system."""
    figure, axis = _figure()
    thresholds = [float(score.name.partition("@")[2]) for score in task.curve]
    for outcome in measured:
        values = [score.scale * score.value(outcome.pairs) for score in task.curve]
        system = outcome.system
        line = LINES[system.precision]
        width = WIDTHS[system.matcher]
        style = {"color": model_colour(system.model), "linewidth": width}
        axis.plot(thresholds, values, line, **style, label=str(system))
    axis.set_xlabel(f"threshold, {task.curve_unit}")
    first = task.curve[0]
    axis.set_ylabel(first.name.partition("@")[0] + (", %" if first.percent else ""))
    return _finished(figure, axis, title)


def model_colour(model: str) -> tuple[float, float, float]:
    """The colour of a model, the same in every plot."""
    models, colours = [*CONFIGS, *DETECTORS], matplotlib.colormaps["tab10"].colors
    return colours[models.index(model) % len(colours)] if model in models else (0.5, 0.5, 0.5)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axis: Axes, title: str) -> Figure:
    axis.grid(alpha=0.3)
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize="x-small"
    )
    figure.suptitle(title, fontsize="medium")
    return figure


STYLE = """
body { font-family: sans-serif; margin: 2em; background: #fff; color: #222; }
figure { display: inline-block; margin: 0 1em 1em 0; vertical-align: top; max-width: 48em; }
img { width: 100%; }
figcaption { font-size: small; }
"""
Draw = Callable[[Outcome, dict], np.ndarray]


def worst_rows(outcome: Outcome, count: int) -> list[dict]:
    """The pairs of one system that went worst, the worst first."""
    badness = outcome.task.badness
    return sorted(outcome.pairs, key=lambda row: (-badness(row), row["name"]))[:count]


def remove_page(folder: Path) -> None:
    """Remove the page of the worst pairs, and its pictures, from `folder`."""
    shutil.rmtree(folder / "worst", ignore_errors=True)
    (folder / "worst.html").unlink(missing_ok=True)


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
    write_text(page, "\n".join(parts) + "\n")
    return page


def caption_of(row: dict, outcome: Outcome, reference: Outcome | None) -> str:
    """The pair, how bad it is, and how bad it is with PyTorch in float32."""
    task = outcome.task
    text = f"{row['name']}: {task.badness_text.format(task.badness(row))}"
    same = [other for other in reference.pairs if other["name"] == row["name"]] if reference else []
    return text + "".join(f"; {reference.system}: {task.badness(other):.1f}" for other in same)


def report_text(outcomes: Sequence[Outcome], timings: Sequence[Measured]) -> str:
    """The tables of all sections, as Markdown; the same records give the same bytes."""
    return "\n\n".join(section_text(own, timings) for own in sections(outcomes)) + "\n"


def write_report(
    outcomes: Sequence[Outcome], timings: Sequence[Measured], folder: Path
) -> list[Path]:
    """Write `evaluation.md` and the plots into `folder`; the paths written."""
    tables = folder / "evaluation.md"
    write_text(tables, report_text(outcomes, timings))
    names, written = Counter(), [tables]
    for own in sections(outcomes):
        name = f"{own[0].task.name} {own[0].record['dataset']['name']}"
        names[name] += 1
        numbered = name if names[name] == 1 else f"{name} {names[name]}"
        written += draw_section(own, timings, folder, numbered)
    return written
