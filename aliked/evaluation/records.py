"""Records of evaluations: a JSON line per system, and back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aliked.benchmark.records import read_records, write_records
from aliked.errors import InputError
from aliked.evaluation.systems import System


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


def is_evaluation(record: dict) -> bool:
    """Whether a record is of an evaluation, not of a timing."""
    return "task" in record


def load_outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """The outcomes of all files, in order; `InputError` where two are of the same."""
    outcomes, seen = [], {}
    for path in paths:
        for number, record in enumerate(read_records(path), 1):
            if not is_evaluation(record):
                raise InputError(f"line {number} of {path} is no record of evaluate.py; remove it")
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
    for number, record in enumerate(records, 1):
        different = [name for name, value in common.items() if record.get(name) != value]
        if different or outcome_of(record).system not in systems:
            what = f"another {different[0]}" if different else "a system not asked for"
            raise InputError(
                f"line {number} of {path} is of {what}; pass the same options, or another --output"
            )
    kept = [record for record in records if record["status"] == "ok"]
    write_records(path, kept)
    return {outcome_of(record).system for record in kept}


def system_fields(system: System) -> dict:
    """A system as a record holds it."""
    return asdict(system)
