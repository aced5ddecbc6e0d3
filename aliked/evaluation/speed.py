"""Speed and memory of systems, from the records of measure_timings.py."""

from collections.abc import Sequence
from dataclasses import replace

from aliked.backends import Spec
from aliked.benchmark.results import Result
from aliked.evaluation.records import Outcome

NOT_MEASURED = "not measured"


def timing_of(outcome: Outcome, timings: Sequence[Result]) -> Result | None:
    """The timing of a system on images of the size that most have, on the same device."""
    if outcome.system.baseline:
        return None
    wanted = outcome.system.row(*outcome.size)
    found = [
        timing
        for timing in timings
        if timing.measured
        and timing.row.compile_mode in (None, Spec.compile_mode)
        and replace(timing.row, image_set="", compile_mode=None) == wanted
        and _same_device(timing, outcome)
    ]
    return min(found, key=lambda timing: timing.row.image_set, default=None)


def _same_device(timing: Result, outcome: Outcome) -> bool:
    machine = outcome.record["configuration"]["machine"]
    kind = "gpu" if outcome.system.device == "cuda" else "cpu"
    return timing.record["configuration"]["machine"].get(kind) == machine.get(kind)
