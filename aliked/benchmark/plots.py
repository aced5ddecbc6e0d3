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
from aliked.benchmark.results import Result
from aliked.configs import CONFIGS
from aliked.files import whole_file

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
    cases = _cases(results)
    for name, own in cases.items():
        title = f"{device}, {name}"
        figures.append((f"bars {name}", draw_bars(own, colours, title)))
        figures.append((f"speed and precision {name}", draw_scatter(own, colours, title)))
    if len(cases) > 1:
        figures.append(("latency", draw_latency(results, colours, device)))
    return figures


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
    _finish(figure, axes, f"{title}\nmedian, whiskers from minimum to p90; faded: not ranked")
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


def draw_scatter(results: list[Result], colours: Colours, title: str) -> Figure:
    """Median compute time against keypoints in common with the reference, a panel per model."""
    models = _models(results)
    figure, axes = _figure(1, len(models), height=3.6)
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
    axes.flat[0].set_ylabel("keypoints in common with\nPyTorch FP32 on the CPU, %")
    _finish(figure, axes, f"{title}\nfaded: not ranked")
    return figure


def draw_latency(results: list[Result], colours: Colours, title: str) -> Figure:
    """Median compute time against K (smallest image) and against image size (smallest K)."""
    models = _models(results)
    smallest = min(map(_pixels, results))
    least_k = min(r.row.top_k for r in results)
    size = next(_size(r) for r in results if _pixels(r) == smallest)
    figure, axes = _figure(len(models), 2, height=2.6)
    for (against_k, against_size), model in zip(axes, models, strict=True):
        own = [r for r in results if r.row.model == model]
        of_one_size = [r for r in own if _pixels(r) == smallest]
        _draw_lines(against_k, of_one_size, lambda r: r.row.top_k, lambda r: r.row.top_k, colours)
        of_one_k = [r for r in own if r.row.top_k == least_k]
        _draw_lines(against_size, of_one_k, _pixels, _size, colours)
        against_k.set_ylabel(f"{model}\nms per image (median)")
    axes[-1][0].set_xlabel(f"K, at {size}")
    axes[-1][1].set_xlabel(f"image size, at K {least_k}")
    _finish(figure, axes, title)
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


def _figure(rows: int, columns: int, height: float) -> tuple:
    figure = Figure(figsize=(max(7, 3.4 * columns), height * rows + 1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Figure, axes, title: str) -> None:
    """One legend for all panels, and the title."""
    entries = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / 2.2)),
        fontsize="small",
    )
    figure.suptitle(title, fontsize="medium")


def save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Write a PNG named after what it shows; its path."""
    path = folder / (re.sub(r"[^\w.]+", "_", name).strip("_").lower() + ".png")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
    return path
