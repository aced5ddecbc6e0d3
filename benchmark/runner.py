"""A measurement: what it needs first, then row after row, each in processes of its own."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tqdm import tqdm

from aliked.backends import get_backend
from aliked.errors import InputError
from aliked.files import sha256
from aliked.weights import LIGHTGLUE, find_weights
from benchmark.artifacts import BuildFile, MakeReference, TryOut, build_files, cached_path
from benchmark.environment import Describe, git_commit
from benchmark.measure import Measure, merged
from benchmark.process import TaskFailed, run_task, run_tasks
from benchmark.records import SCHEMA, AnyRecord, append_record, make_record
from benchmark.rows import ImageSet, Row
from benchmark.timing import Limits


@dataclass(frozen=True, eq=False)
class Run:
    """What all rows of a measurement share."""

    device: str  # such as "cpu" or "cuda:0"
    machine: dict
    versions: dict
    unavailable: dict[str, str | None]  # backend to the reason why it cannot run here
    image_sets: list[ImageSet]
    limits: Limits
    weights: Path | None = None
    model_path: Path | None = None
    compiler_cache: Path | None = None  # kept from row to row; None: empty for every row
    min_similarity: float | None = None  # of matches that are counted; None: of none
    lightglue: bool = False  # whether there are rows of it
    matcher_weights: Path | None = None  # of these
    command: str = ""
    commit: str | None = field(default_factory=git_commit)

    @functools.cached_property
    def configuration(self) -> dict:
        """What must be the same for two records to belong to one table."""
        names = [images.name for images in self.image_sets]
        return {
            "limits": self.limits,
            "machine": self.machine,
            "versions": self.versions,
            "images": {
                s.name if names.count(s.name) == 1 else f"{s.name} {s.width}x{s.height}": s.sha256
                for s in self.image_sets
            },
            "model_path": self.model_path and sha256(self.model_path),
            "compiler_cache": "kept" if self.compiler_cache else "empty",
            "min_similarity": self.min_similarity,
            "matcher_weights": self._matcher_sha256,
        }

    @functools.cached_property
    def _matcher_sha256(self) -> str | None:
        return sha256(find_weights(LIGHTGLUE, self.matcher_weights)) if self.lightglue else None

    @property
    def made_on(self) -> dict:
        """What files that are made here depend on.

        For a GPU not on how many threads of the processor this run has, by taskset for example.
        """
        threads = () if self.device == "cpu" else ("cpu_threads",)
        machine = {name: fact for name, fact in self.machine.items() if name not in threads}
        facts = {"versions": self.versions, "machine": machine}
        return facts | ({"matcher": self._matcher_sha256} if self.lightglue else {})

    @functools.cache  # noqa: B019, as there is one run to a process
    def weights_sha256(self, model: str) -> str:
        """Return the SHA-256 of a model's weights."""
        return sha256(find_weights(model, self.weights))

    def images_of(self, row: Row) -> ImageSet:
        """Return the images that a row is of."""
        key = (row.image_set, row.width, row.height)
        return next(images for images in self.image_sets if images.key == key)

    def origin(self) -> dict:
        """Return what every record says of where it comes from."""
        return {
            "schema": SCHEMA,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "command": self.command,
            "configuration": self.configuration,
        }


def open_run(device: str, backends: list[str], **options: Any) -> Run:
    """Find out what this machine is; `InputError` where `device` is not there."""
    try:
        return Run(**run_task(Describe(device, tuple(backends))), **options)
    except TaskFailed as error:
        raise InputError(str(error)) from error


def run_rows(run: Run, rows: list[Row], output: Path, jobs: int = 1) -> Iterator[AnyRecord]:
    """Measure `rows` in their order; each record is in the file before it is yielded.

    Which backends cannot run comes first; then references, model files and what compilers keep are
    made, `jobs` at a time, and every backend is opened once.
    """
    broken = {_kind(row): run.unavailable[row.backend] for row in rows}
    yield from _unavailable(run, rows, broken, output)
    rows = [row for row in rows if not broken[_kind(row)]]
    references = make_references(run, rows, jobs)
    files = make_files(run, rows, jobs)
    fill_compiler_cache(run, rows, jobs)
    broken = try_out(run, rows, files)
    yield from _unavailable(run, rows, broken, output)
    rows = [row for row in rows if not broken.get(_kind(row))]
    with Bar("row", len(rows)) as bar:
        for row in rows:
            bar.start(str(row))
            record = measure_row(run, row, references[reference_key(row)], files.get(row), bar)
            append_record(output, record)
            bar.finish()
            yield record


Kind = tuple[str, str, str]  # backend, precision and graph
Reasons = dict[Kind, str | None]  # why one cannot run


def _kind(row: Row) -> Kind:
    return row.backend, row.precision, row.graph


def _unavailable(run: Run, rows: list[Row], reasons: Reasons, output: Path) -> Iterator[AnyRecord]:
    """A record of each backend that cannot run here, in the file before it is yielded."""
    for (backend, reason), group in itertools.groupby(
        sorted((row.backend, reasons.get(_kind(row)) or "") for row in rows)
    ):
        if reason:
            fields = {"status": "unavailable", "backend": backend, "reason": reason}
            record = make_record(fields | {"rows": len(list(group))} | run.origin())
            append_record(output, record)
            yield record


def try_out(run: Run, rows: list[Row], files: dict[Row, "ModelFile | TaskFailed"]) -> Reasons:
    """Open every backend once in each precision, before minutes go into others; why one cannot.

    It also runs once, unless it would have to compile first. What fails for another reason than one
    that was to be expected fails in its rows.
    """
    smallest: dict[Kind, Row] = {}
    for row in sorted(rows, key=lambda row: (row.width * row.height * row.batch, row.top_k)):
        if not isinstance(files.get(row), TaskFailed):
            smallest.setdefault(_kind(row), row)
    tasks = [
        TryOut(
            row,
            row.spec(run.device, run.weights, files[row][0] if row in files else None),
            run.images_of(row).paths[0],
            runs=not get_backend(row.backend).compiles,
            matcher_weights=run.matcher_weights,
        )
        for row in smallest.values()
    ]
    with Bar("tried", len(tasks)) as bar:
        failures = run_tasks(tasks, 1, bar.finish, run.compiler_cache)
    return {
        key: str(failure)
        for key, failure in zip(smallest, failures, strict=True)
        if failure and failure.expected
    }


def make_references(run: Run, rows: list[Row], jobs: int) -> dict[Any, Path]:
    """Return the reference's file of every row, by `reference_key`; made and kept where missing."""
    largest: dict[Any, Row] = {}
    for row in rows:
        key = reference_key(row)
        if key not in largest or row.top_k > largest[key].top_k:
            largest[key] = row
    paths = {key: reference_path(run, row) for key, row in largest.items()}
    tasks = [
        MakeReference(
            row.spec("cpu", run.weights, None),
            run.images_of(row),
            paths[key],
            jobs,
            run.matcher_weights,
            row.graph,
        )
        for key, row in largest.items()
        if not paths[key].exists()
    ]
    with Bar("reference", len(tasks)) as bar:
        for failure in filter(None, run_tasks(tasks, jobs, bar.finish)):
            raise InputError(f"the reference cannot be made: {failure}") from failure
    return paths


def reference_path(run: Run, row: Row) -> Path:
    """Return where the reference of a row is kept."""
    graph = "extractor" if row.graph == "extractor" else "pair"
    single = replace(row, batch=1, precision="fp32", graph=graph)
    made_on = run.made_on | {"images": run.images_of(row).sha256}
    return cached_path(single, ".expected.npz", run.weights, made_on)


def reference_key(row: Row) -> tuple:
    """Rows of one key share a reference: it is made for the largest K, best keypoints first."""
    size = (row.width, row.height)
    # Matches of the best keypoints alone are others.
    matched_k = None if row.graph == "extractor" else row.top_k
    return row.model, row.image_set, size, row.top_k > 0, row.scores_th, row.n_limit, matched_k


ModelFile = tuple[Path, float]  # and the seconds that it took to make


def make_files(run: Run, rows: list[Row], jobs: int) -> dict[Row, ModelFile | TaskFailed]:
    """Return the model file of every row whose backend runs one: the user's, or made and kept."""
    files: dict[Row, ModelFile | TaskFailed] = {}
    builds: dict[Row, BuildFile] = {}
    for row in rows:
        suffix = get_backend(row.backend).suffix
        if suffix and run.model_path and run.model_path.suffix == suffix:
            files[row] = (run.model_path, 0.0)
        elif suffix:
            path = cached_path(row, suffix, run.weights, run.made_on)
            spec = row.spec(run.device, run.weights, None)
            shape = (row.batch, row.height, row.width)
            builds[row] = BuildFile(spec, shape, path, row.graph, run.matcher_weights)
    unlike = {build.path: build for build in builds.values()}
    with Bar("model file", len(unlike)) as bar:
        made = build_files(unlike.values(), jobs, bar.finish)
    for row, build in builds.items():
        result = made[build.path]
        files[row] = result if isinstance(result, TaskFailed) else (build.path, result)
    return files


def fill_compiler_cache(run: Run, rows: list[Row], jobs: int) -> None:
    """Compile for every row that the cache lacks, where one is kept; what fails, fails in its row.

    Every extractor that has run leaves a note beside what its compilers keep.
    """
    if run.compiler_cache is None:
        return
    tasks = [
        TryOut(
            row,
            row.spec(run.device, run.weights, None),
            run.images_of(row).paths[0],
            note=note,
            matcher_weights=run.matcher_weights,
        )
        for row in rows
        if get_backend(row.backend).compiles and not (note := compiler_note(run, row)).exists()
    ]
    with Bar("compiled", len(tasks)) as bar:
        run_tasks(tasks, jobs, bar.finish, run.compiler_cache)


def compiler_note(run: Run, row: Row) -> Path:
    """Return the file that says that the kept compiler cache has all that `row` needs."""
    made_on = run.made_on | {"runtime": row.runtime}
    name = cached_path(row, f"-{row.backend}.json", run.weights, made_on).name
    return run.compiler_cache / "filled" / name


def measure_row(
    run: Run, row: Row, reference: Path, file: ModelFile | TaskFailed | None, bar: "Bar"
) -> AnyRecord:
    """Measure one row in processes of its own; what goes wrong is a record too."""
    fields = {"row": row, "weights_sha256": run.weights_sha256(row.model)}
    path, build_s = (None, 0.0) if file is None or isinstance(file, TaskFailed) else file
    spec = row.spec(run.device, run.weights, path)
    images = run.images_of(row)
    task = Measure(
        row, spec, images, reference, run.limits, run.min_similarity, run.matcher_weights
    )
    try:
        if isinstance(file, TaskFailed):
            raise file
        results = [
            run_task(task, bar.progress, run.compiler_cache) for _ in range(run.limits.processes)
        ]
        fields |= {"status": "ok", "build_s": build_s} | merged(results)
    except TaskFailed as error:
        fields |= {"status": "not run" if error.expected else "failed", "reason": str(error)}
    return make_record(fields | run.origin())


class Bar(contextlib.AbstractContextManager):
    """A progress bar over rows or files, with what the current one is doing."""

    def __init__(self, unit: str, total: int):
        self.bar = tqdm(
            total=total,
            disable=None if total else True,  # None: where the output is no terminal
            dynamic_ncols=True,
            bar_format=unit + " {n_fmt}/{total_fmt} |{bar:12}| {elapsed} {desc}{postfix}",
        )

    def __exit__(self, *details: Any) -> None:
        self.bar.close()

    def start(self, what: str) -> None:
        """Name the row or file."""
        self.bar.set_description_str(what, refresh=False)
        self.bar.set_postfix_str("starting")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show the stage of the row."""
        self.bar.set_postfix_str(f"{stage} {done}/{total}" if total > 1 else stage)

    def finish(self) -> None:
        """Count one as done."""
        self.bar.update()
