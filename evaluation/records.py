"""Records of evaluations: read, checked, and which of them stand in one table."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from aliked.backends import BACKENDS, Spec
from aliked.configs import CONFIGS
from aliked.errors import InputError
from benchmark.records import Measured, damaged_text, read_lines
from evaluation.homography import Homography
from evaluation.pose import Pose
from evaluation.sequences import Sequences
from evaluation.systems import TITLES, System
from evaluation.task import Count, Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Homography, Pose, Sequences)}
SCHEMA = 1  # of a record; raised when the meaning of a field changes


@dataclass(frozen=True)
class Outcome:
    """One record of an evaluation, with what tables and plots ask of it."""

    record: dict
    system: System

    @property
    def task(self) -> type[Task]:
        """The kind of evaluation."""
        return TASKS[self.record["task"]]

    @property
    def measured(self) -> bool:
        """Whether it has pairs."""
        return self.record["status"] == "ok"

    @property
    def pairs(self) -> list[dict]:
        """What was found of every pair."""
        return self.record["pairs"]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that most images have; of two as frequent ones the smaller."""
        sizes = self.record["dataset"]["sizes"]
        return min(
            (tuple(map(int, size.split("x"))) for size in sizes),
            key=lambda size: (-sizes[f"{size[0]}x{size[1]}"], size),
        )


class DatasetFacts(msgspec.Struct):
    """The data set of a record."""

    name: str
    images: Count
    sizes: Annotated[
        dict[Annotated[str, msgspec.Meta(pattern=r"^\d+x\d+$")], Count], msgspec.Meta(min_length=1)
    ]
    sha256: str


class Machine(msgspec.Struct):
    """Where a record was made."""

    machine: dict[str, Any]
    versions: dict[str, str | None]
    model_path: str | None = None


class Parameters(msgspec.Struct):
    """What every task's numbers depend on."""

    seed: Count


class EvaluationRecord(msgspec.Struct):
    """What a line of evaluate.py's file has to hold, whatever its task."""

    schema: Literal[1]  # `SCHEMA`
    task: Literal["homography", "pose", "sequences"]
    system: System
    status: Literal["ok", "not run"]
    dataset: DatasetFacts
    parameters: Parameters
    configuration: Machine
    pairs: list[dict] = []
    reason: str = ""


def outcome_of(record: dict, where: str) -> Outcome:
    """A record with its system; `InputError` where it lacks something, or a value is no such."""
    try:
        checked = msgspec.convert(record, EvaluationRecord)
        msgspec.convert(checked.pairs, list[TASKS[checked.task].row])
        if (checked.status == "ok") != bool(checked.pairs):
            raise msgspec.ValidationError(f"it is {checked.status} with {len(checked.pairs)} pairs")
    except msgspec.ValidationError as error:
        raise InputError(f"{where} is no record of evaluate.py ({error}); remove it") from error
    return Outcome(record, checked.system)


def read_outcomes(path: Path) -> dict[int, Outcome]:
    """The outcomes of a file by line number; `InputError` names a line that is none."""
    records, damaged = read_lines(path, dict)
    if damaged:
        raise InputError(f"{damaged_text(path, damaged)}; remove it")
    return {n: outcome_of(record, f"line {n} of {path}") for n, record in records.items()}


def load_outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """The outcomes of all files, in order; `InputError` where two are of the same."""
    outcomes, seen = [], {}
    for path in paths:
        for number, outcome in read_outcomes(path).items():
            where = f"line {number} of {path}"
            key = section_key(outcome), outcome.system
            if key in seen:
                raise InputError(
                    f"{where} and {seen[key]} are of the same system on the same data "
                    f"({outcome.system}); leave one of the files out"
                )
            seen[key] = where
            outcomes.append(outcome)
    for section in sections(outcomes):
        _check_same_pairs(section)
    return outcomes


def _check_same_pairs(section: Sequence[Outcome]) -> None:
    """Raise `InputError` where systems of one table were measured on different pairs."""
    named = {o.system: [row["name"] for row in o.pairs] for o in section if o.measured}
    for system, names in named.items():
        if names != next(iter(named.values())) or len(set(names)) < len(names):
            raise InputError(
                f"the record of {system} is of other pairs than those beside it; leave it out, or "
                "evaluate it again"
            )


def section_key(outcome: Outcome) -> tuple[str, ...]:
    """Outcomes of one task, on the same data, by the same rules, stand in one table."""
    record = outcome.record
    dataset = record["dataset"]
    rules = repr(sorted(record["parameters"].items()))
    return record["task"], dataset["name"], dataset["sha256"], rules


def timing_of(outcome: Outcome, timings: Sequence[Measured]) -> Measured | None:
    """The timing of a system on images of the size that most have, on the same device."""
    if outcome.system.baseline or outcome.system.matcher == "lightglue":
        return None  # nobody has timed it
    width, height = outcome.size
    wanted = outcome.system.extractor | {"width": width, "height": height, "batch": 1}
    wanted["graph"] = "extractor"
    found = [
        timing
        for timing in timings
        if timing.measured
        and timing.row.compile_mode in (None, Spec.compile_mode)
        and all(getattr(timing.row, name) == value for name, value in wanted.items())
        and _same_device(timing, outcome)
    ]
    return min(found, key=lambda timing: timing.row.image_set, default=None)


def _same_device(timing: Measured, outcome: Outcome) -> bool:
    machine = outcome.record["configuration"]["machine"]
    kind = "gpu" if outcome.system.device == "cuda" else "cpu"
    return timing.configuration.machine.get(kind) == machine.get(kind)


def sections(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes that are comparable with each other, in the tables' order."""
    ordered = sorted(outcomes, key=lambda o: (section_key(o), table_order(o)))
    return [list(group) for _, group in itertools.groupby(ordered, section_key)]


def table_order(outcome: Outcome) -> tuple:
    """Model by model, matcher by matcher, PyTorch in float32 first; baselines last."""
    system = outcome.system
    models, backends = list(CONFIGS), list(BACKENDS)
    return (
        models.index(system.model) if system.model in models else len(models),
        system.model,
        list(TITLES).index(system.matcher),
        backends.index(system.backend) if system.backend in backends else len(backends),
        system.precision != "fp32",
        system.device,
    )


def reference_of(outcome: Outcome, section: Sequence[Outcome]) -> Outcome | None:
    """PyTorch in float32 with the same model and matcher, where possible on the same device.

    Of that with another matcher: with mutual nearest neighbours.
    """
    own = outcome.system
    runtime = own.backend, own.precision
    matcher = own.matcher if runtime != ("pytorch", "fp32") else "mutual"
    found = [
        other
        for other in section
        if other.measured
        and (other.system.backend, other.system.precision) == ("pytorch", "fp32")
        and (other.system.model, other.system.matcher) == (own.model, matcher)
    ]
    found.sort(key=lambda other: other.system.device != own.device)
    return found[0] if found and found[0].system != own else None
