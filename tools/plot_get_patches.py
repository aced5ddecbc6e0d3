"""Tables and a plot of what `tools.bench_get_patches` measured, per device.

usage: python -m tools.plot_get_patches results/get_patches/*.jsonl
"""

import argparse
import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file
from benchmark.plots import plain_ticks, save_figure
from benchmark.report import markdown

COLOURS = {"plain": "tab:orange", "compiled": "tab:blue"}
LINES = {"fp32": "o-", "fp16": "s--"}


def read(paths: list[Path]) -> list[dict]:
    """The records of all files; `InputError` for a file that holds something else."""
    try:
        records = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        records.sort(key=lambda record: (record["device"], record["part"] != "model"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"cannot read these records ({error!r}); give files of tools.bench_get_patches"
        ) from error
    return records


def groups(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Records by the values of `names`, in order of appearance."""
    found: dict[tuple, list[dict]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in names), []).append(record)
    return found


def cell(record: dict) -> str:
    """Both medians and how many times faster the compiled form is."""
    plain, compiled = (record[f"{form}_us"]["p50"] for form in COLOURS)
    wrong = "" if record["equal"] else " DIFFERENT PATCHES"
    return f"{microseconds(plain)} / {microseconds(compiled)} = {plain / compiled:.1f}{wrong}"


def microseconds(value: float) -> str:
    """Three digits or so."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def alone_table(records: list[dict]) -> str:
    """A row per type, channels and size; a column per number of keypoints."""
    counts = sorted({record["keypoints"] for record in records})
    rows = []
    for case, own in groups(records, "precision", "channels", "size").items():
        by_count = {record["keypoints"]: cell(record) for record in own}
        precision, channels, size = case
        rows.append(
            [precision, str(channels), f"{size}x{size}", *(by_count.get(k, "") for k in counts)]
        )
    return markdown(["type", "channels", "patch", *(f"K = {k}" for k in counts)], rows, left=3)


def model_table(records: list[dict]) -> str:
    """A row per model, image and precision."""
    header = ["model", "image", "precision", "K", "plain ms", "compiled ms", "saved ms (10-90 %)"]
    rows = []
    for r in records:
        plain, compiled = (r[f"{form}_us"]["p50"] / 1000 for form in COLOURS)
        low, saved, high = (r["saved_us"][name] / 1000 for name in ("p10", "p50", "p90"))
        times = [f"{plain:.3f}", f"{compiled:.3f}", f"{saved:.3f} ({low:.3f} to {high:.3f})"]
        rows.append([r["model"], r["map"], r["precision"], str(r["keypoints"]), *times])
    return markdown(header, rows, left=3)


def device_text(records: list[dict]) -> str:
    """All tables of one device."""
    first = records[0]
    parts = [f"## {first['device']}, PyTorch {first['torch']}, {first['cpu_threads']} CPU threads"]
    alone = [record for record in records if record["part"] == "alone"]
    model = [record for record in records if record["part"] == "model"]
    if model:
        parts += ["Whole forward pass, eager, median.", model_table(model)]
    for (clock, name, layout), own in groups(alone, "clock", "map", "layout").items():
        title = f"{clock}, {name}, {layout}: microseconds, plain / compiled = ratio"
        parts += [f"{title}.", alone_table(own)]
    return "\n\n".join(parts)


def draw(records: list[dict]) -> Figure:
    """Median time over K: a row per clock and layout, a column per channels and size.

    Of the smallest map.
    """
    width, height = min(
        (tuple(map(int, record["map"].split("x"))) for record in records),
        key=lambda size: size[0] * size[1],
    )
    records = [record for record in records if record["map"] == f"{width}x{height}"]
    rows = groups(records, "clock", "layout")
    columns = groups(records, "channels", "size")
    figure = Figure(figsize=(2.7 * len(columns) + 1, 2.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for row, (clock, layout) in enumerate(rows):
        for column, (channels, size) in enumerate(columns):
            axis, case = axes[row][column], (clock, layout, channels, size)
            draw_lines(axis, groups(records, "clock", "layout", "channels", "size")[case])
            if row == 0:
                axis.set_title(f"{channels} channels, {size}x{size}", fontsize="medium")
        axes[row][0].set_ylabel(f"{clock}, {layout}\nmicroseconds")
    for axis in axes[-1]:
        axis.set_xlabel("K")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    first = records[0]
    figure.suptitle(
        f"get_patches on {first['device']}, PyTorch {first['torch']}, {width}x{height} map\n"
        "median, bands from the 10th to the 90th percentile",
        fontsize="medium",
    )
    return figure


def draw_lines(axis: Axes, records: list[dict]) -> None:
    """A line per form and precision over K."""
    for (precision,), own in groups(records, "precision").items():
        for form, colour in COLOURS.items():
            counts = [record["keypoints"] for record in own]
            low, middle, high = (
                [record[f"{form}_us"][name] for record in own] for name in ("p10", "p50", "p90")
            )
            axis.plot(counts, middle, LINES[precision], color=colour, label=f"{form} {precision}")
            axis.fill_between(counts, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.xaxis.set_minor_formatter(NullFormatter())
    plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tools.plot_get_patches", description=__doc__)
    p.add_argument("records", type=Path, nargs="+", metavar="FILE", help="JSONL files")
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for tables.md and the plots (default: report/ beside the first file)",
    )
    return p


def main(args: argparse.Namespace) -> None:
    """Print the tables, write them and the plots."""
    folder = args.output or args.records[0].parent / "report"
    devices = groups(read(args.records), "device")
    text = "\n\n".join(map(device_text, devices.values())) + "\n"
    print(text)
    with whole_file(folder / "tables.md") as partial:
        partial.write_text(text)
    for (device,), records in devices.items():
        alone = [record for record in records if record["part"] == "alone"]
        save_figure(draw(alone), folder, f"get_patches {device}")


if __name__ == "__main__":
    cli.run(main, parser())
