"""What is measured: images, and every combination asked for, in an order that a seed decides."""

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from aliked.backends import Spec, get_backend
from aliked.configs import PRECISIONS, Selection, get_config
from aliked.errors import InputError
from aliked.files import real_path, sha256
from aliked.images import list_images, load_image, load_readable


@dataclass(frozen=True)
class ImageSet:
    """Images of one size."""

    name: str
    paths: tuple[Path, ...] = field(repr=False)
    width: int
    height: int
    sha256: str  # of the files' contents, in order
    max_size: int | None = None  # pixels: the longer side that larger images are reduced to

    @property
    def key(self) -> tuple[str, int, int]:
        """What a row names it by."""
        return self.name, self.width, self.height

    def load(self) -> dict:
        """Return the images by file name, uint8 [H, W, 3] RGB each."""
        return {path.name: load_image(path, max_size=self.max_size) for path in self.paths}


def load_image_sets(sources: list[Path], max_size: int | None = None) -> list[ImageSet]:
    """Return a set for every image size of each folder, and of all single files together.

    Images that cannot be read are passed over. `InputError` where a folder has no other, or two
    sets could not be told apart.
    """
    files = [path for path in sources if path.is_file()]
    folders = {real_path(path): path for path in sources if path not in files}
    names = [path.name for path in folders]
    if len(set(names)) < len(names):
        raise InputError(f"two of the folders have the same name ({', '.join(names)}); rename one")
    sets = [
        images
        for path in folders
        for images in _sets_by_size(path.name, list_images(folders[path]), max_size)
    ]
    return [*sets, *_sets_by_size("files", files, max_size)]


def _sets_by_size(name: str, paths: list[Path], max_size: int | None) -> Iterator[ImageSet]:
    by_size: dict[tuple[int, int], list[Path]] = {}
    for path, image in load_readable(paths, max_size):
        height, width = image.shape[:2]
        by_size.setdefault((width, height), []).append(path)
    for size, own in by_size.items():
        if len({path.name for path in own}) < len(own):
            raise InputError("two of the images have the same name; rename one")
        digest = hashlib.sha256("".join(map(sha256, own)).encode()).hexdigest()
        resolved = tuple(path.resolve() for path in own)
        yield ImageSet(name, resolved, *size, digest, max_size)


Count = Annotated[int, Meta(ge=1)]
# By `Row.graph`, what is written behind a model's name.
SUBJECTS = {
    "extractor": "",
    "pair": ", two images to LightGlue's matches",
    "matcher": ", LightGlue alone",
}


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one row measures. The fields are what a record is found by."""

    backend: str
    device: Literal["cpu", "cuda"]  # where it has to run
    model: str
    top_k: Annotated[int, Meta(ge=0)]  # 0: threshold mode
    scores_th: float | None  # of threshold mode
    n_limit: Count | None
    image_set: str
    width: Count
    height: Count
    precision: Literal[PRECISIONS]
    batch: Count
    compile_mode: str | None  # of backend pytorch-compile
    # One image to features, two images to LightGlue's matches, or these of given features.
    graph: Literal["extractor", "pair", "matcher"] = "extractor"

    def __post_init__(self) -> None:
        get_config(self.model)
        if self.top_k == 0 and (self.scores_th is None or self.n_limit is None):
            raise InputError("top_k is 0, but scores_th or n_limit is missing")
        if self.graph != "extractor" and (self.top_k == 0 or self.batch > 1):
            raise InputError("LightGlue is timed with a fixed K, one pair at a time")

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
    def size(self) -> str:
        """Width and height of the images."""
        return f"{self.width}x{self.height}"

    @property
    def images(self) -> str:
        """Size and origin of the images."""
        name = self.image_set
        return self.size if name.endswith(self.size) else f"{self.size} {name}"

    @property
    def images_per_run(self) -> int:
        """How many images go through one timed run, or their features."""
        return self.batch if self.graph == "extractor" else 2

    @property
    def subject(self) -> str:
        """The model, and what is done beside extracting, in words."""
        return self.model + SUBJECTS[self.graph]

    @property
    def selection(self) -> Selection:
        """Which keypoints are kept."""
        if self.top_k > 0:
            return Selection(self.top_k)
        return Selection(0, self.scores_th, self.n_limit)

    def spec(self, device: str, weights: Path | None, model_path: Path | None) -> Spec:
        """Return the extractor that this row measures, on `device` such as "cuda:1"."""
        return Spec(
            model=self.model,
            top_k=self.selection.top_k,
            scores_th=self.selection.scores_th,
            n_limit=self.selection.n_limit,
            precision=self.precision,
            device=self.device if self.device == "cpu" else device,
            weights=weights,
            model_path=model_path,
            compile_mode=self.compile_mode or Spec.compile_mode,
        )

    def __str__(self) -> str:
        batch = f", batch {self.batch}" if self.batch > 1 else ""
        return (
            f"{self.runtime} {self.precision}, {self.subject}, K {self.selection}, "
            f"{self.images}{batch}"
        )


@dataclass(frozen=True)
class Grid:
    """What the command line asks for: every combination is a row."""

    backends: list[str]
    models: list[str]
    top_ks: list[int]
    precisions: list[str] | None  # None: float32, or half precision where there is nothing else
    batches: list[int]
    scores_th: float = Spec.scores_th
    n_limit: int = Spec.n_limit
    compile_mode: str = Spec.compile_mode
    graphs: tuple[str, ...] = ("extractor",)

    def rows(self, image_sets: list[ImageSet], device: str, seed: int) -> list[Row]:
        """Return every combination once, shuffled: what drifts with time then favours none."""
        combinations = itertools.product(
            dict.fromkeys(self.backends),
            dict.fromkeys(self.models),
            dict.fromkeys(self.top_ks),
            image_sets,
            dict.fromkeys(self.batches),
            self.graphs,
        )
        rows = [
            Row(
                backend=backend,
                device=device_of(backend, device),
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
                graph=graph,
            )
            for backend, model, top_k, images, batch, graph in combinations
            for precision in self.precisions_of(backend)
        ]
        random.Random(seed).shuffle(rows)
        return rows

    def precisions_of(self, backend: str) -> list[str]:
        """Return those precisions asked for that the backend has."""
        has = get_backend(backend).precisions
        asked = has[:1] if self.precisions is None else dict.fromkeys(self.precisions)
        return [precision for precision in asked if precision in has]


def device_of(backend: str, device: str) -> str:
    """Return where a backend has to run, "cpu" or "cuda": on `device` if it can run on both."""
    devices, wanted = get_backend(backend).devices, device.partition(":")[0]
    return wanted if wanted in devices else devices[0]
