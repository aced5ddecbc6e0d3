"""Results as data: a JSON line per row, appended as rows finish, and read back to go on."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from aliked.benchmark.rows import Row, row_of
from aliked.benchmark.timing import Limits
from aliked.errors import InputError
from aliked.files import whole_file

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
