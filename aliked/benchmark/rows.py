"""The rows of a benchmark: every combination asked for, in an order that a seed decides."""

import itertools
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aliked.backends import Spec

HALF_PRECISION_ONLY = {"pytorch-amp"}
ON_CPU_OR_GPU = {"pytorch", "pytorch-amp", "pytorch-compile", "aotinductor", "onnxruntime"}


@dataclass(frozen=True)
class ImageSet:
    """Images of one size."""

    name: str
    paths: tuple[Path, ...] = field(repr=False)
    width: int
    height: int
    sha256: str  # of the files' contents, in order


@dataclass(frozen=True)
class Row:
    """What one row measures. The fields are what a record is found by."""

    backend: str
    device: str  # "cpu" or "cuda": where it has to run
    model: str
    top_k: int  # <= 0: threshold mode
    scores_th: float | None  # of threshold mode
    n_limit: int | None
    image_set: str
    width: int
    height: int
    precision: str
    batch: int
    compile_mode: str | None  # of backend pytorch-compile

    @property
    def runtime(self) -> str:
        """The backend, and what sets this row apart from others of that backend."""
        name = self.backend
        if self.compile_mode not in (None, Spec.compile_mode):
            name += f" [{self.compile_mode}]"
        if self.device == "cpu" and not name.endswith("-cpu"):
            name += " (CPU)"
        return name

    @property
    def images(self) -> str:
        """Size and origin of the images."""
        size = f"{self.width}x{self.height}"
        return size if self.image_set.endswith(size) else f"{size} {self.image_set}"

    @property
    def selection(self) -> str:
        """Which keypoints: "1000", or "score > 0.2 (max 5000)"."""
        if self.top_k > 0:
            return str(self.top_k)
        return f"score > {self.scores_th:g} (max {self.n_limit})"

    def keypoints(self) -> int:
        """How many rows a runtime has to return per image, fill-ins included."""
        room = (self.height - 4) * (self.width - 4)
        return min(self.top_k if self.top_k > 0 else self.n_limit, room)

    def spec(self, device: str, weights: Path | None, model_path: Path | None) -> Spec:
        """The extractor that this row measures, on `device` such as "cuda:1"."""
        return Spec(
            model=self.model,
            top_k=self.top_k,
            scores_th=Spec.scores_th if self.scores_th is None else self.scores_th,
            n_limit=self.n_limit or Spec.n_limit,
            precision=self.precision,
            device=self.device if self.device == "cpu" else device,
            weights=weights,
            model_path=model_path,
            compile_mode=self.compile_mode or Spec.compile_mode,
        )

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return (
            f"{self.runtime} {self.precision}, {self.model}, K {self.selection}, "
            f"{self.images}{batch}"
        )


@dataclass(frozen=True)
class Grid:
    """What the command line asks for."""

    backends: list[str]
    models: list[str]
    top_ks: list[int]
    precisions: list[str]
    batches: list[int]
    scores_th: float = Spec.scores_th
    n_limit: int = Spec.n_limit
    compile_mode: str = Spec.compile_mode

    def rows(self, image_sets: list[ImageSet], device: str, seed: int) -> list[Row]:
        """Every combination once, shuffled: what drifts with time then favours no runtime."""
        combinations = itertools.product(
            dict.fromkeys(self.backends),
            dict.fromkeys(self.models),
            dict.fromkeys(self.top_ks),
            image_sets,
            dict.fromkeys(self.precisions),
            dict.fromkeys(self.batches),
        )
        rows = [
            Row(
                backend=backend,
                device=place_of(backend, device),
                model=model,
                top_k=max(top_k, 0),
                scores_th=self.scores_th if top_k <= 0 else None,
                n_limit=self.n_limit if top_k <= 0 else None,
                image_set=images.name,
                width=images.width,
                height=images.height,
                precision=precision,
                batch=batch,
                compile_mode=self.compile_mode if backend == "pytorch-compile" else None,
            )
            for backend, model, top_k, images, precision, batch in combinations
            if precision == "fp16" or backend not in HALF_PRECISION_ONLY
        ]
        random.Random(seed).shuffle(rows)
        return rows


def place_of(backend: str, device: str) -> str:
    """Where a backend has to run, "cpu" or "cuda": on `device` if it can run on both."""
    if backend in ON_CPU_OR_GPU:
        return device.partition(":")[0]
    return "cpu" if backend.endswith("-cpu") else "cuda"


def row_of(record: dict) -> Row:
    """The row that a record is of."""
    return Row(**record["row"])


def row_fields(row: Row) -> dict:
    """A row as a record holds it."""
    return asdict(row)
