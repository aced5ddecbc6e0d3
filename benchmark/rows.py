"""The rows of a benchmark: every combination asked for, in an order that a seed decides."""

import argparse
import itertools
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aliked.backends import BACKENDS, Spec, get_backend
from aliked.cli import add_device_option, add_weights_option, check_selection
from aliked.configs import CONFIGS, get_config
from aliked.errors import InputError
from benchmark.timing import Limits


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
            if precision in get_backend(backend).precisions
        ]
        random.Random(seed).shuffle(rows)
        return rows


def place_of(backend: str, device: str) -> str:
    """Where a backend has to run, "cpu" or "cuda": on `device` if it can run on both."""
    devices, wanted = get_backend(backend).devices, device.partition(":")[0]
    return wanted if wanted in devices else devices[0]


def row_of(record: dict) -> Row:
    """The row that a record is of."""
    return Row(**record["row"])


def row_fields(row: Row) -> dict:
    """A row as a record holds it."""
    return asdict(row)


EVERY_BACKEND = [name for name in BACKENDS if name != "onnxruntime"]  # which chooses among others


def add_grid_options(group: argparse._ArgumentGroup) -> None:
    """Backends, models, K, precisions, batches, the device."""
    group.add_argument(
        "--backends",
        "--backend",
        nargs="+",
        default=["pytorch", "onnxruntime"],
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)}; all (default: pytorch onnxruntime)",
    )
    group.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[Spec.model],
        metavar="NAME",
        help=f"of {', '.join(CONFIGS)}; all (default: {Spec.model})",
    )
    group.add_argument(
        "--top_k",
        type=int,
        nargs="+",
        default=[Spec.top_k],
        metavar="K",
        help="keypoints per image, the best by score; 0: all above --scores_th "
        f"(default: {Spec.top_k})",
    )
    group.add_argument(
        "--scores_th", type=float, metavar="SCORE", help="with --top_k 0: lowest score, 0 to 1"
    )
    group.add_argument(
        "--n_limit",
        type=int,
        default=Spec.n_limit,
        metavar="N",
        help="with --top_k 0: at most so many keypoints per image (default: %(default)s)",
    )
    group.add_argument(
        "--precisions",
        "--precision",
        nargs="+",
        choices=("fp32", "fp16"),
        default=["fp32"],
        help="of the model (default: fp32)",
    )
    group.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="B", help="images per run (default: 1)"
    )
    add_device_option(group)
    group.add_argument(
        "--compile_mode",
        default=Spec.compile_mode,
        metavar="MODE",
        help="of torch.compile, for backend pytorch-compile (default: %(default)s: CUDA graphs)",
    )


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Weights, model file, output."""
    add_weights_option(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of this kind (default: made when needed)",
    )
    group.add_argument(
        "--compiler_cache",
        type=Path,
        metavar="DIR",
        help="keep what Inductor and Triton compile, so that start times are those of a second "
        "start (default: an empty cache for every row)",
    )
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="records, a line per row; tables and plots go into a folder of the same name "
        "(default: output/timings-DATE-TIME.jsonl)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the rows that --output lacks; refused if it is of other settings",
    )


def add_limit_options(group: argparse._ArgumentGroup) -> None:
    """Runs and seconds."""
    limits = Limits()
    group.add_argument(
        "--repeats",
        type=int,
        default=limits.repeats,
        metavar="N",
        help="timed runs per clock and row (default: %(default)s)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        default=limits.warmup,
        metavar="N",
        help="most warm-up runs; they end when run times have settled (default: %(default)s)",
    )
    group.add_argument(
        "--max_seconds",
        type=float,
        default=limits.max_seconds,
        metavar="S",
        help="seconds per clock and row after which fewer timed runs have to do, but at least 10 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--processes",
        type=int,
        default=limits.processes,
        metavar="N",
        help="processes that measure a row, one after another, each to these limits: more than 1 "
        "show what differs from process to process (default: %(default)s)",
    )
    group.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="references, model files and, with --compiler_cache, kernels to make at a time, "
        "before anything is timed; more than 1 makes build times longer, and TensorRT choose worse "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of the order of the rows (default: %(default)s)"
    )


def grid_from(args: argparse.Namespace) -> Grid:
    """What to measure; `InputError` where it cannot be."""
    backends = EVERY_BACKEND if "all" in args.backends else args.backends
    models = list(CONFIGS) if "all" in args.models else args.models
    for model in models:
        get_config(model)
    suffixes = [get_backend(name).suffix for name in backends]
    file = args.model_path
    if file and file.suffix not in suffixes:
        raise InputError(
            f"none of the backends {', '.join(backends)} runs {file}; choose one that does"
        )
    check_selection(min(args.top_k), args.scores_th)
    if min(*args.batch, args.jobs) < 1:
        raise InputError(f"--batch {args.batch} and --jobs {args.jobs}: give at least 1 of each")
    return Grid(
        backends,
        models,
        args.top_k,
        args.precisions,
        args.batch,
        args.scores_th,
        args.n_limit,
        args.compile_mode,
    )


def limits_from(args: argparse.Namespace) -> Limits:
    """Runs and seconds; `InputError` where nothing would be timed."""
    if args.repeats < 2 or args.warmup < 0 or args.max_seconds <= 0 or args.processes < 1:
        raise InputError(
            f"--repeats {args.repeats}, --warmup {args.warmup}, --max_seconds "
            f"{args.max_seconds} and --processes {args.processes} time nothing; give at least 2, "
            "0, more than 0 and 1"
        )
    return Limits(args.repeats, args.warmup, args.max_seconds, args.processes)
