"""Draw the time of every fused kernel beside what the card's full rates would allow.

The latter is the larger of two times: all arguments and results of a kernel once at the rate of a
copy, and its arithmetic at the rate of a large half-precision product, both as measured on the same
card. It is a scale and no bound: maps may still be in the cache, and sampling reads only parts.
"""

import argparse
import itertools
import json
import math
from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file

ACROSS = 2  # panels side by side
NUMBER = {"va": "center", "fontsize": 8}
# The maps of operators that run more than once, in their order.
MAP_SIZES = {"deform": ("1/8", "1/32"), "deform_level": ("1/8", "1/32")}


def full_rate_us(record: dict, ceiling: dict) -> float:
    """Time of a kernel's bytes or arithmetic at the card's rates, microseconds."""
    moving = record["bytes"] / ceiling["bytes_per_s"]
    return 1e6 * max(moving, record["flops"] / ceiling["flops_per_s"])


def read(path: Path) -> tuple[list[dict], dict]:
    """The records of a file, and the first of its ceilings; `InputError` for any other file."""
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        ceilings = [record for record in records if record["operator"] == "ceiling"]
        return [record for record in records if record not in ceilings], ceilings[0]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"cannot read {path} ({error!r}); give a file that tools.bench_fused wrote"
        ) from error


def cases_of(records: list[dict], batch: int) -> list[list[dict]]:
    """The timed operators of every model and image size, in the order of the file."""
    timed = [record for record in records if "us" in record and record["shape"][0] == batch]

    def case(record: dict) -> tuple:
        return record["model"], record["precision"], tuple(record["shape"])

    return [list(group) for _, group in itertools.groupby(timed, case)]


def labels(operators: list[dict]) -> list[str]:
    """The operators' names; those that run at several sizes, with the size of the map."""
    names, seen = [], Counter()
    for operator in (record["operator"] for record in operators):
        sizes = MAP_SIZES.get(operator, ())
        names.append(f"{operator} {sizes[seen[operator]]}" if sizes else operator)
        seen[operator] += 1
    return names


def title(whole: dict, full_rate: float) -> str:
    """What was timed, and the whole call beside the sum over its kernels at full rate."""
    batch, height, width = whole["shape"]
    images = f"{width}x{height}" + (f", batch {batch}" if batch > 1 else "")
    return (
        f"{whole['model']}, {whole['precision']}, {images}\n"
        f"whole call {whole['us']:.0f} µs, at full rate {full_rate:.0f} µs"
    )


def draw_case(axes: Axes, case: list[dict], ceiling: dict) -> None:
    """A bar per kernel, its time at full rate within."""
    operators = [record for record in case if "bytes" in record]
    (whole,) = (record for record in case if record["operator"] == "infer")
    measured = [record["us"] for record in operators]
    full_rate = [full_rate_us(record, ceiling) for record in operators]
    places = range(len(operators))
    axes.barh(places, measured, color="#9ecae1", label="measured")
    axes.barh(places, full_rate, color="#08519c", height=0.4, label="at full rate")
    for place, us, least in zip(places, measured, full_rate, strict=True):
        axes.annotate(
            f"{us:.1f}", (max(us, least), place), (2, 0), textcoords="offset points", **NUMBER
        )
    axes.set_yticks(places, labels(operators))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelbottom=True)
    axes.set_xlabel("µs")
    axes.set_title(title(whole, sum(full_rate)), fontsize=10)


def draw(cases: list[list[dict]], ceiling: dict) -> Figure:
    """A panel per case, two side by side, all to one scale."""
    down, across = math.ceil(len(cases) / ACROSS), min(ACROSS, len(cases))
    rows = max(len(case) for case in cases)
    figure = Figure(figsize=(5 * across, (0.22 * rows + 1) * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True).flatten()
    for axes, case in zip(panels, cases, strict=False):
        draw_case(axes, case, ceiling)
    for axes in panels[len(cases) :]:
        axes.remove()
    panels[0].legend(fontsize=8, loc="lower right")
    figure.suptitle(ceiling["gpu"], fontsize=10)
    return figure


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m tools.plot_fused", description=__doc__)
    p.add_argument("records", type=Path, help="JSONL file of tools.bench_fused")
    p.add_argument("--batch", type=int, default=1, help="images per batch; default %(default)s")
    p.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="the picture")
    return p


def main(args: argparse.Namespace) -> int:
    """Draw one file's records."""
    records, ceiling = read(args.records)
    cases = cases_of(records, args.batch)
    if not cases:
        batches = sorted({record["shape"][0] for record in records if "us" in record})
        raise InputError(
            f"{args.records} has no times of batch {args.batch}, but of {batches}; give one of them"
        )
    with whole_file(args.output) as partial:
        figure = draw(cases, ceiling)
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    cli.run(main, parser())
