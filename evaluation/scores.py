"""The area under the curve of recall over error, as the field computes it."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from aliked.errors import InputError
from benchmark.records import damaged_text, keep_lines, read_lines
from evaluation.systems import System

SCHEMA = 1  # of a record; raised when the meaning of a field changes


def error_auc(errors: np.ndarray, threshold: float) -> float:
    """Area under recall(error) from 0 to `threshold`, divided by it, in [0, 1].

    `errors` [N], a failed pair is infinite. Between the sorted errors, at which the recall is 1/N,
    2/N, ..., the curve is straight; it starts at (0, 0) and is level from the last error below the
    threshold on (SuperGlue, arXiv 1911.11763, section 5.1).
    """
    errors = np.sort(errors)
    below = errors[errors < threshold]
    recall = np.arange(len(below) + 1) / len(errors)
    return float(np.trapezoid([*recall, recall[-1]], [0, *below, threshold]) / threshold)


@dataclass(frozen=True)
class Outcome:
    """One record, with what tables and plots ask of it."""

    record: dict
    system: System

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


def outcome_of(record: dict) -> Outcome:
    """A record with its system."""
    return Outcome(record, System(**record["system"]))


def read_records(path: Path) -> dict[int, dict]:
    """Return the records of a file by line number; `InputError` names a line that is none."""
    records, damaged = read_lines(path, dict)
    for number, record in records.items():
        if "task" not in record or record.get("schema") != SCHEMA:
            damaged[number] = f"it is none of evaluate.py, of format {SCHEMA}"
    if damaged:
        raise InputError(f"{damaged_text(path, damaged)}; remove it")
    return records


def load_outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """The outcomes of all files, in order; `InputError` where two are of the same."""
    outcomes, seen = [], {}
    for path in paths:
        for number, record in read_records(path).items():
            outcome = outcome_of(record)
            key, where = (section_key(outcome), outcome.system), f"line {number} of {path}"
            if key in seen:
                raise InputError(
                    f"{where} and {seen[key]} are of the same system on the same data "
                    f"({outcome.system}); leave one of the files out"
                )
            seen[key] = where
            outcomes.append(outcome)
    return outcomes


def section_key(outcome: Outcome) -> tuple[str, ...]:
    """Outcomes of one task, on the same data, by the same rules, stand in one table."""
    record = outcome.record
    dataset = record["dataset"]
    rules = repr(sorted(record["parameters"].items()))
    return record["task"], dataset["name"], dataset["sha256"], rules


def resume(path: Path, systems: list[System], common: dict) -> set[System]:
    """The systems that `path` already holds, of this same task, data, rules and machine.

    Records of systems that could not run are dropped from the file, to be tried again.
    `InputError`, and the file unchanged, where a record has something else of `common`.
    """
    records = read_records(path)
    for number, record in records.items():
        different = [name for name, value in common.items() if record.get(name) != value]
        if different or outcome_of(record).system not in systems:
            what = f"another {different[0]}" if different else "a system not asked for"
            raise InputError(
                f"line {number} of {path} is of {what}; pass the same options, or another --output"
            )
    kept = {number: record for number, record in records.items() if record["status"] == "ok"}
    keep_lines(path, kept)
    return {outcome_of(record).system for record in kept.values()}


def system_fields(system: System) -> dict:
    """A system as a record holds it."""
    return asdict(system)


RESAMPLES = 1000  # of the bootstrap
KINDS = {
    "homography": "evaluation.homography",
    "pose": "evaluation.pose",
    "sequences": "evaluation.sequences",
}


@dataclass(frozen=True)
class Score:
    """One column of a table. `of` gives the number, or the numbers, of a pair."""

    name: str  # such as "AUC@3"
    of: Callable[[dict], float | tuple[float, ...]]
    summary: Callable[[np.ndarray], float] = np.mean  # of the pairs' numbers [P] or [P, M]
    percent: bool = True  # a fraction, shown as 0 to 100
    digits: int = 1

    @property
    def scale(self) -> int:
        """What a value is shown times."""
        return 100 if self.percent else 1

    def values(self, pairs: Sequence[dict]) -> np.ndarray:
        """The numbers of all pairs, [P] or [P, M]."""
        return np.array([self.of(pair) for pair in pairs], float)

    def value(self, pairs: Sequence[dict]) -> float:
        """The number of all pairs together."""
        return float(self.summary(self.values(pairs)))

    def text(self, value: float) -> str:
        """A value as tables show it."""
        return f"{self.scale * value:.{self.digits}f}"

    def change_text(self, value: float) -> str:
        """A difference of two values, with its sign and a digit more."""
        digits = self.digits + 1
        rounded = round(self.scale * value, digits)
        return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


@dataclass(frozen=True)
class Kind:
    """What is known of a task in general. A module of `KINDS` has it as `KIND`."""

    scores: tuple[Score, ...]  # the columns of the table
    compared: tuple[str, ...]  # names of those whose change by a system is worth an interval
    headline: str  # name of the one that is plotted, and shown group by group
    badness: Callable[[dict], float]  # of a pair: the largest are the worst
    badness_text: str = "error {:.1f}"  # how a caption says it, with its unit
    curve: tuple[Score, ...] = ()  # drawn over its thresholds, such as MMA@1 to MMA@10
    notes: str = ""  # what the columns mean, a paragraph

    def score(self, name: str) -> Score:
        """A column by its name."""
        return next(score for score in self.scores if score.name == name)


def kind_of(task: str) -> Kind:
    """What is known of a task, by its name in records."""
    module: ModuleType = importlib.import_module(KINDS[task])
    return module.KIND


@dataclass(frozen=True)
class Difference:
    """A change of a score, with its bootstrap interval that holds 95 %."""

    mean: float
    low: float
    high: float


def paired_difference(
    score: Score, pairs: Sequence[dict], reference: Sequence[dict], seed: int
) -> Difference:
    """How much a score of `pairs` is above that of the `reference`, which has the same pairs.

    Both are resampled together, pair by pair with replacement (Efron's percentile interval).
    """
    own, other = score.values(pairs), score.values(reference)
    random = np.random.default_rng(seed)
    changes = [
        score.summary(own[chosen]) - score.summary(other[chosen])
        for chosen in random.integers(0, len(own), (RESAMPLES, len(own)))
    ]
    low, high = np.percentile(changes, (2.5, 97.5))
    return Difference(float(score.summary(own) - score.summary(other)), float(low), float(high))
