"""One row measured in several processes, as one result.

What differs from process to process, such as the core that it runs on, shows in no single one: all
its runs may agree within a percent, and be a fifth off.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from aliked.benchmark.results import CLOCKS
from aliked.benchmark.stationarity import REPEATED_WITHIN, apart
from aliked.benchmark.timing import summary
from aliked.benchmark.watch import span


def merged(results: Sequence[dict]) -> dict:
    """What `measure` returned in each process: all runs, the most memory, the worst parity."""
    if len(results) == 1:
        return results[0]
    clocks = {clock: _merged_clock([r[clock] for r in results]) for clock in CLOCKS}
    worst = min((r["parity"] for r in results), key=_quality)
    problems = _distinct(r["problems"] for r in results)
    return results[0] | {
        **clocks,
        "images_per_second": {
            name: rate * results[0][f"{name}_ms"]["mean"] / clocks[f"{name}_ms"]["mean"]
            for name, rate in results[0]["images_per_second"].items()
        },
        "load_s": statistics.median(r["load_s"] for r in results),
        "first_run_s": statistics.median(r["first_run_s"] for r in results),
        "memory": max((r["memory"] for r in results), key=lambda m: m["process_mib"] or 0.0),
        "clocks_seen": _merged_ranges([r["clocks_seen"] for r in results if r["clocks_seen"]]),
        "parity": worst,
        "problems": problems,
        "ranked": worst["passed"] and not problems,
        "per_image": _merged_images([r["per_image"] for r in results]),
    }


def _merged_clock(clocks: list[dict]) -> dict:
    """The statistics of all runs, and the processes' medians."""
    samples = list(itertools.chain.from_iterable(c["samples"] for c in clocks))
    medians = [c["p50"] for c in clocks]
    return summary(np.array(samples)) | {
        "warmup": {
            "runs": sum(c["warmup"]["runs"] for c in clocks),
            "settled": all(c["warmup"]["settled"] for c in clocks),
        },
        "unstable": _distinct([*(c["unstable"] for c in clocks), _differ(medians)]),
        "samples": samples,
        "wall_p50": statistics.median(c["wall_p50"] for c in clocks),
        "process_medians": medians,
    }


def _differ(medians: list[float]) -> list[str]:
    distance = apart(medians)
    return [f"medians of the processes {distance:.0%} apart"] if distance > REPEATED_WITHIN else []


def _quality(parity: dict) -> tuple:
    return parity["passed"], parity["keypoints_in_common"], parity["mean_cosine"]


def _distinct(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def _merged_ranges(seen: list[dict]) -> dict | None:
    """The lowest and the highest of all, and everything that held the clocks down."""
    if not seen:
        return None
    ranges = {
        name: span(itertools.chain.from_iterable(s[name] for s in seen if s[name]))
        for name in seen[0].keys() - {"held_down_by"}
    }
    return ranges | {"held_down_by": sorted(_distinct(s["held_down_by"] for s in seen))}


def _merged_images(lists: list[list[dict] | None]) -> list[dict] | None:
    """Each image's median over the processes."""
    if lists[0] is None:
        return None
    return [
        same[0] | {clock: _median(image[clock] for image in same) for clock in CLOCKS}
        for same in zip(*lists, strict=True)
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
