"""Plots of measured records, and the folder of a report, which has the tables as well."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from aliked.backends import Spec
from aliked.configs import CONFIGS
from aliked.files import whole_file, write_text
from benchmark.records import AnyRecord, Measured, runtime_order, sections
from benchmark.report import milliseconds, report_text
from benchmark.rows import Row

MARKERS = {"fp32": "o", "tf32": "D", "fp16": "s"}
LINES = {"fp32": "-", "tf32": "-.", "fp16": "--"}
FADED = 0.35  # opacity of what is not ranked
# One colour per backend, in every plot: those that are usually drawn together are far apart.
COLOURS = {
    "pytorch": "#1f77b4",
    "pytorch-amp": "#6fb7e9",
    "pytorch-compile": "#ff7f0e",
    "pytorch-cudagraph": "#2ca02c",
    "aotinductor": "#8c564b",
    "onnxruntime": "#9467bd",
    "onnxruntime-cpu": "#9467bd",
    "onnxruntime-cuda": "#9467bd",
    "onnxruntime-tensorrt": "#e377c2",
    "tensorrt": "#17becf",
    "tensorrt-cudagraph": "#0b7285",
    "tensorrt-pycuda": "#9edae5",
    "tensorrt-lean": "#5c7cfa",
    "tensorrt-rtx": "#7cb342",
    "tensorrt-rtx-cudagraph": "#33691e",
    "onnxruntime-tensorrt-rtx": "#f06292",
    "torch-tensorrt": "#bcbd22",
    "fused": "#d62728",
}
OTHERS = "#7f7f7f"  # backends that have no colour of their own yet
MARK = "draw_report.py: timings"  # in the metadata of its pictures


def write_report(records: list[AnyRecord], folder: Path) -> list[Path]:
    """Write `tables.md` and the plots into `folder`; the paths written."""
    tables = folder / "tables.md"
    write_text(tables, report_text(records))
    return [tables, *draw_all(records, folder)]


def draw_all(records: list[AnyRecord], folder: Path) -> list[Path]:
    """Draw every plot that the records have the data for, section by section; the paths written.

    GPU and CPU are drawn apart: on one axis the slower would leave nothing of the other. Where a
    device has several sections, the plots of all but the first are numbered.
    """
    written, drawn = [], Counter()
    for section, (kind, name) in itertools.product(
        sections(records), (("cuda", "gpu"), ("cpu", "cpu"))
    ):
        own = [r for r in section if r.measured and r.row.device == kind and _is_drawn(r.row)]
        if own:
            device = str(own[0].configuration.machine[name])
            drawn[device] += 1
            if drawn[device] > 1:
                device += f" ({drawn[device]})"
            written += [
                save_figure(figure, folder, f"{device} {what}")
                for what, figure in draw(own, device)
            ]
    remove_older(folder, written)
    return written


def _is_drawn(row: Row) -> bool:
    """Single images to features; of batches and of LightGlue there are tables."""
    return row.batch == 1 and row.graph == "extractor"


def draw(records: list[Measured], device: str) -> list[tuple[str, Figure]]:
    """Draw every plot of the records on one device, each with its name; none of a single dot."""
    figures = []
    for name, own in _cases(records).items():
        if len(own) > 1:
            title = f"{device}, {name}"
            figures.append((f"bars {name}", draw_bars(own, title)))
            figures.append((f"speed and precision {name}", draw_scatter(own, title)))
    latency = draw_latency(records, device)
    return [*figures, ("latency", latency)] if latency else figures


def colour_of(row: Row) -> tuple:
    """Return the colour of a runtime: its backend's, lighter for another mode of compiling."""
    colour = to_rgb(COLOURS.get(row.backend, OTHERS))
    if row.compile_mode in (None, Spec.compile_mode):
        return colour
    return tuple((1 + value) / 2 for value in colour)


def in_order(records: list[Measured]) -> list[str]:
    """Return the names of the runtimes, in the order of the backends."""
    return list(dict.fromkeys(r.runtime for r in sorted(records, key=_runtime_order)))


def _runtime_order(record: Measured) -> tuple[int, str]:
    return runtime_order(record.row)


def draw_bars(records: list[Measured], title: str) -> Figure:
    """A bar per runtime and model: median of the compute clock, whiskers from minimum to p90."""
    precisions = [p for p in MARKERS if any(r.row.precision == p for r in records)]
    models = _models(records)
    figure, axes = _figure(len(precisions), 1, height=3.2)
    for axis, precision in zip(axes.flat, precisions, strict=True):
        chosen = [r for r in records if r.row.precision == precision]
        runtimes = in_order(chosen)
        width = 0.8 / len(runtimes)
        for record in chosen:
            offset = runtimes.index(record.runtime) - (len(runtimes) - 1) / 2
            place = models.index(record.row.model) + offset * width
            _draw_bar(axis, record, place, width)
        axis.set_xticks(range(len(models)), models)
        axis.set_ylabel(f"{precision.upper()}: ms per image")
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.2)  # room for the numbers
    title = f"{title}\nmedian, whiskers from minimum to p90; faded: not ranked"
    _finish(figure, axes, in_order(records), title)
    return figure


def _draw_bar(axis: Axes, record: Measured, place: float, width: float) -> None:
    clock = record.compute_ms
    axis.bar(
        place,
        clock.p50,
        width,
        yerr=[[clock.p50 - clock.min], [clock.p90 - clock.p50]],
        capsize=2,
        color=colour_of(record.row),
        alpha=_opacity(record),
        label=record.runtime,
    )
    axis.annotate(
        milliseconds(clock.p50),
        (place, clock.p90),
        (0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation="vertical",
        fontsize="x-small",
    )


def draw_scatter(records: list[Measured], title: str) -> Figure:
    """Median compute time against keypoints in common with the reference, a panel per model."""
    models = _models(records)
    figure, axes = _figure(1, len(models), height=3.6, sharey=True)
    for axis, model in zip(axes.flat, models, strict=True):
        for record in (r for r in records if r.row.model == model):
            axis.plot(
                record.compute_ms.p50,
                100 * record.parity.keypoints_in_common,
                MARKERS[record.row.precision],
                color=colour_of(record.row),
                alpha=_opacity(record),
                label=f"{record.runtime} {record.row.precision}",
                clip_on=False,  # whole dots at 100 %
                zorder=3,
            )
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.set_title(model, fontsize="medium")
        axis.set_xlabel("ms per image (median)")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylim(top=100)  # none has more than all
    axes.flat[0].set_ylabel("keypoints in common with\nPyTorch FP32 on the CPU, %")
    _finish(figure, axes, in_order(records), f"{title}\nfaded: not ranked")
    return figure


def draw_latency(records: list[Measured], title: str) -> Figure | None:
    """Median compute time against K (smallest image) and against image size (smallest K).

    What does not vary has no column, a model of which nothing does no row; None where there is
    nothing to draw.
    """
    smallest = min(records, key=_pixels)
    least_k = min(r.row.top_k for r in records)
    of_one_size = [r for r in records if _pixels(r) == _pixels(smallest)]
    of_one_k = [r for r in records if r.row.top_k == least_k]
    columns = [
        (
            _lines(of_one_size, _top_k),
            _top_k,
            _top_k,
            f"keypoints K, at {smallest.row.size} pixels",
        ),
        (_lines(of_one_k, _pixels), _pixels, _size, f"image size in pixels, at K {least_k}"),
    ]
    columns = [column for column in columns if column[0]]
    if not columns:
        return None
    drawn = [line[0] for column in columns for line in column[0]]
    models = _models(drawn)
    figure, axes = _figure(len(models), len(columns), height=2.6)
    for panels, model in zip(axes, models, strict=True):
        for axis, (lines, x, text, label) in zip(panels, columns, strict=True):
            _draw_lines(axis, [line for line in lines if line[0].row.model == model], x, text)
            axis.set_xlabel(label if model == models[-1] else "")
        panels[0].set_ylabel(f"{model}\nms per image (median)")
    _finish(figure, axes, in_order(drawn), title)
    return figure


def _lines(records: list[Measured], x: Callable) -> list[list[Measured]]:
    """Records that differ in `x` only, in its order: a line each, of two dots at least."""

    def line(record: Measured) -> tuple:
        row = record.row
        return row.model, *runtime_order(row), list(LINES).index(row.precision)

    groups = itertools.groupby(sorted(records, key=lambda r: (*line(r), x(r))), line)
    lines = [list(group) for _, group in groups]
    return [own for own in lines if len({x(r) for r in own}) > 1]


def _draw_lines(axis: Axes, lines: list[list[Measured]], x: Callable, text: Callable) -> None:
    """A line per runtime and precision over `x`, whose ticks say `text`."""
    if not lines:
        axis.set(xticks=[], yticks=[])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=OTHERS)
        return
    for own in lines:
        row = own[0].row
        axis.plot(
            [x(r) for r in own],
            [r.compute_ms.p50 for r in own],
            MARKERS[row.precision] + LINES[row.precision],
            color=colour_of(row),
            alpha=min(map(_opacity, own)),
            label=f"{row.runtime} {row.precision}",
        )
    ticks = {x(r): text(r) for own in lines for r in own}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3)


def _cases(records: list[Measured]) -> dict[str, list[Measured]]:
    """The records of each images and K, by these in words."""
    cases: dict[str, list[Measured]] = {}
    for record in records:
        cases.setdefault(f"{record.row.images}, K {record.row.selection}", []).append(record)
    return cases


def _models(records: list[Measured]) -> list[str]:
    return [model for model in CONFIGS if any(r.row.model == model for r in records)]


def _top_k(record: Measured) -> int:
    return record.row.top_k


def _pixels(record: Measured) -> int:
    return record.row.width * record.row.height


def _size(record: Measured) -> str:
    return record.row.size


def _opacity(record: Measured) -> float:
    return 1.0 if record.ranked else FADED


def plain_ticks(axis) -> None:
    """1, 2, 5, 10 and so on along a logarithmic axis, as plain numbers; a short one has more."""
    low, high = axis.get_data_interval()
    short = low > 0 and high < 5 * low
    if low == high:  # a single dot: by itself it would get more than a decade
        getattr(axis.axes, f"set_{axis.axis_name}lim")(low / 2, 2 * high)
    axis.set_major_locator(LogLocator(subs=range(1, 10) if short else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(rows: int, columns: int, height: float, sharey: bool = False) -> tuple:
    figure = Figure(figsize=(max(7, 3.4 * columns), height * rows + 1), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _finish(figure: Figure, axes, order: list[str], title: str) -> None:
    """One legend for all panels in the order of the runtimes, and the title."""
    entries = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in entries or _alpha(handle) > _alpha(entries[label]):
                entries[label] = handle
    names = [name + suffix for name in order for suffix in ("", *(f" {p}" for p in MARKERS))]
    labels = sorted(entries, key=names.index)
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
    """Write a PNG named after what it shows, with what draws it inside; its path."""
    path = folder / (re.sub(r"[^\w.]+", "_", name).strip("_").lower() + ".png")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, metadata={"Source": MARK})
    return path


def remove_older(folder: Path, written: Iterable[Path]) -> None:
    """Remove the pictures of an earlier report from `folder`; other pictures stay."""
    for path in set(folder.glob("*.png")) - set(written):
        with open(path, "rb") as file:
            if MARK.encode() in file.read(1000):
                path.unlink()
