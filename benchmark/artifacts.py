"""Files that a runtime runs instead of the model: made once, kept in the user cache."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.features import Features
from aliked.files import sha256, whole_file
from aliked.ties import Expected
from aliked.weights import cache_dir, find_weights
from benchmark.environment import ROOT
from benchmark.process import TaskFailed, run_tasks
from benchmark.rows import Row


@dataclass(frozen=True)
class Artifact:
    """A model file and how long it took to make, seconds."""

    path: Path
    build_s: float


def artifact_path(row: Row, suffix: str, weights: Path | None, made_on: dict) -> Path:
    """Where the file for `row` is kept; `made_on` is the machine and the versions it depends on.

    The backend is no part of the name: one ONNX file serves several.
    """
    selection = f"k{row.top_k}" if row.top_k > 0 else f"th{row.scores_th:g}-{row.n_limit}"
    parts = {
        "weights": sha256(find_weights(row.model, weights)),
        "code": _code(),
        "made_on": made_on,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    size = f"{row.width}x{row.height}x{row.batch}"
    name = f"{row.model}-{selection}-{size}-{row.precision}-{key}{suffix}"
    return cache_dir() / "benchmark" / name


def make_artifacts(
    tasks: dict[Path, dict], jobs: int, made: Callable[[], None]
) -> dict[Path, Artifact | TaskFailed]:
    """Build those of the files that are not there yet, `jobs` at a time, or say why one is not.

    Each task is what `worker.build` needs besides the path. Calls `made()` after every build.
    """
    missing = [path for path in tasks if not (path.exists() and _note(path).exists())]
    builds = []
    for path in missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        builds.append(tasks[path] | {"task": "build", "path": str(path), "note": str(_note(path))})
    results = dict(zip(missing, run_tasks(builds, jobs, made), strict=True))
    failed = {path: result for path, result in results.items() if isinstance(result, TaskFailed)}
    return {path: failed.get(path) or _artifact(path) for path in tasks}


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.build.json")


def _artifact(path: Path) -> Artifact:
    return Artifact(path, json.loads(_note(path).read_text())["build_s"])


def _code() -> str:
    """A hash of the modules that make model files: another version of them makes other files."""
    digest = hashlib.sha256()
    for folder in ("aliked", "aliked/backends"):
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


PARTS = ("keypoints", "scores", "descriptors")


def make_reference(spec: Spec, images: dict[str, np.ndarray], path: Path) -> None:
    """Extract the features of uint8 images, by name, as `spec` on the CPU, and write them."""
    extractor, arrays = PyTorchExtractor(spec), {}
    for name, image in images.items():
        expected = extractor.expect(image)
        arrays |= {f"{name}/{part}": getattr(expected.features, part) for part in PARTS}
        arrays[f"{name}/ties"] = expected.ties
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path, k: int | None) -> dict[str, Expected]:
    """What is expected by image name, the best `k` of each (None: all)."""
    with np.load(path) as arrays:
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {
            name: Expected(
                Features(**{part: arrays[f"{name}/{part}"][:k] for part in PARTS}),
                arrays[f"{name}/ties"],
            )
            for name in names
        }
