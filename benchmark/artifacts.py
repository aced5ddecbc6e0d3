"""What is made once and kept in the user cache: model files, references, what compilers leave."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from aliked.backends import Spec, create_extractor, create_pair_runtime
from aliked.backends.pytorch import PyTorchExtractor
from aliked.backends.tensorrt import precision_of, read_manifest
from aliked.configs import Selection, get_config
from aliked.errors import InputError
from aliked.export.build import build_lightglue_file, build_model_file
from aliked.export.engine import read_source
from aliked.features import Features
from aliked.files import code_digest, open_regular, read_text, sha256, whole_file, write_json
from aliked.images import load_image
from aliked.lightglue import LightGlue
from aliked.matching import Matches, matcher_inputs
from aliked.ties import Expected
from aliked.weights import cache_dir, find_weights
from benchmark.process import TaskFailed, run_tasks
from benchmark.rows import ImageSet, Row
from benchmark.timing import Progress


def cached_path(row: Row, suffix: str, weights: Path | None, made_on: dict) -> Path:
    """Return where the file for `row` is kept; `made_on` is what it depends on besides the code.

    The backend is no part of the name: one ONNX file serves several.
    """
    size = [row.width, row.height, row.batch]
    selection = row.selection
    parts = {
        "row": [row.model, row.graph, str(selection), *size, row.precision],
        "weights": sha256(find_weights(row.model, weights)),
        "code": code_digest(Path(__file__)),
        "made_on": made_on,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    limit = f"th{selection.scores_th:g}-{selection.n_limit}"
    keypoints = limit if selection.by_threshold else f"k{row.top_k}"
    name = f"{row.model}-{keypoints}-{row.size}x{row.batch}-{row.precision}-{key}{suffix}"
    return cache_dir() / "benchmark" / name


def share_the_processor(jobs: int) -> None:
    """Give PyTorch in this process its share of the threads: all of them in each slow all down."""
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


@dataclass(frozen=True)
class BuildFile:
    """Make the file that a backend runs, for images of one shape, and note how long that took."""

    spec: Spec
    shape: tuple[int, int, int]  # B, H, W
    path: Path
    graph: str = "extractor"
    matcher_weights: Path | None = None  # of the other graphs
    jobs: int = 1  # that run at the same time

    @property
    def device(self) -> str:
        """Where it is made."""
        return self.spec.device

    @property
    def note(self) -> Path:
        """The file with the seconds that it took."""
        return self.path.with_name(f"{self.path.name}.build.json")

    def run(self, progress: Progress) -> None:
        """Write the file, then the note."""
        share_the_processor(self.jobs)  # exporters run the model
        start = time.perf_counter()
        if self.graph == "extractor":
            build_model_file(self.spec, self.shape, self.path)
        else:
            height, width = self.shape[1:]
            build_lightglue_file(
                self.spec, self.graph, (width, height), self.matcher_weights, self.path
            )
        write_json(self.note, {"build_s": time.perf_counter() - start})

    def seconds(self) -> float | None:
        """Return what the note says, None where there is no such file yet, or no whole note."""
        if not self.path.exists():
            return None
        try:
            return float(json.loads(self.note.read_text())["build_s"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def build_files(
    builds: Iterable[BuildFile], jobs: int = 1, done: Callable[[], None] = lambda: None
) -> dict[Path, float | TaskFailed]:
    """Build what is not there yet, `jobs` at a time; the seconds by path, or why there is none.

    Calls `done()` after every build.
    """
    builds = [replace(build, jobs=jobs) for build in builds]
    missing = [build for build in builds if build.seconds() is None]
    for build in missing:
        build.path.parent.mkdir(parents=True, exist_ok=True)
    results = dict(zip(missing, run_tasks(missing, jobs, done), strict=True))
    return {build.path: results.get(build) or build.seconds() for build in builds}


def check_model_file(path: Path, rows: Iterable[Row], weights: Mapping[str, str]) -> None:
    """Refuse a user's model file that one of `rows` would not be measured by, as far as it tells.

    `weights` is the SHA-256 of every model's. `InputError` names what the file is of.
    """
    facts = facts_of(path)
    for row in rows:
        wanted = {
            "model": row.model,
            "precision": row.precision,
            "selection": row.selection,
            "batch, height and width": (row.batch, row.height, row.width),
            "weights": weights[row.model],
        }
        for name, value in wanted.items():
            has = facts.get(name)
            if has is not None and not _same(value, has):
                raise InputError(
                    f"{path} cannot be measured as {row}: its {name} is {_short(has)}, not "
                    f"{_short(value)}; give a file made for that, or leave --model_path out"
                )


def facts_of(path: Path) -> dict[str, Any]:
    """Return what a model file says of itself; `InputError` where it is none of this project."""
    with open_regular(path, most_bytes=None):
        pass
    if path.suffix == ".pt2":
        return {}  # says for which shape and device it is, and its extractor looks
    manifest = _beside(path)
    if path.suffix == ".onnx":
        source = read_source(path)
        export, precision = source.export, source.precision
        shape = source.shape[:3] if source.uint8 else (source.shape[0], *source.shape[2:4])
        weights = manifest.get("weights") if manifest.get("sha256") == sha256(path) else None
    else:
        engine = read_manifest(path)
        export, precision = engine["source"]["export"], precision_of(engine)
        shape = weights = None
    try:
        export = msgspec.convert(export, Exported)
    except msgspec.ValidationError as error:
        raise InputError(
            f"{path} does not say what it holds ({error}); export it with "
            "convert_pytorch_to_onnx.py"
        ) from error
    return {
        "model": export.model,
        "precision": str(precision).lower(),
        "selection": Selection(export.top_k, export.scores_th, export.n_limit, export.strict),
        "batch, height and width": shape,
        "weights": weights.get("sha256") if isinstance(weights, dict) else None,
    }


class Exported(msgspec.Struct):
    """What an export writes into its file, as far as a row depends on it."""

    model: str
    top_k: int
    scores_th: float
    n_limit: int
    strict: bool = False  # which older files do not say


def _beside(path: Path) -> dict:
    """The manifest that the export wrote beside a file; empty where there is none."""
    try:
        manifest = json.loads(read_text(path.with_name(f"{path.name}.json")))
    except (ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _same(wanted: Any, has: Any) -> bool:
    if isinstance(wanted, Selection):
        return str(wanted) == str(has)  # which says what of it is used
    if isinstance(wanted, tuple):
        return all(size in (-1, own) for size, own in zip(has, wanted, strict=True))
    return wanted == has


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join("any" if size == -1 else str(size) for size in value)
    return str(value)[:40]


PARTS = ("keypoints", "scores", "descriptors")


@dataclass(frozen=True)
class MakeReference:
    """Extract what other runtimes are compared with: PyTorch in float32 on the CPU."""

    spec: Spec
    images: ImageSet
    path: Path
    jobs: int = 1  # that run at the same time
    matcher_weights: Path | None = None
    graph: str = "extractor"  # of another also the matches of each image with the next

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu"

    def run(self, progress: Progress) -> None:
        """Write the features, and where rounding decides about them, of every image."""
        share_the_processor(self.jobs)
        extractor = PyTorchExtractor(replace(self.spec, device="cpu", precision="fp32"))
        arrays = {}
        for name, image in self.images.load().items():
            expected = extractor.expect(image)
            arrays |= {f"{name}/{part}": getattr(expected.features, part) for part in PARTS}
            arrays[f"{name}/ties"] = expected.ties
        if self.graph != "extractor":
            arrays |= self._matches(arrays)
        with whole_file(self.path) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def _matches(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """LightGlue's matches of each image with the next, of the features in `arrays`."""
        matcher, size = LightGlue.from_pretrained(self.matcher_weights), self.images.key[1:]
        names = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        prepared = [
            matcher.prepare(Features(**{p: arrays[f"{name}/{p}"] for p in PARTS}), size)
            for name in names
        ]
        found = {}
        for number, (first, second) in enumerate(itertools.pairwise(prepared)):
            matches = matcher.match_prepared(first, second)
            found[f"{MATCHES}/{number}/indices"] = matches.indices
            found[f"{MATCHES}/{number}/scores"] = matches.scores
        return found


MATCHES = "matches"  # no name of an image, which has a suffix


def load_matches(path: Path) -> list[Matches]:
    """Return the matches that are expected of each image with the next."""
    with np.load(path) as arrays:
        count = sum(key.startswith(f"{MATCHES}/") for key in arrays) // 2
        return [
            Matches(arrays[f"{MATCHES}/{i}/indices"], arrays[f"{MATCHES}/{i}/scores"])
            for i in range(count)
        ]


def load_reference(path: Path, k: int | None) -> dict[str, Expected]:
    """Return what is expected by image name, the best `k` of each (None: all)."""
    with np.load(path) as arrays:
        own = [key for key in arrays if not key.startswith(f"{MATCHES}/")]
        names = dict.fromkeys(key.rpartition("/")[0] for key in own)
        return {
            name: Expected(
                Features(**{part: arrays[f"{name}/{part}"][:k] for part in PARTS}),
                arrays[f"{name}/ties"],
            )
            for name in names
        }


@dataclass(frozen=True)
class TryOut:
    """Open an extractor, and perhaps run it: does it, and what do its compilers keep?"""

    row: Row
    spec: Spec
    image: Path
    runs: bool = True
    note: Path | None = None  # written when it has run
    matcher_weights: Path | None = None

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.spec.device

    def run(self, progress: Progress) -> None:
        """Open the extractor and give it a batch, then write the note."""
        row = self.row
        if row.graph == "extractor":
            runtime = create_extractor(row.backend, self.spec)
        else:
            size = row.width, row.height
            weights = self.matcher_weights
            runtime = create_pair_runtime(row.backend, row.graph, self.spec, weights, size)
        if not self.runs:
            return
        image = load_image(self.image, max_size=max(row.width, row.height))
        runtime.infer(runtime.to_device(self._example(image)))
        runtime.synchronize()
        if self.note:
            self.note.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.note, {"row": str(self.row)})

    def _example(self, image: np.ndarray) -> Any:
        """What the row's runtime takes, of one image."""
        row = self.row
        if row.graph == "extractor":
            return np.stack([image] * row.batch)
        if row.graph == "pair":
            return {"image0": image[None], "image1": image[None]}
        shapes = (row.top_k, 2), (row.top_k, get_config(row.model).dim), (row.top_k,)
        features = Features(*(np.zeros(shapes[part], np.float32) for part in (0, 2, 1)))
        size = row.width, row.height
        return matcher_inputs((features, features), (size, size), row.top_k)
