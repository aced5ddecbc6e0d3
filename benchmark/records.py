"""Results as data: a JSON line per row, checked as it is written and as it is read."""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import Meta, structs

from aliked.backends import BACKENDS
from aliked.configs import CONFIGS, PRECISIONS
from aliked.errors import InputError
from aliked.files import read_file, whole_file
from benchmark.rows import SUBJECTS, Row
from benchmark.timing import REPEATED_WITHIN, Limits, apart

SCHEMA = 2  # of a record; raised when the meaning of a field changes. 1 lacks what has a default.
UNRANKED, UNSTABLE = "†", "~"
CLOCKS = {"compute_ms": "compute", "end_to_end_ms": "end to end"}

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a record."""


class WarmUp(Part):
    """How a clock's warm-up went."""

    runs: Count
    settled: bool  # else it ended at a limit


class Clock(Part):
    """All timed runs by one clock, in milliseconds."""

    mean: Positive
    std: Annotated[float, Meta(ge=0)]
    min: Positive
    p50: Positive
    p90: Positive
    p99: Positive
    max: Positive
    runs: Annotated[int, Meta(ge=1)]
    warmup: WarmUp
    unstable: list[str]  # why the times are not to be relied on
    samples: list[float]
    wall_p50: Positive  # median by the host's clock
    process_medians: list[float] | None = None  # where several processes measured


class Memory(Part):
    """What the process took, MiB."""

    process_mib: float | None
    method: Literal["process", "difference", "host peak", "unknown"]
    allocator_peak_above_model_mib: float | None


class Agreement(Part):
    """How far features, or matches, agree with the reference's, on all images together."""

    tolerance: str
    passed: bool
    reasons: list[str]
    compared: Count
    keypoints_in_common: Share | None  # this and the next three are of features
    mean_cosine: float | None
    min_cosine: float | None
    max_shift_px: float | None
    undecided: Count | None = None
    matches_in_common: Share | None = None  # this and the next are of matches
    max_score_difference: float | None = None

    @property
    def in_common(self) -> float:
        """The share of keypoints, or of matches, that both have."""
        own = self.keypoints_in_common
        return self.matches_in_common if own is None else own


class OfImage(Part):
    """Median times and keypoints of one image."""

    image: str
    compute_ms: float | None
    end_to_end_ms: float | None
    keypoints: Count


class Throughput(Part):
    """Images per second by each clock."""

    compute: Positive
    end_to_end: Positive


class ClocksSeen(Part):
    """The lowest and highest of what NVML told during the timed runs."""

    sm_mhz: list[float] | None
    memory_mhz: list[float] | None
    temperature_c: list[float] | None
    held_down_by: list[str]


class ModelFile(Part):
    """The file that ran instead of the model."""

    name: str
    sha256: Sha256


class Configuration(Part):
    """What must be the same for two records to belong to one table."""

    limits: Limits
    machine: dict[str, str | int | float | None]
    versions: dict[str, str | None]
    images: dict[str, Sha256]
    model_path: Sha256 | None
    compiler_cache: Literal["kept", "empty"] | None = None
    min_similarity: Annotated[float, Meta(ge=-1, le=1)] | None = None  # of `Measured.matches`
    matcher_weights: Sha256 | None = None  # where there are rows of LightGlue

    def __post_init__(self) -> None:
        missing = {"cpu", "cpu_threads", "system"} - self.machine.keys()
        if missing:
            raise ValueError(f"the machine lacks {', '.join(sorted(missing))}")

    @property
    def device_name(self) -> str:
        """The GPU of the machine, or else its CPU."""
        return str(self.machine.get("gpu", self.machine["cpu"]))


class Record(Part, tag_field="status"):
    """What every record says of where it comes from."""

    schema: Literal[1, 2]
    measured_at: datetime
    commit: str | None
    command: str
    configuration: Configuration
    row: ClassVar[Row | None] = None
    measured: ClassVar[bool] = False  # whether it has times
    ranked: ClassVar[bool] = False  # whether it may be called faster than another

    @property
    def device_name(self) -> str:
        """The GPU that it was measured on, or else the CPU."""
        return self.configuration.device_name


class Unavailable(Record, tag="unavailable"):
    """A backend that cannot run on this machine."""

    backend: str
    rows: Count  # that were asked for
    reason: str
    status: ClassVar[str] = "not run"

    @property
    def runtime(self) -> str:
        """Its name in tables."""
        return self.backend


class OfRow(Record):
    """A record of one row."""

    row: Row
    weights_sha256: Sha256
    rows: ClassVar[int] = 1

    @property
    def runtime(self) -> str:
        """Its name in tables."""
        return self.row.runtime


class NotRun(OfRow, tag="not run"):
    """A row that cannot be run."""

    reason: str
    status: ClassVar[str] = "not run"


class Failed(OfRow, tag="failed"):
    """A row whose process failed."""

    reason: str
    status: ClassVar[str] = "failed"


class Measured(OfRow, tag="ok"):
    """A row that was measured."""

    build_s: Annotated[float, Meta(ge=0)]
    clock: str
    compute_ms: Clock
    end_to_end_ms: Clock
    images_per_second: Throughput
    load_s: Annotated[float, Meta(ge=0)]
    first_run_s: Annotated[float, Meta(ge=0)]
    memory: Memory
    clocks_seen: ClocksSeen | None
    parity: Agreement
    problems: list[str]
    ranked: bool
    per_image: list[OfImage] | None
    settings: dict[str, str | bool | int | None]
    model_file: ModelFile | None
    # Of an image with the next, the mean: mutual nearest neighbours, or LightGlue's of its rows.
    matches: Annotated[float, Meta(ge=0)] | None = None
    status: ClassVar[str] = "ok"
    measured: ClassVar[bool] = True

    def clock_of(self, name: str) -> Clock:
        """Return one of `CLOCKS`."""
        return getattr(self, name)

    @property
    def mib(self) -> str:
        """Memory of the process, as tables show it."""
        mib = self.memory.process_mib
        return "?" if mib is None else f"{mib:.0f}"

    def unstable(self, *clocks: str) -> list[str]:
        """Return why its times by these clocks (by default all) are not to be relied on."""
        return [
            f"{CLOCKS[clock]}: {reason}"
            for clock in clocks or CLOCKS
            for reason in [*self.clock_of(clock).unstable, *self.not_repeated(clock)]
        ]

    def not_repeated(self, clock: str) -> list[str]:
        """Return how another run of the same code differs, which no run knows of itself."""
        return []

    def objections(self) -> list[str]:
        """Return why it is not ranked."""
        outside = f"outside the {self.parity.tolerance} tolerance: "
        return self.problems + [outside + reason for reason in self.parity.reasons[:1]]

    def marks(self, *clocks: str) -> str:
        """Return what follows its numbers by these clocks."""
        return ("" if self.ranked else UNRANKED) + (UNSTABLE if self.unstable(*clocks) else "")


class MeasuredTwice(Measured, tag="in no file", kw_only=True):
    """A row with what another run measured of it."""

    other: Measured

    def not_repeated(self, clock: str) -> list[str]:
        """Return by how much the medians differ, where the code was the same and it is too much.

        Two runs that both had changes on top of a commit are taken for the same.
        """
        if self.commit is None or self.other.commit != self.commit:
            return []
        own, other = (record.clock_of(clock).p50 for record in (self, self.other))
        if apart([own, other]) <= REPEATED_WITHIN:
            return []
        return [f"{other / own - 1:+.0%} in another run"]


AnyRecord = Measured | Failed | NotRun | Unavailable
T = TypeVar("T")


def make_record(fields: dict[str, Any]) -> AnyRecord:
    """Return the record with these fields; `ValueError` where they are not what they should be."""
    return msgspec.convert(fields, AnyRecord)


def read_lines(path: Path, kind: type[T]) -> tuple[dict[int, T], dict[int, str]]:
    """Read JSON lines as `kind`: what each line holds, and why another does not; by line number.

    Passed over: empty lines, and what an interruption left of a last line without its end.
    `InputError` where the file cannot be read.
    """
    decoder, records, damaged = msgspec.json.Decoder(kind), {}, {}
    lines = read_file(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                records[number] = decoder.decode(line)
        except msgspec.ValidationError as error:
            damaged[number] = str(error)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if number < len(lines):
                damaged[number] = str(error)
    return records, damaged


def is_evaluation(path: Path) -> bool:
    """Return whether the first line of a file is of an evaluation, as far as it can be read."""
    try:
        return "task" in json.loads(read_file(path).partition(b"\n")[0])
    except (ValueError, TypeError, RecursionError):
        return False


def read_timings(path: Path) -> tuple[dict[int, AnyRecord], dict[int, str]]:
    """Return `read_lines` of a file of measure_timings.py; `InputError` for an evaluation's."""
    records, damaged = read_lines(path, AnyRecord)
    if damaged and not records and is_evaluation(path):
        raise InputError(f"line 1 of {path} is of evaluate.py; give a file of measure_timings.py")
    return records, damaged


def damaged_text(path: Path, damaged: dict[int, str]) -> str:
    """Return which lines of a file are no records, and why the first is none."""
    number, reason = next(iter(damaged.items()))
    more = f" (and {len(damaged) - 1} more lines)" if len(damaged) > 1 else ""
    return f"line {number} of {path} is not a record: {reason}{more}"


def append_record(path: Path, record: AnyRecord | dict) -> None:
    """Add one line, on disk when this returns."""
    with open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        start = b"" if file.read(1) in (b"", b"\n") else b"\n"  # the last line lacks its end
        file.write(start + msgspec.json.encode(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, numbers: Iterable[int]) -> None:
    """Rewrite a file with these of its lines, as they are; whole or not at all."""
    lines = read_file(path).split(b"\n")
    with whole_file(path) as partial:
        partial.write_bytes(b"".join(lines[number - 1] + b"\n" for number in numbers))


def resume(
    path: Path, rows: list[Row], configuration: dict, weights: Mapping[str, str] | None = None
) -> set[Row]:
    """Return the rows that `path` already holds, of this configuration and `weights` by model.

    Records of rows that could not run or failed are dropped from the file, to be tried again.
    `InputError`, and the file unchanged, where a line is damaged, a record is of another
    configuration or other weights or of a row that is not among `rows`, or a row is there twice.
    """
    records, damaged = read_timings(path)
    cure = "pass the same options, or another --output"
    if damaged:
        raise InputError(f"{damaged_text(path, damaged)}; remove it, or give another --output")
    done: dict[Row, int] = {}
    for number, record in records.items():
        where = f"line {number} of {path}"
        reason = _not_of(record, rows, configuration, weights or {})
        if reason:
            raise InputError(f"{where} {reason}; {cure}")
        if record.measured and done.setdefault(record.row, number) != number:
            raise InputError(
                f"{where} and line {done[record.row]} are of the same row ({record.row}); remove "
                "one of them"
            )
    keep_lines(path, done.values())
    return set(done)


def _not_of(
    record: AnyRecord, rows: list[Row], configuration: dict, weights: Mapping[str, str]
) -> str | None:
    """Why a record cannot stand beside those that are to be measured, or None."""
    row = record.row
    if row and row not in rows:
        return f"is of a row that this command does not ask for ({row})"
    if row and weights.get(row.model, record.weights_sha256) != record.weights_sha256:
        return f"was measured with other weights of {row.model}"
    own = msgspec.to_builtins(record.configuration)
    for name, value in msgspec.to_builtins(configuration).items():
        if name == "limits":  # an earlier version's lack what it did not have: the default
            value = msgspec.to_builtins(Limits()) | value
        if own[name] != value:
            return f"was measured with another {name}: {_difference(own[name], value)}"
    return None


def _difference(before: Any, now: Any) -> str:
    """What differs, and nothing else."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
        return ", ".join(f"{n} {before.get(n)}, now {now.get(n)}" for n in names[:3])
    return f"{before}, now {now}"


def load_records(
    paths: Iterable[Path], warn: Callable[[str], None] | None = None
) -> list[AnyRecord]:
    """Return the records of all files in the tables' order.

    Damaged lines are told to `warn` and left out. `InputError` for one where there is no `warn`,
    where two records are of one cell, and where there is none.
    """
    paths, found, seen = list(paths), [], {}
    for path in paths:
        records, damaged = read_timings(path)
        if damaged and warn is None:
            raise InputError(f"{damaged_text(path, damaged)}; remove it and measure again")
        if damaged:
            warn(damaged_text(path, damaged))
        for number, record in records.items():
            key, where = (section_key(record), record.row), f"line {number} of {path}"
            if record.row and key in seen:
                raise InputError(
                    f"{where} and {seen[key]} are of the same row on the same device "
                    f"({record.row}); leave one of the files out"
                )
            seen[key] = where
            found.append(record)
    if not found:
        raise InputError(
            f"there is no record in {', '.join(map(str, paths))}; measure something first"
        )
    return sorted(found, key=table_order)


def pair_runs(records: list[AnyRecord], others: Iterable[AnyRecord]) -> list[AnyRecord]:
    """Return `records`, each with what another run measured of its row on that kind of device."""
    measured = {(r.device_name, r.row): r for r in others if r.measured}

    def paired(record: AnyRecord) -> AnyRecord:
        other = measured.get((record.device_name, record.row))
        if not record.measured or other is None:
            return record
        return MeasuredTwice(**structs.asdict(record), other=other)

    return [paired(record) for record in records]


def section_key(record: AnyRecord) -> tuple[str, str]:
    """Records of one kind of GPU (or else CPU) and one set of versions stand in one section."""
    return record.device_name, repr(sorted(record.configuration.versions.items()))


def sections(records: list[AnyRecord]) -> list[list[AnyRecord]]:
    """Return records by `section_key`; of one device the section with most records comes first."""
    ordered = sorted(records, key=section_key)
    groups = [list(group) for _, group in itertools.groupby(ordered, section_key)]
    return sorted(groups, key=lambda own: (own[0].device_name, -len(own)))


def case(row: Row) -> tuple:
    """Return what has to be the same for two runtimes to be compared."""
    size = row.image_set, row.width, row.height, row.batch
    return row.model, str(row.selection), *size, row.graph


def table_order(record: AnyRecord) -> tuple:
    """Return where a record stands: model, image, K, batch, precision, runtime."""
    row = record.row
    if row is None:
        return (len(SUBJECTS), record.backend)
    return (
        list(SUBJECTS).index(row.graph),
        list(CONFIGS).index(row.model),
        row.width * row.height,
        row.image_set,
        row.top_k,
        row.batch,
        PRECISIONS.index(row.precision),
        *runtime_order(row),
    )


def runtime_order(row: Row) -> tuple[int, str]:
    """Return where a runtime stands among others."""
    names = list(BACKENDS)
    known = row.backend in names
    return names.index(row.backend) if known else len(names), row.runtime
