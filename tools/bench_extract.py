"""How fast a folder of JPEGs becomes a file of features, and which stage it waits for.

Makes the JPEGs from the shipped photographs, and measures by itself each of
  decode   JPEGs to pixels, in as many processes and threads as `aliked extract` takes
  kernels  the network on batches that lie on the device, one GPU
  copies   the same with copies to the device and back
  all      `aliked extract` from the time when all its processes have begun until the file is there
in images per second, the share of `all` in the slower of decode and kernels, and the seconds that
starting took.

    python -m tools.bench_extract /tmp/jpegs --model aliked-n16 --backend fused --precision fp16 \\
        --output results/scale/h100.jsonl
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.cli import add_device_option, add_model_options
from aliked.commands.extract import TWO_LANES
from aliked.extraction import DECODERS, Job, Tally, available_cores
from aliked.images import find_images, load_image
from aliked.store import FeatureStore
from aliked.threads import keep_freed_memory
from aliked.workers import Team, devices_of
from benchmark.environment import git_commit, machine, versions

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "assets"
QUALITY = 90  # of the JPEGs
SECONDS = 2  # that kernels are measured for
WARM, ONNX_IMAGES = 20, 40  # images of `--others`


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
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
        "--processes", type=int, metavar="N", help="of `all` (default: as aliked extract)"
    )
    parser.add_argument("--decoder", choices=DECODERS, default=DECODERS[0], help=default)
    parser.add_argument("--half", action="store_true", help="descriptors in float16")
    parser.add_argument(
        "--others", type=int, metavar="N", help="also hloc's and COLMAP's way, on N of the images"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="the model, for COLMAP's way")
    parser.add_argument(
        "--only_all", action="store_true", help="do not measure the stages by themselves"
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
    """Images per second of every stage for one size and number of keypoints."""

    size: str
    top_k: int
    images: int
    processes: int
    decode: float
    kernels: float
    copies: float
    all: float
    start: float  # seconds
    mebibytes: float  # of the file
    gpu_mebibytes: float  # of one extractor with its batch, weights included
    busy: str

    @property
    def share(self) -> float:
        """Of the slower of decode and kernels, how much is left of all together."""
        return self.all / min(self.decode, self.kernels)

    def __str__(self) -> str:
        rates = (self.decode, self.kernels, self.copies, self.all)
        return (
            f"{self.size:>10} {self.top_k:6} {self.processes:9} "
            + " ".join(f"{rate:8.1f}" for rate in rates)
            + f" {self.share:6.0%} {self.start:6.1f} {self.mebibytes:6.0f}"
            + f" {self.gpu_mebibytes:6.0f}  {self.busy}"
        )


HEADER = (
    "      size      K processes   decode  kernels   copies      all"
    "  share  start   file    GPU  busy"
)


def decode_rate(folder: Path, threads: int, processes: int) -> float:
    """Images per second of decoding alone."""
    paths = [folder / name for name in find_images(folder)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        shares = [(paths[i::processes], threads // processes) for i in range(processes)]
        list(pool.map(decode_all, [(some[:100], count) for some, count in shares]))  # warm
        times = list(pool.map(decode_all, shares))
    return len(paths) / (max(end for _, end in times) - min(start for start, _ in times))


def decode_all(share: tuple[list[Path], int]) -> tuple[float, float]:
    """Decode images in a number of threads; when it began and ended."""
    paths, threads = share
    keep_freed_memory()
    cv2.setNumThreads(1)
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda path: load_image(path, stored=1).nbytes, paths):
            pass
    return started, time.perf_counter()


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


class Start:
    """When every process of a run has done a batch, and what was done by then."""

    def __init__(self, processes: int):
        self.processes, self.begun = processes, time.perf_counter()
        self.seconds = 0.0  # until then; 0 where a process had nothing to do
        self.images = 0

    def __call__(self, tallies: list[Tally]) -> None:
        """Look at what each process has done."""
        if not self.seconds and all(tally.images for tally in tallies):
            self.seconds = time.perf_counter() - self.begun
            self.images = sum(tally.images for tally in tallies)


def extraction(job: Job, devices: list[str]) -> tuple[float, float, float, str]:
    """Images per second, seconds of the start, MiB of the file, and who was busy."""
    scratch = Path(tempfile.mkdtemp(dir=job.images.parent))
    try:
        store = FeatureStore.open(scratch / "features.h5", job.key())
        start = Start(len(devices))
        with contextlib.closing(Team(job, store, devices)) as team:
            tally = team.run(lambda _: start(team.tallies))
        store.close()
        seconds = time.perf_counter() - start.begun - start.seconds
        rate = (tally.images - start.images) / seconds
        return rate, start.seconds, store.path.stat().st_size / 2**20, tally.shares()
    finally:
        shutil.rmtree(scratch)


def extractor_rates(job: Job) -> tuple[float, float, float]:
    """Images per second of the kernels, of these with copies, and MiB on the GPU."""
    extractor = create_extractor(job.backend, job.spec)
    pixels = batch_of(job)
    on_device = extractor.to_device(pixels)
    kernels = rate_of(lambda: extractor.infer(on_device), extractor.synchronize, len(pixels))
    copies = rate_of(lambda: extractor.extract_batch(pixels), extractor.synchronize, len(pixels))
    return kernels, copies, gpu_mebibytes()


def gpu_mebibytes() -> float:
    """MiB that PyTorch has taken on the GPU."""
    return torch.cuda.memory_reserved() / 2**20 if torch.cuda.is_available() else 0.0


def empty_gpu() -> None:
    """Give back what the last extractor had there."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_at_a_time(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Images per second as others run the model: an image at a time, float32.

    hloc: a loader with one worker, PyTorch, and float16 into an HDF5 file that is opened for each.
    COLMAP: ONNX Runtime on an exported file; decoding and database, which it does meanwhile, are
    left out.
    """
    size = args.sizes[0]
    folder = args.folder / f"{size}-{args.images}"
    paths = [folder / name for name in find_images(folder)][: args.others]
    spec = Spec(args.model, args.top_k[0], device=args.device, weights=args.weights)
    model = create_extractor("pytorch", spec)
    loader = torch.utils.data.DataLoader(Files(paths), num_workers=1, shuffle=False)
    output = folder.parent / "hloc.h5"
    output.unlink(missing_ok=True)
    for count, pixels in enumerate(loader):
        if count == WARM:
            started = time.perf_counter()
        features = model(pixels[0].numpy())
        with h5py.File(output, "a", libver="latest") as file:
            group = file.create_group(paths[count].name)
            for field, values in vars(features).items():
                group.create_dataset(field, data=values.T.astype(np.float16))
    yield "hloc, pytorch", (len(paths) - WARM) / (time.perf_counter() - started)
    output.unlink()
    if args.onnx is not None:
        model = create_extractor(
            "onnxruntime-cpu", replace(spec, model_path=args.onnx, device="cpu")
        )
        images = [load_image(path) for path in paths[:ONNX_IMAGES]]
        model(images[0])
        started = time.perf_counter()
        for image in images:
            model(image)
        yield "COLMAP, onnxruntime on the processor", len(images) / (time.perf_counter() - started)


class Files(torch.utils.data.Dataset):
    """Images as hloc loads them."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB."""
        return cv2.imread(str(self.paths[index]))[..., ::-1].copy()


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        folder = args.folder / f"{size}-{args.images}"
        make_jpegs(folder, args.images, width, height)
        decode = None
        for top_k in args.top_k:
            spec = Spec(args.model, top_k, precision=args.precision, device=args.device)
            job = Job(
                folder,
                args.backend,
                replace(spec, weights=args.weights),
                batch_size=args.batch_size,
                lanes=2 if args.backend in TWO_LANES else 1,
                half=args.half,
                decoder=args.decoder,
            )
            devices = devices_of(job, args.images, args.processes)
            job = replace(job, threads=max(1, args.threads // len(devices)))
            stages = (nan, nan, nan, nan)
            if not args.only_all:
                decode = decode or decode_rate(folder, args.threads, len(devices))
                stages = decode, *extractor_rates(job)
                empty_gpu()
            *rates, on_gpu = stages
            rate, start, file, busy = extraction(job, devices)
            yield Row(
                size, top_k, args.images, len(devices), *rates, rate, start, file, on_gpu, busy
            )


def main(args: argparse.Namespace) -> None:
    """Print a table, and append the rows to a file."""
    facts = {
        "model": args.model,
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "half": args.half,
        "decoder": args.decoder,
        "versions": versions(),
        "machine": machine("cpu" if args.device == "cpu" else "cuda"),
        "commit": git_commit(),
    }
    print(HEADER, flush=True)
    for row in measure(args):
        print(row, flush=True)
        keep(args.output, vars(row) | {"share": row.share} | facts)
    if args.others:
        for name, rate in one_at_a_time(args):
            print(f"{name}: {rate:.1f} images/s", flush=True)
            row = {"others": name, "size": args.sizes[0], "top_k": args.top_k[0], "all": rate}
            keep(args.output, row | facts | {"precision": "fp32", "backend": None})


def keep(path: Path | None, record: dict) -> None:
    """Append a record to the file, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    cli.run(main, parser())
