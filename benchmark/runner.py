"""One row measured in several processes, as one result.

What differs from process to process, such as the core that it runs on, shows in no single one: all
its runs may agree within a percent, and be a fifth off."""

import contextlib
import functools
import hashlib
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from aliked.backends import get_backend
from aliked.errors import InputError
from aliked.files import sha256
from aliked.images import list_images, load_image, require_same_size
from aliked.weights import find_weights
from benchmark.artifacts import Artifact, artifact_path, make_artifacts
from benchmark.environment import ROOT, git_commit, span
from benchmark.process import TaskFailed, run_task, run_tasks
from benchmark.records import CLOCKS, SCHEMA, append_record
from benchmark.rows import ImageSet, Row, row_fields
from benchmark.timing import REPEATED_WITHIN, Limits, apart, summary


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


@dataclass(frozen=True)
class Session:
    """What all rows of a run share."""

    device: str  # such as "cpu" or "cuda:0"
    machine: dict
    versions: dict
    unavailable: dict[str, str | None]  # backend to the reason why it cannot run here
    image_sets: dict[str, ImageSet]
    limits: Limits
    weights: Path | None = None
    model_path: Path | None = None
    compiler_cache: Path | None = None  # kept from row to row; None: empty for every row
    command: str = ""
    commit: str | None = field(default_factory=git_commit)

    def configuration(self) -> dict:
        """What must be the same for two records to belong to one table."""
        return {
            "limits": asdict(self.limits),
            "machine": self.machine,
            "versions": self.versions,
            "images": {name: images.sha256 for name, images in self.image_sets.items()},
            "model_path": self.model_path and sha256(self.model_path),
            "compiler_cache": "kept" if self.compiler_cache else "empty",
        }

    def task(self, row: Row, model_path: Path | None = None) -> dict:
        """What every task about `row` has."""
        return {
            "row": row_fields(row),
            "device": self.device,
            "weights": self.weights and str(self.weights),
            "model_path": model_path and str(model_path),
            "images": [str(path) for path in self.image_sets[row.image_set].paths],
        }


def open_session(
    device: str, backends: list[str], image_sets: list[ImageSet], limits: Limits, **files: Any
) -> Session:
    """Find out what this machine is; `InputError` where `device` is not there."""
    try:
        facts = run_task({"task": "describe", "device": device, "backends": backends})
    except TaskFailed as error:
        raise InputError(str(error)) from error
    return Session(**facts, image_sets={s.name: s for s in image_sets}, limits=limits, **files)


def load_image_sets(sources: list[Path]) -> list[ImageSet]:
    """One set per folder, and one of all single files; `InputError` where sizes differ in a set."""
    files = [path for path in sources if path.is_file()]
    sets = [
        _image_set(path.resolve().name, list_images(path)) for path in sources if path not in files
    ]
    if files:
        sets.append(_image_set("files", files))
    names = [images.name for images in sets]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders have the same name ({', '.join(names)}); rename one")
    return sets


def _image_set(name: str, paths: list[Path]) -> ImageSet:
    if len({path.name for path in paths}) < len(paths):
        raise InputError("two of the images have the same name; rename one")
    for _, image in require_same_size((path, load_image(path)) for path in paths):
        height, width = image.shape[:2]
    digest = hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()
    return ImageSet(name, tuple(path.resolve() for path in paths), width, height, digest)


def run_rows(session: Session, rows: list[Row], output: Path, jobs: int = 1) -> Iterator[dict]:
    """Measure `rows` in their order; each record is in the file before it is yielded.

    References, model files and what compilers keep come first, `jobs` at a time.
    """
    can_run = [row for row in rows if not session.unavailable[row.backend]]
    references = make_references(session, can_run, jobs)
    files = make_files(session, can_run, jobs)
    fill_compiler_cache(session, can_run, jobs)
    with Bar("row", len(rows)) as bar:
        for row in rows:
            bar.start(str(row))
            record = make_record(session, row, references, files, bar)
            append_record(output, record)
            bar.finish()
            yield record


def make_references(session: Session, rows: list[Row], jobs: int) -> dict[Any, Path]:
    """The reference's file of every row, by `reference_key`: PyTorch in float32 on the CPU.

    They are kept, as model files are.
    """
    largest: dict[Any, Row] = {}
    for row in rows:
        key = reference_key(row)
        if key not in largest or row.top_k > largest[key].top_k:
            largest[key] = row
    paths = {key: reference_path(session, row) for key, row in largest.items()}
    tasks = [
        session.task(row) | {"task": "reference", "path": str(paths[key]), "jobs": jobs}
        for key, row in largest.items()
        if not paths[key].exists()
    ]
    with Bar("reference", len(tasks)) as bar:
        for failure in filter(None, run_tasks(tasks, jobs, bar.finish)):
            raise InputError(f"the reference cannot be made: {failure}") from failure
    return paths


def reference_path(session: Session, row: Row) -> Path:
    """Where the reference of a row is kept."""
    made_on = {
        "versions": session.versions,
        "machine": session.machine,
        "images": session.image_sets[row.image_set].sha256,
    }
    single = replace(row, batch=1, precision="fp32")
    return artifact_path(single, ".expected.npz", session.weights, made_on)


def reference_key(row: Row) -> tuple:
    """Rows of one key share a reference: it is made for the largest K, best keypoints first."""
    return row.model, row.image_set, row.top_k > 0, row.scores_th, row.n_limit


def make_files(session: Session, rows: list[Row], jobs: int) -> dict[Row, Artifact | TaskFailed]:
    """The model file of every row whose backend runs one: the user's, or built and kept."""
    given, paths, tasks = session.model_path, {}, {}
    made_on = {"versions": session.versions, "machine": session.machine}
    for row in rows:
        suffix = get_backend(row.backend).suffix
        if suffix and given and given.suffix == suffix:
            paths[row] = given
        elif suffix:
            paths[row] = artifact_path(row, suffix, session.weights, made_on)
            tasks[paths[row]] = session.task(row)
    with Bar("model file", len(tasks)) as bar:
        made = make_artifacts(tasks, jobs, bar.finish)
    return {row: made.get(path) or Artifact(path, 0.0) for row, path in paths.items()}


def fill_compiler_cache(session: Session, rows: list[Row], jobs: int) -> None:
    """Compile for every row that the cache lacks, where one is kept; what fails, fails in its row.

    Every extractor that has run leaves a note beside what its compilers keep.
    """
    if session.compiler_cache is None:
        return
    compiled = [row for row in rows if get_backend(row.backend).compiles]
    tasks = [
        session.task(row) | {"task": "fill_cache", "note": str(note)}
        for row in compiled
        if not (note := compiler_note(session, row)).exists()
    ]
    with Bar("compiled", len(tasks)) as bar:
        run_tasks(tasks, jobs, bar.finish, session.compiler_cache)


def compiler_note(session: Session, row: Row) -> Path:
    """The file that says that the kept compiler cache has all that `row` needs."""
    made_on = {
        "versions": session.versions,
        "machine": session.machine,
        "runtime": row.runtime,
        "kernels": _kernels(),
    }
    name = artifact_path(row, f"-{row.backend}.json", session.weights, made_on).name
    return session.compiler_cache / "filled" / name


@functools.cache
def _kernels() -> str:
    """A hash of the fused kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "aliked" / "fused").glob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def make_record(
    session: Session,
    row: Row,
    references: dict[Any, Path],
    files: dict[Row, Artifact | TaskFailed],
    bar: "Bar",
) -> dict:
    """Measure one row; what goes wrong is a record too."""
    record = {"schema": SCHEMA, "row": row_fields(row)}
    try:
        record |= {"status": "ok"} | measure_row(session, row, references, files.get(row), bar)
    except TaskFailed as error:
        record |= {"status": "not run" if error.expected else "failed", "reason": str(error)}
    return record | {
        "weights_sha256": sha256(find_weights(row.model, session.weights)),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": session.commit,
        "command": session.command,
        "configuration": session.configuration(),
    }


def measure_row(
    session: Session,
    row: Row,
    references: dict[Any, Path],
    file: Artifact | TaskFailed | None,
    bar: "Bar",
) -> dict:
    """Measure in processes of its own; `TaskFailed` where that cannot be done in any of them."""
    reason = session.unavailable[row.backend]
    if reason:
        raise TaskFailed(reason, expected=True)
    if isinstance(file, TaskFailed):
        raise file
    task = session.task(row, file.path if file else None) | {
        "task": "measure",
        "reference": str(references[reference_key(row)]),
        "limits": asdict(session.limits),
    }
    results = [
        run_task(task, bar.progress, session.compiler_cache)
        for _ in range(session.limits.processes)
    ]
    return {"build_s": file.build_s if file else 0.0} | merged(results)


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
        """One is done."""
        self.bar.update()
