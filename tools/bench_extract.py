"""How fast a folder of JPEGs becomes a file of features, and which stage it waits for.

Makes the JPEGs, with EXIF as cameras write it, from the shipped photographs, and measures by itself
each of
  decode   JPEGs to pixels on the processor, in as many threads as `aliked extract` takes, and in
           as many processes as it takes for many images
  kernels  the network on batches that lie on the device, one GPU
  copies   the same with copies to the device and back
  writes   the bytes of the features into one file, from as many processes, 32 images in turn
  all      `aliked extract` from the time when all its processes have begun until the file is there
in images per second, and the share of `all` in the slower of decode and kernels; seconds of the
start, and from the last features until the file was there; of `all` the share of the cores' time in
which they were idle, and the milliseconds of a core that an image took: of all stages of the
workers, of putting it into the file, of the first process, of the file's books, and of the rest.

    python -m tools.bench_extract /tmp/jpegs --model aliked-n16 --backend fused --precision fp16 \\
        --output results/scale/h100.jsonl
"""

import argparse
import contextlib
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import IFD, Base

from aliked import cli
from aliked.backends import Spec, create_extractor, get_backend
from aliked.commands.extract import TWO_LANES
from aliked.configs import CONFIGS
from aliked.extraction import DECODERS, MAX_BATCH, Job, Tally, available_cores
from aliked.files import allocate, write_at
from aliked.images import find_images, load_image
from aliked.options import add_device_option, add_model_options
from aliked.store import FeatureStore
from aliked.threads import keep_freed_memory
from aliked.workers import CORES, Team, devices_of, threads_of_each
from benchmark.environment import git_commit, machine, versions

PHOTOGRAPHS = Path(__file__).resolve().parents[1] / "assets"
QUALITY = 90  # of the JPEGs
NOTES = 20_000  # bytes of a maker's notes in their EXIF
SECONDS = 1  # that kernels are measured for
WARM, ON_CPU = 20, 40  # images of `--others` that come before; of ONNX Runtime on the processor
FORMS = {None: (False,), "also": (False, True), "only": (True,)}  # whether in float16
TICKS = os.sysconf("SC_CLK_TCK")  # a second, of /proc


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(
        prog="python -m tools.bench_extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "default: %(default)s"
    parser.add_argument("folder", type=Path, help="where the JPEGs are kept between runs")
    parser.add_argument("--images", type=cli.whole(1), default=10_000, metavar="N", help=default)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1600x1200"], help=default)
    parser.add_argument("--top_k", type=cli.whole(1), nargs="+", default=[1000, 4096], help=default)
    parser.add_argument("--backend", default="fused", help=default)
    parser.add_argument("--precision", default="fp16", help=default)
    parser.add_argument("--batch_size", type=cli.whole(1), metavar="N")
    parser.add_argument(
        "--threads",
        type=cli.whole(1),
        metavar="N",
        help="that decode in each process (default: as aliked extract)",
    )
    parser.add_argument(
        "--processes", type=cli.whole(1), metavar="N", help="of `all` (default: as aliked extract)"
    )
    parser.add_argument("--decoder", choices=DECODERS, default=DECODERS[0], help=default)
    parser.add_argument(
        "--distinct", type=cli.whole(1), default=500, metavar="N", help="of the images; " + default
    )
    parser.add_argument(
        "--half",
        nargs="?",
        const="also",
        choices=("also", "only"),
        help="also with descriptors in float16, or with these only",
    )
    parser.add_argument(
        "--others",
        type=cli.whole(1),
        metavar="N",
        help="also hloc's and COLMAP's way, on N of the images",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="the model, for COLMAP's way")
    parser.add_argument(
        "--only_all", action="store_true", help="do not measure the stages by themselves"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append the rows as JSON lines")
    add_model_options(parser)
    add_device_option(parser)
    return parser


def make_jpegs(folder: Path, count: int, width: int, height: int, distinct: int) -> None:
    """`count` JPEGs: shipped photographs, shifted, mirrored, and scaled to size.

    So many are `distinct`; the others are further names of the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [PHOTOGRAPHS / name for name in find_images(PHOTOGRAPHS)]
    photographs = [load_image(path)[..., ::-1] for path in sources]
    exif = exif_segment()

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
        jpeg = cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        path.write_bytes(jpeg[:2] + exif + jpeg[2:])

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(make, range(min(count, distinct))))
    for index in range(distinct, count):
        path = folder / f"{index:06}.jpg"
        if not path.exists():
            path.hardlink_to(folder / f"{index % distinct:06}.jpg")


def exif_segment() -> bytes:
    """What a camera writes of itself into a JPEG, most of it notes of its own."""
    exif = Image.Exif()
    exif.update({Base.Make: "A maker", Base.Model: "A camera", Base.Orientation: 1})
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = bytes(NOTES)
    data = exif.tobytes()
    return b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data


@dataclass
class Stages:
    """Images per second of every stage by itself."""

    decode: float = nan
    kernels: float = nan
    copies: float = nan
    writes: float = nan
    gpu_mebibytes: float = nan  # of one extractor with its batch, weights included


@dataclass
class Run:
    """What `aliked extract` did."""

    all: float  # images per second
    start: float  # seconds until all processes had done a batch
    finish: float  # seconds from the last features until the file was there
    mebibytes: float  # of the file
    busy: str
    idle: float  # share of the cores' time
    # Milliseconds of a core for an image: of stages, processes and the rest.
    cores: dict[str, float]


@dataclass
class Row:
    """One size, number of keypoints and form of descriptors."""

    size: str
    top_k: int
    half: bool
    images: int
    processes: int
    threads: int  # that decode, of each
    gpus: int
    stages: Stages
    run: Run

    @property
    def share(self) -> float:
        """Of the slower of decode and kernels, how much is left of all together."""
        return self.run.all / min(self.stages.decode, self.stages.kernels)

    def record(self) -> dict:
        """All of it, flat."""
        own = {name: value for name, value in vars(self).items() if name not in ("stages", "run")}
        return own | vars(self.stages) | vars(self.run) | {"share": self.share}

    def __str__(self) -> str:
        stages, run = self.stages, self.run
        rates = (stages.decode, stages.kernels, stages.copies, stages.writes, run.all)
        cores = ", ".join(f"{name} {value:.2f}" for name, value in run.cores.items())
        return (
            f"{self.size:>9} {self.top_k:5}{'h' if self.half else ' '} {self.processes:5} "
            + " ".join(f"{rate:7.0f}" for rate in rates)
            + f" {self.share:5.0%} {run.start:5.1f} {run.finish:6.2f} {run.mebibytes:6.0f}"
            + f" {stages.gpu_mebibytes:5.0f} {run.idle:5.0%}  busy: {run.busy}; cores: {cores}"
        )


HEADER = (
    "     size     K  proc  decode kernels  copies  writes     all"
    " share start finish   file   GPU  idle"
)


def side_by_side(task: Callable[[Any], float], shares: list) -> float:
    """Seconds that a task takes for all shares, each in a process of its own, begun together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "aliked.workers", "benchmark.environment"])
    together = (context.Barrier(len(shares)),)
    with ProcessPoolExecutor(len(shares), context, _meet, together) as pool:
        return max(pool.map(task, shares))


def _meet(together: multiprocessing.Barrier) -> None:
    _meet.together = together


def timed(work: Callable[[], None]) -> float:
    """Seconds from when all processes are ready until the work is done."""
    _meet.together.wait()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def decode_rate(folder: Path, threads: int, processes: int) -> float:
    """Images per second of decoding alone, in processes with so many threads each."""
    paths = [folder / name for name in find_images(folder)]
    shares = [(paths[i::processes], threads) for i in range(processes)]
    return len(paths) / side_by_side(decode_all, shares)


def decode_all(share: tuple[list[Path], int]) -> float:
    """Seconds that a number of threads takes to decode images, after some others."""
    paths, threads = share
    keep_freed_memory()
    cv2.setNumThreads(1)
    with ThreadPoolExecutor(threads) as pool:

        def decode(paths: list[Path]) -> None:
            for _ in pool.map(lambda path: load_image(path, stored=1).nbytes, paths):
                pass

        decode(paths[:100])
        return timed(lambda: decode(paths))


WRITTEN = 2000  # images of `writes`


def writes_rate(job: Job, folder: Path, processes: int) -> float:
    """Images per second of writing such features at their places in one file, and no more."""
    count, depth = job.spec.top_k, CONFIGS[job.spec.model].dim
    size = count * (12 + depth * (2 if job.half else 4))
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        allocate(file.fileno(), 0, WRITTEN * size)
        firsts = range(0, WRITTEN, MAX_BATCH)
        shares = [(file.name, size, firsts[i::processes]) for i in range(processes)]
        return WRITTEN / side_by_side(write_all, shares)


def write_all(share: tuple[str, int, range]) -> float:
    """Seconds that it takes to write what is of the size of these batches' features."""
    name, size, firsts = share
    values = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    descriptor = os.open(name, os.O_WRONLY)

    def write() -> None:
        for first in firsts:
            batch = [values] * (min(first + MAX_BATCH, WRITTEN) - first)
            write_at(descriptor, first * size, *batch, alone=True)

    return timed(write)


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


class Clock:
    """When a run had begun and when it ended, and what its cores did in between."""

    def __init__(self, team: Team):
        self.team, self.made = team, time.perf_counter()
        self.start, self.images, self.last = 0.0, 0, self.made
        self.before = self._cores() | {"stages": Counter()}

    def __call__(self, tally: Tally) -> None:
        """Look at what each process has done: it has begun when all have done a batch."""
        self.last = time.perf_counter()
        if not self.start and all(one.images for one in self.team.tallies):
            self.start, self.images = self.last - self.made, tally.images
            self.before = self._cores() | {"stages": tally.cores}

    def run(self, tally: Tally, path: Path) -> Run:
        """What is to be told when the file is at `path`, before the team is closed."""
        now = time.perf_counter()
        seconds, images = now - self.made - self.start, tally.images - self.images
        after = self._cores() | {"stages": tally.cores}
        stages = after.pop("stages") - self.before.pop("stages")
        spent = {name: after[name] - self.before[name] for name in after}
        cores = stages | {name: spent[name] for name in ("first", "file")}
        cores["rest"] = spent["workers"] - stages.total()
        return Run(
            images / seconds,
            self.start,
            now - self.last,
            path.stat().st_size / 2**20,
            tally.shares(),
            spent["idle"] / (seconds * available_cores()),
            {name: 1000 * value / images for name, value in cores.items()},
        )

    def _cores(self) -> dict[str, float]:
        """Seconds of cores: of the first process, of the file's, of workers; and idle ones."""
        ended = os.times()
        workers = [ended.children_user + ended.children_system]
        workers += [_seconds(worker.process) for worker in self.team.workers.values()]
        workers += [_seconds(process) for process in self.team._leaving]
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        idle = sum(int(line[4]) + int(line[5]) for line in lines if line[0] in mine) / TICKS
        file = _seconds(self.team._grower)
        return {
            "first": time.process_time(),
            "file": file,
            "workers": sum(workers),
            "idle": idle,
        }


def _seconds(process: multiprocessing.Process) -> float:
    """Of a core, that a process has taken; 0 where it has been waited for."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
    except OSError:
        return 0.0
    return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / TICKS


def extraction(job: Job, devices: list[str]) -> Run:
    """What `aliked extract` does on Linux."""
    scratch = Path(tempfile.mkdtemp(dir=job.images.parent))
    try:
        store = FeatureStore.open(scratch / "features.h5", job.key())
        with contextlib.closing(Team(job, store, devices)) as team:
            clock = Clock(team)
            tally = team.run(clock)
            store.close()
            return clock.run(tally, store.path)
    finally:
        shutil.rmtree(scratch)


def extractor_rates(job: Job) -> tuple[float, float, float]:
    """Images per second of the kernels, and of these with copies; MiB on the GPU."""
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
    """Images per second as others run the model: an image at a time, float32."""
    folder = args.folder / f"{args.sizes[0]}-{args.images}"
    paths = [folder / name for name in find_images(folder)][: args.others]
    spec = Spec(args.model, args.top_k[0], device=args.device, weights=args.weights)
    yield "hloc, pytorch", hloc_rate(spec, paths, args.folder / "hloc.h5")
    if args.onnx is not None:
        on_gpu = args.device != "cpu" and get_backend("onnxruntime-cuda").unavailable() is None
        name, device = ("onnxruntime-cuda", args.device) if on_gpu else ("onnxruntime-cpu", "cpu")
        spec = replace(spec, model_path=args.onnx, device=device)
        yield f"COLMAP, {name}", colmap_rate(name, spec, paths if on_gpu else paths[:ON_CPU])


def hloc_rate(spec: Spec, paths: list[Path], output: Path) -> float:
    """A loader with one worker, PyTorch, and float16 into an HDF5 file that is opened for each."""
    model = create_extractor("pytorch", spec)
    loader = torch.utils.data.DataLoader(Files(paths), num_workers=1, shuffle=False)
    output.unlink(missing_ok=True)
    for count, pixels in enumerate(loader):
        if count == WARM:
            started = time.perf_counter()
        features = model(pixels[0].numpy())
        with h5py.File(output, "a", libver="latest") as file:
            group = file.create_group(paths[count].name)
            for field, values in vars(features).items():
                group.create_dataset(field, data=values.T.astype(np.float16))
    seconds = time.perf_counter() - started
    output.unlink()
    return (len(paths) - WARM) / seconds


def colmap_rate(name: str, spec: Spec, paths: list[Path]) -> float:
    """ONNX Runtime on a file; decoding and database, which it does meanwhile, are left out."""
    model = create_extractor(name, spec)
    images = [load_image(path) for path in paths]
    for image in images[:WARM]:
        model(image)
    started = time.perf_counter()
    for image in images:
        model(image)
    return len(images) / (time.perf_counter() - started)


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
        make_jpegs(folder, args.images, width, height, args.distinct)
        decode = nan
        for top_k, half in itertools.product(args.top_k, FORMS[args.half]):
            spec = Spec(args.model, top_k, precision=args.precision, device=args.device)
            job = Job(
                folder,
                args.backend,
                replace(spec, weights=args.weights),
                batch_size=args.batch_size,
                lanes=2 if args.backend in TWO_LANES else 1,
                half=half,
                decoder=args.decoder,
            )
            devices = devices_of(job, args.images, args.processes)
            job = replace(job, threads=args.threads or threads_of_each(len(devices)))
            stages = Stages()
            if not args.only_all:
                if np.isnan(decode) and args.decoder == DECODERS[0]:
                    most = max(len(devices), available_cores() // CORES)
                    decode = decode_rate(folder, args.threads or threads_of_each(most), most)
                kernels, copies, memory = extractor_rates(job)
                writes = writes_rate(job, args.folder, len(devices))
                stages = Stages(decode, kernels, copies, writes, memory)
                print(f"{size} {top_k}: {stages}", flush=True)  # a time limit may end the next
                empty_gpu()
            run, gpus = extraction(job, devices), torch.cuda.device_count()
            yield Row(size, top_k, half, args.images, len(devices), job.threads, gpus, stages, run)


def main(args: argparse.Namespace) -> None:
    """Print a table, and append the rows to a file."""
    facts = {
        "model": args.model,
        "backend": args.backend,
        "precision": args.precision,
        "decoder": args.decoder,
        "versions": versions(),
        "machine": machine("cpu" if args.device == "cpu" else "cuda"),
        "commit": git_commit(),
    }
    print(HEADER, flush=True)
    for row in measure(args):
        print(row, flush=True)
        keep(args.output, row.record() | facts)
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
