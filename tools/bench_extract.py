"""How fast a folder of JPEGs becomes a file of features, and which stage it waits for.

Makes the JPEGs from the shipped photographs, and measures by itself each of
  decode   JPEGs to pixels, in as many threads as `aliked extract` takes
  kernels  the network on batches that lie on the device
  copies   the same with copies to the device and back
  extract  `aliked extract` up to the last part on the disk
  all      the same until the parts are joined to one file
in images per second, and the share of `all` in the slower of decode and kernels.

    python -m tools.bench_extract /tmp/jpegs --model aliked-n16 --backend fused --precision fp16 \\
        --output results/extract/h100.jsonl
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.cli import add_device_option, add_model_options
from aliked.commands.extract import TWO_LANES
from aliked.extraction import Job, Pipeline, available_cores, missing
from aliked.images import find_images, load_image
from aliked.store import FeatureStore
from aliked.workers import extract_in_processes
from benchmark.environment import git_commit, machine, versions

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "assets"
QUALITY = 90  # of the JPEGs
SECONDS = 5  # that kernels are measured for


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "default: %(default)s"
    parser.add_argument("folder", type=Path, help="where the JPEGs are kept between runs")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help=default)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1600x1200"], help=default)
    parser.add_argument("--top_k", type=int, nargs="+", default=[1000, 4096], help=default)
    parser.add_argument("--backend", default="fused", help=default)
    parser.add_argument("--precision", default="fp16", help=default)
    parser.add_argument("--batch_size", type=int, metavar="N")
    parser.add_argument("--threads", type=int, default=available_cores(), help=default)
    parser.add_argument(
        "--lanes", type=int, nargs="+", help="extractors at a time (default: as aliked extract)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help=f"GPUs for `all`, {default}"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the rows as JSON lines")
    add_model_options(parser)
    add_device_option(parser)
    return parser


def make_jpegs(folder: Path, count: int, width: int, height: int) -> None:
    """`count` JPEGs, all different: shipped photographs, shifted, mirrored, and scaled to size."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [PHOTOGRAPHS / name for name in find_images(PHOTOGRAPHS)]
    photographs = [load_image(path)[..., ::-1] for path in sources]

    def make(index: int) -> None:
        path = folder / f"{index:06}.jpg"
        if path.exists():
            return
        random = np.random.default_rng(index)
        image = photographs[index % len(photographs)]
        image = np.roll(image, random.integers(0, image.shape[:2]), axis=(0, 1))
        image = image[:, ::-1] if random.random() < 0.5 else image
        interpolation = cv2.INTER_CUBIC if width > image.shape[1] else cv2.INTER_AREA
        resized = cv2.resize(image, (width, height), interpolation=interpolation)
        cv2.imwrite(str(path), resized, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(make, range(count)))


@dataclass
class Row:
    """Images per second of every stage for one size, number of keypoints and number of lanes."""

    size: str
    top_k: int
    lanes: int
    images: int
    decode: float
    kernels: float
    copies: float
    extract: float
    all: float
    busy: str

    @property
    def share(self) -> float:
        """Of the slower of decode and kernels, how much is left of all together."""
        return self.all / min(self.decode, self.kernels)

    def __str__(self) -> str:
        rates = (self.decode, self.kernels, self.copies, self.extract, self.all)
        return (
            f"{self.size:>10} {self.top_k:6} {self.lanes:5} "
            + " ".join(f"{rate:8.1f}" for rate in rates)
            + f" {self.share:6.0%}  {self.busy}"
        )


HEADER = "      size      K lanes   decode  kernels   copies  extract      all  share  busy"


def decode_rate(folder: Path, threads: int) -> float:
    """Images per second of decoding alone."""
    paths = [folder / name for name in find_images(folder)]
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for _ in pool.map(lambda path: load_image(path).nbytes, paths):
            pass
        return len(paths) / (time.perf_counter() - started)


def rate_of(call: Callable[[], object], wait: Callable[[], None], images: int) -> float:
    """Images per second of a call of `images`, after it has been warmed up."""
    for _ in range(3):
        call()
    wait()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        call()
        calls += 1
        if calls % 10 == 0:
            wait()
    wait()
    return images * calls / (time.perf_counter() - started)


def batch_of(job: Job) -> np.ndarray:
    """The pixels of the first batch that `aliked extract` makes."""
    batch = next(job.batches(lambda error: None))
    return np.stack([photo.load() for photo in batch])


def extraction_rates(job: Job, processes: int) -> tuple[float, float, str]:
    """Images per second until the last part is written, and until all is one file."""
    scratch = Path(tempfile.mkdtemp(dir=job.images.parent))
    try:
        store = FeatureStore.open(scratch / "features.h5", job.key())
        if processes > 1:
            started = time.perf_counter()  # starting the processes counts
            devices = [f"cuda:{i}" if job.spec.device != "cpu" else "cpu" for i in range(processes)]
            tally = extract_in_processes(job, store.path, devices, lambda tally: None)
        else:
            pipeline = Pipeline(job, store)
            pipeline.run_batches([next(job.batches(lambda error: None))])  # warm, captured
            tally = pipeline.begin()
            started = time.perf_counter()
            pipeline.run_batches(missing(job, store, tally))
        store.flush()
        extracted = time.perf_counter()
        store.close()
        closed = time.perf_counter()
    finally:
        shutil.rmtree(scratch)
    count = tally.images
    return count / (extracted - started), count / (closed - started), tally.shares()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        folder = args.folder / f"{size}-{args.images}"
        make_jpegs(folder, args.images, width, height)
        decode = decode_rate(folder, args.threads)
        for top_k in args.top_k:
            spec = Spec(args.model, top_k, precision=args.precision, device=args.device)
            job = Job(
                folder,
                args.backend,
                replace(spec, weights=args.weights),
                batch_size=args.batch_size,
                threads=args.threads,
            )
            extractor = create_extractor(args.backend, job.spec)
            pixels = batch_of(job)
            on_device = extractor.to_device(pixels)
            kernels = rate_of(
                lambda extractor=extractor, batch=on_device: extractor.infer(batch),
                extractor.synchronize,
                len(pixels),
            )
            copies = rate_of(
                lambda extractor=extractor, batch=pixels: extractor.extract_batch(batch),
                extractor.synchronize,
                len(pixels),
            )
            del extractor, on_device
            for lanes in args.lanes or [2 if args.backend in TWO_LANES else 1]:
                rates = extraction_rates(replace(job, lanes=lanes), args.processes)
                yield Row(size, top_k, lanes, args.images, decode, kernels, copies, *rates)


def main(args: argparse.Namespace) -> None:
    """Print a table, and append the rows to a file."""
    facts = {
        "model": args.model,
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "processes": args.processes,
        "versions": versions(),
        "machine": machine("cpu" if args.device == "cpu" else "cuda"),
        "commit": git_commit(),
    }
    print(HEADER, flush=True)
    for row in measure(args):
        print(row, flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(vars(row) | {"share": row.share} | facts) + "\n")


if __name__ == "__main__":
    cli.run(main, parser())
