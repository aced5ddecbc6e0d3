"""Draw the time of every fused kernel against its limit, from records of `tools.bench_fused`.

The limit is the larger of two times: the bytes that a kernel must move at the rate of a copy, and
its arithmetic at the rate of a large half-precision product, both as measured on the same card.
"""

import argparse
import itertools
import json
from pathlib import Path

from matplotlib.figure import Figure

from aliked import cli
from aliked.errors import InputError
from aliked.files import whole_file


def limit_us(record: dict, ceiling: dict) -> float:
    """No version of this kernel that reads its inputs from memory is faster, microseconds."""
    moving = record["bytes"] / ceiling["bytes_per_s"]
    return 1e6 * max(moving, record["flops"] / ceiling["flops_per_s"])


def cases_of(records: list[dict]) -> list[list[dict]]:
    """The timed operators of every model and image size, in the order of the file."""
    timed = [record for record in records if "us" in record]

    def case(record: dict) -> tuple:
        return record["model"], record["precision"], tuple(record["shape"])

    return [list(group) for _, group in itertools.groupby(timed, case)]


def draw(cases: list[list[dict]], ceiling: dict) -> Figure:
    """A panel per case: a bar per kernel, its limit within."""
    rows = max(len(case) for case in cases)
    figure = Figure(figsize=(5 * len(cases), 0.3 * rows + 1.2), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        operators = [record for record in case if "bytes" in record]
        (whole,) = (record for record in case if record["operator"] == "infer")
        places = range(len(operators))
        axes.barh(places, [r["us"] for r in operators], color="#9ecae1", label="measured")
        limits = [limit_us(r, ceiling) for r in operators]
        axes.barh(places, limits, color="#08519c", height=0.4, label="limit")
        axes.set_yticks(places, [r["operator"] for r in operators])
        axes.invert_yaxis()
        axes.set_xlabel("µs")
        batch, height, width = case[0]["shape"]
        images = f"{width}x{height}" + (f", batch {batch}" if batch > 1 else "")
        axes.set_title(
            f"{case[0]['model']}, {case[0]['precision']}, {images}\n"
            f"whole call {whole['us']:.0f} µs, limit {sum(limits):.0f} µs",
            fontsize=10,
        )
        axes.legend(fontsize=8)
    figure.suptitle(ceiling["gpu"], fontsize=10)
    return figure


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("records", type=Path, help="JSONL file of tools.bench_fused")
    p.add_argument("--output", type=Path, required=True, metavar="FILE.png", help="the picture")
    return p


def main(args: argparse.Namespace) -> int:
    """Draw one file's records."""
    records = [json.loads(line) for line in args.records.read_text().splitlines()]
    ceilings = [record for record in records if record["operator"] == "ceiling"]
    if not ceilings:
        raise InputError(f"{args.records} has no ceilings; make it again with tools.bench_fused")
    with whole_file(args.output) as partial:
        figure = draw(cases_of(records), ceilings[0])
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    cli.run(main, parser())
