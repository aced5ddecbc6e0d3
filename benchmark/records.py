"""Results as data: a JSON line per row, appended as rows finish, and read back to go on."""

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aliked.backends import BACKENDS
from aliked.configs import CONFIGS
from aliked.errors import InputError
from aliked.files import whole_file
from benchmark.rows import Row, row_of
from benchmark.timing import REPEATED_WITHIN, Limits, apart

SCHEMA = 1  # of a record; raised when the meaning of a field changes


def read_records(path: Path) -> list[dict]:
    """The records of a file, in order. `InputError` for a line that is not one.

    A last line without its end is what an interrupted run leaves: it is passed over.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); give a file of records") from error
    complete = text[: text.rfind("\n") + 1]
    return [_parse(path, number, line) for number, line in enumerate(complete.splitlines(), 1)]


def read_timings(path: Path) -> list[dict]:
    """`read_records` of measure_timings.py's files; `InputError` where one is an evaluation."""
    records = read_records(path)
    for number, record in enumerate(records, 1):
        if "row" not in record:
            raise InputError(
                f"line {number} of {path} is of evaluate.py; give a file of measure_timings.py"
            )
    return records


def append_record(path: Path, record: dict) -> None:
    """Add one line, on disk when this returns."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_records(path: Path, records: list[dict]) -> None:
    """Write a file of records, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))


def resume(path: Path, rows: list[Row], configuration: dict) -> set[Row]:
    """The rows that `path` already holds, of this same configuration.

    Records of rows that could not run or failed are dropped from the file, to be tried again.
    `InputError`, and the file unchanged, where a record is of another configuration or of a row
    that is not among `rows`.
    """
    records = read_timings(path)
    for number, record in enumerate(records, 1):
        _check_same(path, number, record, rows, configuration)
    kept = [record for record in records if record["status"] == "ok"]
    write_records(path, kept)
    return {row_of(record) for record in kept}


def _parse(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
        schema = record["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"line {number} of {path} is not a record of measure_timings.py or evaluate.py; remove "
            "it"
        ) from error
    if schema != SCHEMA:
        raise InputError(
            f"line {number} of {path} is a record of format {schema}, but this version reads "
            f"format {SCHEMA}; measure again"
        )
    return record


def _check_same(
    path: Path, number: int, record: dict, rows: list[Row], configuration: dict
) -> None:
    where, cure = f"line {number} of {path}", "pass the same options, or another --output"
    if row_of(record) not in rows:
        raise InputError(
            f"{where} is of a row that this command does not ask for ({row_of(record)}); {cure}"
        )
    for name, value in configuration.items():
        found = record["configuration"].get(name)
        if name == "limits":  # an earlier version's lack what it did not have: the default
            found = asdict(Limits()) | found
        if found != value:
            raise InputError(
                f"{where} was measured with another {name}: {_brief(found, value)}; {cure}"
            )


def _brief(found, wanted) -> str:
    """What differs, and nothing else."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [n for n in sorted({*found, *wanted}) if found.get(n) != wanted.get(n)]
        return ", ".join(f"{n} {found.get(n)}, now {wanted.get(n)}" for n in names[:3])
    return f"{found}, now {wanted}"


UNRANKED, UNSTABLE = "†", "~"
CLOCKS = {"compute_ms": "compute", "end_to_end_ms": "end to end"}


@dataclass(frozen=True)
class Result:
    """One record, with what tables and plots ask of it."""

    record: dict
    row: Row
    again: "Result | None" = None  # the same row in another run

    @property
    def measured(self) -> bool:
        """Whether it has times."""
        return self.record["status"] == "ok"

    @property
    def ranked(self) -> bool:
        """Whether it may be called faster than another."""
        return self.measured and self.record["ranked"]

    @property
    def compute_ms(self) -> float:
        """Median of the compute clock."""
        return self.record["compute_ms"]["p50"]

    @property
    def mib(self) -> str:
        """Memory of the process."""
        mib = self.record["memory"]["process_mib"]
        return "?" if mib is None else f"{mib:.0f}"

    def unstable(self, *clocks: str) -> list[str]:
        """Why its times by these clocks (by default all) are not to be relied on."""
        return [
            f"{CLOCKS[clock]}: {reason}"
            for clock in clocks or CLOCKS
            for reason in self.record[clock]["unstable"] + self._not_repeated(clock)
        ]

    def _not_repeated(self, clock: str) -> list[str]:
        """How another run of the same commit differs, which one process cannot know of.

        Two runs that both had changes on top of it are taken for the same.
        """
        commit = self.record["commit"]
        if commit is None or self.again is None or self.again.record["commit"] != commit:
            return []
        own, other = (result.record[clock]["p50"] for result in (self, self.again))
        if apart([own, other]) <= REPEATED_WITHIN:
            return []
        return [f"{other / own - 1:+.0%} in another run"]

    def objections(self) -> list[str]:
        """Why it is not ranked."""
        parity = self.record["parity"]
        outside = [f"outside the {parity['tolerance']} tolerance: {r}" for r in parity["reasons"]]
        return self.record["problems"] + outside[:1]

    def marks(self, *clocks: str) -> str:
        """What follows its numbers by these clocks."""
        return ("" if self.ranked else UNRANKED) + (UNSTABLE if self.unstable(*clocks) else "")


def load_results(paths: Iterable[Path]) -> list[Result]:
    """The results of all files in the tables' order; `InputError` where two are of one cell."""
    paths, results, seen = list(paths), [], {}
    for path in paths:
        for number, record in enumerate(read_timings(path), 1):
            result = Result(record, row_of(record))
            key, where = (section_key(result), result.row), f"line {number} of {path}"
            if key in seen:
                raise InputError(
                    f"{where} and {seen[key]} are of the same row on the same device "
                    f"({result.row}); leave one of the files out"
                )
            seen[key] = where
            results.append(result)
    if not results:
        raise InputError(
            f"there is no record in {', '.join(map(str, paths))}; measure something first"
        )
    return sorted(results, key=table_order)


def pair_runs(results: list[Result], others: Iterable[Result]) -> list[Result]:
    """`results`, each with what another run measured of the same row on the same kind of device."""
    found = {(device_name(r), r.row): r for r in others if r.measured}
    return [
        replace(r, again=found.get((device_name(r), r.row))) if r.measured else r for r in results
    ]


def section_key(result: Result) -> tuple[str, str]:
    """Results of one kind of GPU (or else CPU) and one set of versions stand in one section."""
    versions = result.record["configuration"]["versions"]
    return device_name(result), repr(sorted(versions.items()))


def device_name(result: Result) -> str:
    """The GPU of the machine, or else its CPU."""
    machine = result.record["configuration"]["machine"]
    return machine.get("gpu", machine["cpu"])


def sections(results: list[Result]) -> list[list[Result]]:
    """Results by `section_key`, in order."""
    ordered = sorted(results, key=section_key)
    return [list(group) for _, group in itertools.groupby(ordered, section_key)]


def case(result: Result) -> tuple:
    """What has to be the same for two runtimes to be compared."""
    row = result.row
    return (row.model, row.selection, row.image_set, row.width, row.height, row.batch)


def table_order(result: Result) -> tuple:
    """Where a result stands: model, image, K, batch, precision, runtime."""
    row = result.row
    return (
        list(CONFIGS).index(row.model),
        row.width * row.height,
        row.image_set,
        row.top_k,
        row.batch,
        row.precision != "fp32",
        *runtime_order(result),
    )


def runtime_order(result: Result) -> tuple[int, str]:
    """Where a runtime stands among others."""
    names = list(BACKENDS)
    known = result.row.backend in names
    return names.index(result.row.backend) if known else len(names), result.row.runtime
