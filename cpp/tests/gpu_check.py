"""Check and time libaliked on a machine with a GPU; prints a table, writes JSON lines.

    python cpp/tests/gpu_check.py --build BUILD --output records.jsonl [--weights FOLDER]

BUILD is a build folder with the library for this GPU; needs PyTorch. The library is used through
its C interface by ctypes, beside the Python backend `fused` in half precision, whose features must
be the same bit for bit.
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_size_t, c_void_p
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aliked.backends import Spec, create_extractor
from aliked.configs import CONFIGS, Selection
from aliked.fused.pack_weights import write_packed
from aliked.images import load_image
from aliked.matching import match_mutual

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets"
HOST, PAGE_LOCKED, DEVICE = range(3)


class Options(Structure):
    """aliked_options."""

    _fields_ = (
        ("size", c_size_t), ("device", c_int), ("top_k", c_int), ("scores_th", c_float),
        ("n_limit", c_int), ("max_plans", c_int), ("model", c_char_p), ("strict", c_int),
    )  # fmt: skip


class Images(Structure):
    """aliked_images."""

    _fields_ = (
        ("data", c_void_p), ("memory", c_int), ("batch", c_int), ("height", c_int),
        ("width", c_int), ("row_stride", c_size_t), ("image_stride", c_size_t),
    )  # fmt: skip


class Features(Structure):
    """aliked_features."""

    _fields_ = (
        ("batch", c_int), ("capacity", c_int), ("length", c_int), ("memory", c_int),
        ("keypoints", c_void_p), ("scores", c_void_p), ("descriptors", c_void_p),
        ("counts", c_void_p),
    )  # fmt: skip


class Descriptors(Structure):
    """aliked_descriptors."""

    _fields_ = (
        ("descriptors", c_void_p), ("scores", c_void_p), ("memory", c_int), ("count", c_int),
        ("length", c_int),
    )  # fmt: skip


class Matches(Structure):
    """aliked_matches."""

    _fields_ = (("count", c_int), ("index", c_void_p), ("similarities", c_void_p))


def array(pointer: int, shape: tuple, kind=c_float) -> np.ndarray:
    """A copy of host memory."""
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, np.float32)
    return (
        np.ctypeslib.as_array(ctypes.cast(pointer, POINTER(kind)), (count,)).reshape(shape).copy()
    )


class Library:
    """libaliked by its C interface."""

    def __init__(self, build: Path):
        self.c = ctypes.CDLL(str(build / "libaliked.so"))
        self.c.aliked_last_error.restype = c_char_p

    def check(self, status: int) -> None:
        if status:
            raise RuntimeError(self.c.aliked_last_error().decode())

    def create(self, weights: Path, selection: Selection, max_plans: int = 16) -> c_void_p:
        top_k, scores_th, n_limit, strict = astuple(selection)
        options = Options(
            ctypes.sizeof(Options), 0, top_k, scores_th, n_limit, max_plans, None, strict
        )
        extractor = c_void_p()
        self.check(self.c.aliked_create(str(weights).encode(), byref(options), byref(extractor)))
        return extractor

    def extract(self, extractor: c_void_p, images: np.ndarray, row_stride: int = 0) -> list[tuple]:
        """Keypoints, scores, descriptors of each image."""
        batch, height, width = images.shape[:3]
        given = Images(
            images.ctypes.data, HOST, batch, height, width, row_stride, images.strides[0]
        )
        found = Features()
        self.check(self.c.aliked_extract(extractor, byref(given), byref(found)))
        k, length = found.capacity, found.length
        counts = array(found.counts, (batch,), c_int)
        keypoints, scores, descriptors = (
            array(pointer, (batch, k, *last))
            for pointer, last in (
                (found.keypoints, (2,)), (found.scores, ()), (found.descriptors, (length,)),
            )
        )  # fmt: skip
        return [(keypoints[b, :n], scores[b, :n], descriptors[b, :n]) for b, n in enumerate(counts)]


def pictures(size: tuple[int, int], batch: int, first: int = 0) -> np.ndarray:
    """Frames of the shipped sequences, cut or repeated to a size."""
    name = "sequence_1241x376" if size[1] > 900 else "sequence_640x480"
    files = sorted((ASSETS / name).glob("*.jpg"))
    frames = []
    for i in range(batch):
        frame = load_image(files[(first + i) % len(files)])
        times = [-(-wanted // has) for wanted, has in zip(size, frame.shape, strict=False)]
        frames.append(np.tile(frame, (*times, 1))[: size[0], : size[1]])
    return np.ascontiguousarray(np.stack(frames))


def same(got: list[tuple], wanted: list) -> bool:
    """Bit for bit, image by image."""
    return all(
        np.array_equal(a, b)
        for mine, theirs in zip(got, wanted, strict=True)
        for a, b in zip(mine, (theirs.keypoints, theirs.scores, theirs.descriptors), strict=True)
    )


CASES = [  # selection, size, batch
    (Selection(1000), (480, 640), 1),
    (Selection(1000), (376, 1241), 1),
    (Selection(2000), (480, 640), 8),
    (Selection(500), (5, 5), 1),
    (Selection(500), (37, 900), 3),
    (Selection(300), (133, 101), 2),
    (Selection(5000), (1080, 1920), 1),
    (Selection(1000), (480, 640), 32),
    (Selection(0), (480, 640), 1),
    (Selection(0, 0.05, 300), (480, 640), 2),
    (Selection(0, 0.0), (240, 320), 1),
    (Selection(0, 1.0), (240, 320), 1),  # none passes
    (Selection(0, 1.0, strict=False), (240, 320), 1),
]


def check_features(library: Library, files: dict[str, Path], spec: dict, record) -> int:
    """Every model and case against the Python backend; returns how many differ."""
    bad = 0
    for model, file in files.items():
        for selection, size, batch in CASES:
            asked = Spec(model=model, **asdict(selection), **spec[model])
            python = create_extractor("fused", asked)
            images = pictures(size, batch)
            wanted = python.extract_batch(images)
            extractor = library.create(file, selection)
            equal = [same(library.extract(extractor, images), wanted) for _ in range(3)]
            wide = np.zeros((batch, size[0], size[1] * 3 + 64), np.uint8)
            wide[:, :, : size[1] * 3] = images.reshape(batch, size[0], -1)
            equal.append(
                same(library.extract(extractor, images_view(wide, size), wide.shape[2]), wanted)
            )
            library.c.aliked_destroy(extractor)
            bad += not all(equal)
            counts = [len(f) for f in wanted]
            record(
                "features",
                model=model,
                selection=astuple(selection),
                size=size,
                batch=batch,
                equal=all(equal),
                keypoints=sum(counts),
            )
            print(f"{'same' if all(equal) else 'DIFFERENT':9} {model:22} {selection}, "
                  f"{size[1]}x{size[0]} x{batch}: {sum(counts)} keypoints", flush=True)  # fmt: skip
            del python
    return bad


def images_view(wide: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[B, H, W, 3] whose rows lie further apart."""
    height, width = size
    strides = (wide.strides[0], wide.strides[1], 3, 1)
    shape = (len(wide), height, width, 3)
    return np.lib.stride_tricks.as_strided(wide, shape, strides)


def check_matching(library: Library, record) -> int:
    """Matches against NumPy, where no two similarities are nearly equal."""
    matcher, bad = c_void_p(), 0
    library.check(library.c.aliked_create_matcher(0, byref(matcher)))
    random = np.random.default_rng(0)
    for n, m, dim in [(1000, 1000, 128), (1, 3, 64), (2000, 333, 64), (5000, 5000, 128)]:
        a, b = (random.normal(size=(c, dim)).astype(np.float32) for c in (n, m))
        shared = min(n, m) // 2
        b[:shared] = a[:shared] + 0.3 * b[:shared]
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        on_device = [torch.from_numpy(v).cuda() for v in (a, b)]
        torch.cuda.synchronize()
        sets = [Descriptors(t.data_ptr(), None, DEVICE, len(t), dim) for t in on_device]
        found = Matches()

        def run(sets=sets, found=found):
            library.check(
                library.c.aliked_match(
                    matcher, byref(sets[0]), byref(sets[1]), c_float(0.75), byref(found)
                )
            )

        def by_python(on_device=on_device):
            return match_mutual(*on_device, 0.75).cpu().numpy()

        run()
        index = array(found.index, (n,), c_int)
        wanted = match_mutual(a, b, 0.75)
        rows = np.flatnonzero(index >= 0)
        equal = np.array_equal(np.stack([rows, index[rows]], axis=1), wanted)
        equal = equal and np.array_equal(by_python(), wanted)
        bad += not equal
        times, python = timed(run, 100), timed(by_python, 100)
        record("matching", rows=n, columns=m, length=dim, equal=bool(equal), **times)
        record("python", what="matching, pairs on the host", rows=n, columns=m, **python)
        print(f"{'same' if equal else 'DIFFERENT'} matches of {n} and {m}, D = {dim}: {len(wanted)}"
              f", {times['p50_ms']:.4f} ms, Python {python['p50_ms']:.4f}", flush=True)  # fmt: skip
    library.c.aliked_destroy_matcher(matcher)
    return bad


def check_threads(library: Library, file: Path, record) -> int:
    """Eight threads with an extractor each, sizes of their own."""
    sizes = [(480, 640), (240, 320), (376, 1241), (133, 101)] * 2
    wrong = []

    def work(number: int) -> None:
        images = pictures(sizes[number], 1, number)
        extractor = library.create(file, Selection(500))
        first = library.extract(extractor, images)
        for _ in range(200):
            again = library.extract(extractor, images)
            if not all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True)):
                wrong.append(number)
                break
        library.c.aliked_destroy(extractor)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    record("threads", wrong=len(wrong), seconds=seconds)
    print(f"eight threads, 200 frames each: {len(wrong)} wrong, {seconds:.2f} s", flush=True)
    return len(wrong)


def used_memory() -> np.ndarray:
    """Bytes in use: of the device, by anybody, and of the host, by this process."""
    free, total = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return np.array([total - free, pages * os.sysconf("SC_PAGE_SIZE")])


def check_sizes(library: Library, file: Path, record, frames: int = 10000) -> int:
    """Frames of changing size, more sizes than plans, with the memory watched."""
    extractor = library.create(file, Selection(500), max_plans=8)
    random = np.random.default_rng(0)
    sizes = [tuple(map(int, random.integers(40, 400, 2))) for _ in range(20)]
    image = np.ascontiguousarray(pictures((400, 400), 1)[0])
    most = np.zeros((2, 2), np.int64)
    start = time.perf_counter()
    size = sizes[0]
    for i in range(frames):
        if random.random() < 0.1:  # a new size now and then
            size = sizes[int(random.integers(len(sizes)))]
        given = Images(image.ctypes.data, HOST, 1, *size, 400 * 3, 0)
        library.check(library.c.aliked_extract(extractor, byref(given), None))
        if i % 50 == 0:
            half = int(i >= frames // 2)
            most[half] = np.maximum(most[half], used_memory())
    seconds = time.perf_counter() - start
    library.c.aliked_destroy(extractor)
    grown = dict(zip(("device", "host"), (most[1] - most[0]).tolist(), strict=True))
    record("sizes", frames=frames, seconds=seconds, most_first_half=most[0].tolist(), grown=grown)
    print(f"{frames} frames of 20 sizes, 8 plans: {seconds:.1f} s, memory of the second half "
          + ", ".join(f"{what} {size / 2**20:+.1f} MiB" for what, size in grown.items()),
          flush=True)  # fmt: skip
    return int(max(grown.values()) > 32 << 20)


@functools.cache
def packed(name: str, weights: str, folder: str) -> Path:
    """The library's weights file of official weights."""
    file = Path(folder) / f"{name}.safetensors"
    write_packed(name, file, Path(weights))
    return file


def official_case(name, image, top_k, scores_th, n_limit, weights_path) -> dict[str, np.ndarray]:
    """Adapter of `check_goldens.py`: the library's features of one image."""
    library = Library(Path(os.environ["ALIKED_BUILD"]))
    file = packed(name, str(weights_path), os.environ["ALIKED_PACKED"])
    # As the official code selects.
    extractor = library.create(file, Selection(top_k, scores_th, n_limit, strict=False))
    (found,) = library.extract(extractor, np.ascontiguousarray(image)[None])
    library.c.aliked_destroy(extractor)
    return dict(zip(("keypoints", "scores", "descriptors"), found, strict=True))


def check_official(build: Path, goldens: Path, weights: Path, folder: Path, record) -> int:
    """Photographs against the official outputs, which were made in float32 on a CPU."""
    from tests.fused.test_fused_gpu import HALF

    command = [sys.executable, goldens / "check_goldens.py", "--weights", weights]
    command += ["--adapter", "gpu_check:official_case", "--only", "__"]
    command += [f"--{name}={value}" for name, value in HALF.items()]
    environment = os.environ | {
        "PYTHONPATH": f"{Path(__file__).resolve().parent}:{ROOT}",
        "ALIKED_BUILD": str(build.resolve()),
        "ALIKED_PACKED": str(folder),
    }
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    lines = (done.stdout + done.stderr).strip().splitlines()
    passed = sum("PASS" in line for line in lines)
    bad = int(done.returncode != 0 or passed == 0)
    record("official", passed=passed, status=done.returncode, said=lines[-1])
    print("\n".join(lines if bad else lines[-1:]), flush=True)
    return bad


def timed(run, runs: int = 1000) -> dict[str, float]:
    """Percentiles of the wall clock, in milliseconds."""
    for _ in range(max(10, runs // 10)):
        run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return {f"p{p}_ms": float(np.percentile(times, p)) for p in (5, 50, 95, 99)}


def time_python(model: str, spec: dict, images: np.ndarray, record) -> None:
    """The Python backend by the same clock: on the device alone, and from host to host."""
    python = create_extractor("fused", Spec(model=model, top_k=1000, **spec))
    batch = python.to_device(images)

    def once():
        python.infer(batch)
        python.synchronize()

    def together():
        for _ in range(50):
            python.infer(batch)
        python.synchronize()

    rows = {
        "python, device to device, one call and a wait": timed(once),
        "python, device to device, calls back to back": {
            name: value / 50 for name, value in timed(together, 20).items()
        },
        "python, host to host": timed(lambda: python.extract_batch(images), 1000),
    }
    if len(images) == 1:  # as users and measure_timings.py call it
        rows["python, host to host, one image"] = timed(lambda: python(images[0]))
    for what, times in rows.items():
        record("python", what=what, model=model, batch=len(images), **times)
        print(f"{what:46} " + " ".join(f"{value:8.4f}" for value in times.values()), flush=True)


def time_library(library: Library, model: str, file: Path, images: np.ndarray, record) -> None:
    """The library from host to host by another clock than its own."""
    extractor = library.create(file, Selection(1000))
    batch, height, width = images.shape[:3]
    given, found = Images(images.ctypes.data, HOST, batch, height, width, 0, 0), Features()

    def run():
        library.check(library.c.aliked_extract(extractor, byref(given), byref(found)))

    times = timed(run)
    library.c.aliked_destroy(extractor)
    what = "library, host to host, Python's clock"
    record("stopwatch", what=what, model=model, batch=batch, **times)
    print(f"{what:46} " + " ".join(f"{value:8.4f}" for value in times.values()), flush=True)


def time_all(
    library: Library, build: Path, files: dict[str, Path], spec: dict, folder: Path, record
) -> None:
    """`aliked_bench`, the library by another clock and the Python backend, in turn."""
    picture = folder / "picture.ppm"
    image = pictures((480, 640), 1)[0]
    picture.write_bytes(b"P6\n640 480\n255\n" + image.tobytes())
    for model in [m for m in ("aliked-t16", "aliked-n16rot", "aliked-n32") if m in files] or files:
        for batch in (1, 8):
            lines = folder / f"{model}-{batch}.jsonl"
            command = [build / "examples" / "aliked_bench", "--model", files[model]]
            command += ["--batch", batch, "--image", picture, "--output", lines]
            command += ["--runs", 3000 if batch == 1 else 500]
            subprocess.run(list(map(str, command)), check=True)
            for line in lines.read_text().splitlines():
                record("library", **json.loads(line))
            images = np.repeat(image[None], batch, axis=0)
            time_library(library, model, files[model], images, record)
            time_python(model, spec[model], images, record)


def sanitize(build: Path, file: Path, folder: Path, record) -> int:
    """memcheck, racecheck and synccheck of small images, both modes, and matching."""
    bad, frames = 0, []
    for i, image in enumerate(pictures((101, 133), 2)):
        frames.append(folder / f"small{i}.ppm")
        frames[-1].write_bytes(b"P6\n133 101\n255\n" + np.ascontiguousarray(image).tobytes())
    programs = {
        "top-k and matching": ["aliked_track", *frames, "--top_k", 200],
        "threshold": [
            "aliked_extract",
            *frames,
            "--top_k",
            0,
            "--scores_th",
            0.1,
            "--output",
            folder,
        ],
        "batch": ["aliked_bench", "--image", frames[0], "--batch", 3, "--top_k", 100, "--runs", 1],
    }

    def check(case: tuple[str, str]) -> subprocess.CompletedProcess:
        tool, name = case
        program, *rest = programs[name]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 7]
        command += [build / "examples" / program, *rest, "--model", file]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)

    cases = list(itertools.product(("memcheck", "racecheck", "synccheck"), programs))
    with ThreadPoolExecutor(len(cases)) as pool:  # they share the GPU, and nothing is timed
        for (tool, name), done in zip(cases, pool.map(check, cases), strict=True):
            said = (done.stdout + done.stderr).strip().splitlines()
            bad += done.returncode != 0
            record("sanitizer", tool=tool, program=name, status=done.returncode, said=said[-1])
            print(f"{tool} {name}: {said[-1]}", flush=True)
            if done.returncode:
                print("\n".join(said[-30:]))
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="what is recorded as the code's commit")
    parser.add_argument("--weights", type=Path, help="folder of official .pth files, if any")
    parser.add_argument("--goldens", type=Path, help="folder of check_goldens.py, if any")
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    steps = ["features", "official", "matching", "threads", "sizes", "times", "sanitizer"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)
    args = parser.parse_args()
    library = Library(args.build)
    output = args.output.open("a")
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "commit": args.commit}  # fmt: skip

    def record(kind: str, **values) -> None:
        print(json.dumps({"kind": kind, **about, **values}), file=output, flush=True)

    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder, files, spec = Path(name), {}, {}
        for model in args.models:
            shipped = CONFIGS[model].shipped
            path = None if shipped or not args.weights else args.weights / f"{model}.pth"
            if not shipped and (path is None or not path.exists()):
                continue
            spec[model] = {"precision": "fp16", "device": "cuda", "weights": path}
            files[model] = folder / f"{model}.safetensors"
            write_packed(model, files[model], path)
        some = files.get("aliked-t16", next(iter(files.values())))
        if "features" in args.steps:
            bad += check_features(library, files, spec, record)
        if "official" in args.steps and args.goldens and args.weights:
            bad += check_official(args.build, args.goldens, args.weights, folder, record)
        if "matching" in args.steps:
            bad += check_matching(library, record)
        if "threads" in args.steps:
            bad += check_threads(library, some, record)
        if "sizes" in args.steps:
            bad += check_sizes(library, some, record)
        if "times" in args.steps:
            time_all(library, args.build, files, spec, folder, record)
        if "sanitizer" in args.steps:
            bad += sanitize(args.build, some, folder, record)
    print(f"{bad} checks failed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
