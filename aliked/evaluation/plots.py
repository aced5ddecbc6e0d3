"""Plots of evaluations: accuracy against time, and accuracy over its threshold."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aliked.benchmark.plots import plain_ticks, save_figure
from aliked.benchmark.results import Result
from aliked.evaluation.records import Outcome
from aliked.evaluation.scores import Kind, kind_of
from aliked.evaluation.speed import timing_of

MARKERS = {"fp32": "o", "fp16": "s", "": "x"}
LINES = {"fp32": "-", "fp16": "--", "": ":"}


def draw_section(
    section: Sequence[Outcome], timings: Sequence[Result], folder: Path, name: str
) -> list[Path]:
    """Every plot that a section has the data for, in files of this name; the paths written."""
    measured = [outcome for outcome in section if outcome.measured]
    if not measured:
        return []
    kind = kind_of(measured[0].record["task"])
    title = f"{measured[0].record['task']} {measured[0].record['dataset']['name']}"
    timed = [(o, t) for o in measured if (t := timing_of(o, timings))]
    figures = {}
    if timed:
        figures["accuracy and speed"] = draw_pareto(timed, kind, title)
    if kind.curve:
        figures["accuracy"] = draw_curves(measured, kind, title)
    return [save_figure(figure, folder, f"{name} {what}") for what, figure in figures.items()]


def draw_pareto(timed: Sequence[tuple[Outcome, Result]], kind: Kind, title: str) -> Figure:
    """The headline score against milliseconds; a line through those that no other one beats."""
    figure, axis = _figure()
    score = kind.score(kind.headline)
    points = []
    colours = model_colours(outcome for outcome, _ in timed)
    for outcome, timing in timed:
        system = outcome.system
        points.append((timing.compute_ms, score.scale * score.value(outcome.pairs)))
        marker, colour = MARKERS[system.precision], colours[system.model]
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
    """Of (cost, value) those that no cheaper one reaches or exceeds, the cheapest first."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    return best


def draw_curves(measured: Sequence[Outcome], kind: Kind, title: str) -> Figure:
    """A score over its thresholds, a line per system."""
    figure, axis = _figure()
    thresholds = [float(score.name.partition("@")[2]) for score in kind.curve]
    colours = model_colours(measured)
    for outcome in measured:
        values = [score.scale * score.value(outcome.pairs) for score in kind.curve]
        system = outcome.system
        line = LINES[system.precision]
        axis.plot(thresholds, values, line, color=colours[system.model], label=str(system))
    axis.set_xlabel("threshold")
    first = kind.curve[0]
    axis.set_ylabel(first.name.partition("@")[0] + (", %" if first.percent else ""))
    return _finished(figure, axis, title)


def model_colours(outcomes: Iterable[Outcome]) -> dict[str, tuple]:
    """A colour for each model, so that its runtimes and precisions are seen together."""
    models = dict.fromkeys(outcome.system.model for outcome in outcomes)
    return dict(zip(models, itertools.cycle(matplotlib.colormaps["tab10"].colors), strict=False))


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
