"""Plots of measured results."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from aliked.backends import BACKENDS
from aliked.configs import CONFIGS
from aliked.files import whole_file
from benchmark.records import Result
from benchmark.report import milliseconds

Colours = dict[str, tuple]  # by runtime, in the order of the legend

MARKERS = {"fp32": "o", "fp16": "s"}
LINES = {"fp32": "-", "fp16": "--"}
FADED = 0.35  # opacity of what is not ranked


def draw_all(results: list[Result], folder: Path) -> list[Path]:
    """Every plot that the results of one machine have the data for; the paths written.

    GPU and CPU are drawn apart: on one axis the slower would leave nothing of the other.
    """
    written = []
    for kind, name in (("cuda", "gpu"), ("cpu", "cpu")):
        own = [r for r in results if r.measured and r.row.device == kind and r.row.batch == 1]
        if own:
            device = own[0].record["configuration"]["machine"][name]
            written += [
                save_figure(figure, folder, f"{device} {what}")
                for what, figure in draw(own, device)
            ]
    return written


def draw(results: list[Result], device: str) -> list[tuple[str, Figure]]:
    """Every plot of the results on one device, with its name."""
    colours = runtime_colours(results)
    figures = []
    for name, own in _cases(results).items():
        title = f"{device}, {name}"
        figures.append((f"bars {name}", draw_bars(own, colours, title)))
        figures.append((f"speed and precision {name}", draw_scatter(own, colours, title)))
    latency = draw_latency(results, colours, device)
    return [*figures, ("latency", latency)] if latency else figures


def runtime_colours(results: list[Result]) -> Colours:
    """A colour for each runtime, in the order of the backends."""
    order = {name: place for place, name in enumerate(BACKENDS)}
    runtimes = {r.row.runtime: order.get(r.row.backend, len(order)) for r in results}
    names = sorted(runtimes, key=lambda name: (runtimes[name], name))
    return dict(zip(names, itertools.cycle(matplotlib.colormaps["tab10"].colors), strict=False))


def draw_bars(results: list[Result], colours: Colours, title: str) -> Figure:
    """A bar per runtime and model: median of the compute clock, whiskers from minimum to p90."""
    precisions = [p for p in MARKERS if any(r.row.precision == p for r in results)]
    models = _models(results)
    figure, axes = _figure(len(precisions), 1, height=3.2)
    for axis, precision in zip(axes.flat, precisions, strict=True):
        chosen = [r for r in results if r.row.precision == precision]
        runtimes = [name for name in colours if any(r.row.runtime == name for r in chosen)]
        width = 0.8 / len(runtimes)
        for result in chosen:
            offset = runtimes.index(result.row.runtime) - (len(runtimes) - 1) / 2
            place = models.index(result.row.model) + offset * width
            _draw_bar(axis, result, place, width, colours)
        axis.set_xticks(range(len(models)), models)
        axis.set_ylabel(f"{precision.upper()}: ms per image")
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.2)  # room for the numbers
    title = f"{title}\nmedian, whiskers from minimum to p90; faded: not ranked"
    _finish(figure, axes, colours, title)
    return figure


def _draw_bar(axis: Axes, result: Result, place: float, width: float, colours: Colours) -> None:
    clock = result.record["compute_ms"]
    axis.bar(
        place,
        clock["p50"],
        width,
        yerr=[[clock["p50"] - clock["min"]], [clock["p90"] - clock["p50"]]],
        capsize=2,
        color=colours[result.row.runtime],
        alpha=_opacity(result),
        label=result.row.runtime,
    )
    axis.annotate(
        milliseconds(clock["p50"]),
        (place, clock["p90"]),
        (0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation="vertical",
        fontsize="x-small",
    )


def draw_scatter(results: list[Result], colours: Colours, title: str) -> Figure:
    """Median compute time against keypoints in common with the reference, a panel per model."""
    models = _models(results)
    figure, axes = _figure(1, len(models), height=3.6, sharey=True)
    for axis, model in zip(axes.flat, models, strict=True):
        for result in (r for r in results if r.row.model == model):
            axis.plot(
                result.compute_ms,
                100 * result.record["parity"]["keypoints_in_common"],
                MARKERS[result.row.precision],
                color=colours[result.row.runtime],
                alpha=_opacity(result),
                label=f"{result.row.runtime} {result.row.precision}",
            )
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_title(model, fontsize="medium")
        axis.set_xlabel("ms per image (median)")
        axis.grid(alpha=0.3)
    bottom, top = axes.flat[0].get_ylim()
    axes.flat[0].set_ylim(bottom, min(top, 100 + 0.05 * (100 - bottom)))  # none has more than all
    axes.flat[0].set_ylabel("keypoints in common with\nPyTorch FP32 on the CPU, %")
    _finish(figure, axes, colours, f"{title}\nfaded: not ranked")
    return figure


def draw_latency(results: list[Result], colours: Colours, title: str) -> Figure | None:
    """Median compute time against K (smallest image) and against image size (smallest K).

    What does not vary has no column; None where neither does.
    """
    models = _models(results)
    smallest = min(results, key=_pixels)
    least_k = min(r.row.top_k for r in results)
    of_one_size = [r for r in results if _pixels(r) == _pixels(smallest)]
    of_one_k = [r for r in results if r.row.top_k == least_k]
    columns = [
        (of_one_size, _top_k, _top_k, f"K, at {_size(smallest)}"),
        (of_one_k, _pixels, _size, f"image size, at K {least_k}"),
    ]
    columns = [column for column in columns if _several(column[0], column[1])]
    if not columns:
        return None
    figure, axes = _figure(len(models), len(columns), height=2.6)
    for row, model in zip(axes, models, strict=True):
        for axis, (chosen, x, text, label) in zip(row, columns, strict=True):
            _draw_lines(axis, [r for r in chosen if r.row.model == model], x, text, colours)
            axis.set_xlabel(label if model == models[-1] else "")
        row[0].set_ylabel(f"{model}\nms per image (median)")
    _finish(figure, axes, colours, title)
    return figure


def _draw_lines(
    axis: Axes, results: list[Result], x: Callable, text: Callable, colours: Colours
) -> None:
    """A line per runtime and precision over `x`, whose ticks say `text`."""

    def line(result: Result) -> tuple[int, int]:
        return list(colours).index(result.row.runtime), list(LINES).index(result.row.precision)

    for _, group in itertools.groupby(sorted(results, key=line), line):
        found = sorted(group, key=x)
        precision = found[0].row.precision
        axis.plot(
            [x(r) for r in found],
            [r.compute_ms for r in found],
            MARKERS[precision] + LINES[precision],
            color=colours[found[0].row.runtime],
            alpha=min(map(_opacity, found)),
            label=f"{found[0].row.runtime} {precision}",
        )
    ticks = {x(r): text(r) for r in results}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3)


def _cases(results: list[Result]) -> dict[str, list[Result]]:
    """Results by images and K."""
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(f"{result.row.images}, K {result.row.selection}", []).append(result)
    return cases


def _models(results: list[Result]) -> list[str]:
    return [model for model in CONFIGS if any(r.row.model == model for r in results)]


def _several(results: list[Result], x: Callable) -> bool:
    return len({x(r) for r in results}) > 1


def _top_k(result: Result) -> int:
    return result.row.top_k


def _pixels(result: Result) -> int:
    return result.row.width * result.row.height


def _size(result: Result) -> str:
    return f"{result.row.width}x{result.row.height}"


def _opacity(result: Result) -> float:
    return 1.0 if result.ranked else FADED


def plain_ticks(axis) -> None:
    """1, 2, 5, 10 and so on along a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(rows: int, columns: int, height: float, sharey: bool = False) -> tuple:
    figure = Figure(figsize=(max(7, 3.4 * columns), height * rows + 1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _finish(figure: Figure, axes, colours: Colours, title: str) -> None:
    """One legend for all panels in the order of the runtimes, and the title."""
    entries = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in entries or _alpha(handle) > _alpha(entries[label]):
                entries[label] = handle
    order = [name + suffix for name in colours for suffix in ("", " fp32", " fp16")]
    labels = sorted(entries, key=order.index)
    figure.legend(
        [entries[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / 2.2)),
        fontsize="small",
    )
    figure.suptitle(title, fontsize="medium")


def _alpha(handle) -> float:
    """Opacity of a line, or of a bar in its container."""
    return getattr(handle, "patches", [handle])[0].get_alpha()


def save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write a PNG named after what it shows; its path."""
    path = folder / (re.sub(r"[^\w.]+", "_", name).strip("_").lower() + ".png")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
    return path
