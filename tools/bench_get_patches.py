"""Time the compiled `get_patches` against the plain form, alone and inside the model.

Alone: random maps, windows all over them, until the patches are as the model takes them, one row of
neighbours per keypoint. The clock "eager" is around one call; "graph", on a GPU, is a call's share
of a CUDA graph of 20 calls, which is the device's own time. Inside the model: the whole eager
forward pass. The two forms take turns, so that what disturbs one disturbs the other. Writes one
JSON record per line. Needs the compiled operator: pip install ./custom_ops, or set
ALIKED_CUSTOM_OPS=build.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from aliked import cli, patches
from aliked.backends.pytorch import choose_device
from aliked.cli import add_device_option, add_weights_option
from aliked.configs import CONFIGS
from aliked.errors import InputError
from aliked.files import writable_folder
from aliked.images import load_image
from aliked.model import ALIKED, PRECISIONS, plain_float32, to_tensor
from benchmark import environment
from benchmark.records import write_records
from benchmark.timing import CudaClock, no_garbage_collection, wall_clock

LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
WARMUP, MIN_ROUNDS = 3, 10
PERCENTILES = (0, 10, 50, 90)
MODEL_SECONDS = 10  # times as long as the operation by itself
REPEATS = 20  # calls in a CUDA graph, so that the graph's own launch hardly counts

Run = Callable[[], object]
Measure = Callable[[dict[str, Run]], dict]  # runs by form, to their times


class Stopwatch:
    """Times runs in turn on one device."""

    def __init__(self, device: torch.device, max_rounds: int, max_seconds: float):
        self.device, self.max_rounds, self.max_seconds = device, max_rounds, max_seconds
        on_gpu = device.type == "cuda"
        self.clock = CudaClock(device) if on_gpu else wall_clock
        self.synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        self.clocks: dict[str, Measure] = {"eager": self.eager}
        if on_gpu:
            self.clocks["graph"] = self.graph

    def eager(self, runs: dict[str, Run]) -> dict:
        """Microseconds of each run by itself."""
        return self._times(runs, calls=1)

    def graph(self, runs: dict[str, Run]) -> dict:
        """Microseconds of each run as one of many in a CUDA graph."""
        graphs = {form: torch.cuda.CUDAGraph() for form in runs}
        for form, run in runs.items():
            with torch.cuda.graph(graphs[form]):
                for _ in range(REPEATS):
                    run()
        return self._times({form: graph.replay for form, graph in graphs.items()}, REPEATS)

    def _times(self, runs: dict[str, Run], calls: int) -> dict:
        rounds = []
        deadline = None
        with no_garbage_collection():
            while self._goes_on(len(rounds), deadline):
                laps = [self.clock(run, self.synchronize)[0].ms for run in runs.values()]
                rounds.append([1000 * ms / calls for ms in laps])
                if len(rounds) == WARMUP:
                    deadline = time.monotonic() + self.max_seconds
        times = dict(zip(runs, np.array(rounds[WARMUP:]).T, strict=True))
        times["saved"] = times["plain"] - times["compiled"]
        return {"rounds": len(rounds) - WARMUP} | {
            f"{form}_us": {f"p{p}": round(float(np.percentile(us, p)), 2) for p in PERCENTILES}
            for form, us in times.items()
        }

    def _goes_on(self, rounds: int, deadline: float | None) -> bool:
        if rounds < WARMUP + MIN_ROUNDS:
            return True
        return rounds < WARMUP + self.max_rounds and time.monotonic() < deadline


def alone(args, operator: ModuleType, device: torch.device) -> Iterator[dict]:
    """A record per case and clock of the operation by itself."""
    stopwatch = Stopwatch(device, args.max_rounds, args.max_seconds)
    maps_of = itertools.product(args.maps, args.channels, args.precisions, args.layouts)
    for (width, height), channels, precision, layout in maps_of:
        maps = torch.rand(1, channels, height, width, device=device)
        maps = maps.to(PRECISIONS[precision], memory_format=LAYOUTS[layout])
        for size, count in itertools.product(args.sizes, args.keypoints):
            centres = (torch.rand(1, count, 2) * torch.tensor([width, height])).long()
            arguments = maps, centres.to(device), size
            case = {"channels": channels, "size": size, "keypoints": count}
            case |= {"map": f"{width}x{height}", "layout": layout, "precision": precision}
            yield from compare(operator, arguments, case, stopwatch)


def compare(
    operator: ModuleType, arguments: tuple, case: dict, stopwatch: Stopwatch
) -> Iterator[dict]:
    """A record per clock of one case."""
    forms = {"plain": patches.plain_patches, "compiled": operator.get_patches}
    # The plain form's patches are a transposed view, which the model's next layer has to copy.
    runs = {
        name: lambda form=form: form(*arguments).flatten(2).contiguous()
        for name, form in forms.items()
    }
    equal = torch.equal(*(run() for run in runs.values()))
    for name, measure in stopwatch.clocks.items():
        yield {"part": "alone", "clock": name, **case, "equal": equal, **measure(runs)}


def in_model(args, operator: ModuleType, device: torch.device) -> Iterator[dict]:
    """A record per model, image and precision of the whole forward pass."""
    stopwatch = Stopwatch(device, args.max_rounds, MODEL_SECONDS * args.max_seconds)
    cases = itertools.product(args.models, args.images, args.model_precisions)
    for name, path, precision in cases:
        model = ALIKED.from_pretrained(
            name, top_k=args.top_k, weights=args.weights, device=device, precision=precision
        )
        images = torch.from_numpy(load_image(path)[None]).to(device)
        runs = model_runs(model, to_tensor(images))
        with plain_float32():
            outputs = zip(*(run() for run in runs.values()), strict=True)
            equal = all(torch.equal(*rows) for rows in outputs)
            times = stopwatch.eager(runs)
        case = {"model": name, "map": f"{images.shape[2]}x{images.shape[1]}"}
        case |= {"precision": precision, "keypoints": args.top_k}
        yield {"part": "model", "clock": "eager", **case, "equal": equal, **times}


def model_runs(model: ALIKED, images: torch.Tensor) -> dict[str, Run]:
    """The forward pass with either form."""

    def plain() -> object:
        with patches.plain_form():
            return model(images)

    return {"plain": plain, "compiled": lambda: model(images)}


PARTS = {"model": in_model, "alone": alone}


def machine(device: torch.device, operator: ModuleType) -> dict:
    """What the times depend on."""
    facts = environment.machine(str(device))
    return {
        "device": facts.get("gpu", facts["cpu"]),
        "cpu_threads": facts["cpu_threads"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": operator.__name__,
        "commit": environment.git_commit(),
    }


def compiled_for(device: torch.device) -> ModuleType:
    """The compiled operator; `InputError` where it is not there or not for `device`."""
    operator = patches.compiled()
    if operator is None or device.type not in operator.DEVICES:
        raise InputError(
            f"get_patches is not compiled for {device.type} here; pip install ./custom_ops, "
            f"or set {patches.VARIABLE}=build"
        )
    return operator


def line(record: dict) -> str:
    """A record for the terminal."""
    names = ("part", "clock", "model", "channels", "size", "keypoints", "map", "layout")
    case = " ".join(str(record[name]) for name in (*names, "precision") if name in record)
    plain, compiled, saved = (record[f"{f}_us"]["p50"] for f in ("plain", "compiled", "saved"))
    wrong = "" if record["equal"] else "  DIFFERENT PATCHES"
    return f"{case:62s}{plain:11.1f}{compiled:11.1f}{saved:11.1f}{wrong}"


def map_size(text: str) -> tuple[int, int]:
    """Width and height of "640x480"."""
    width, height = text.split("x")
    return int(width), int(height)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m tools.bench_get_patches", description=__doc__)
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL to write")
    add_device_option(p)
    add_weights_option(p)

    def add(name: str, what: str, default: list, **options) -> None:
        p.add_argument(
            name, nargs="+", default=default, help=f"{what}; default: all of these", **options
        )

    sizes, frame = [(640, 480), (1241, 376)], "assets/sequence_{}x{}/000000.jpg"
    add("--parts", "what to time", list(PARTS), choices=list(PARTS))
    add("--keypoints", "windows per map: 500 to 5000", [500, 1000, 2000, 5000], type=int)
    add("--channels", "of a map: 64, 128", [64, 128], type=int)
    add("--sizes", "side of a window, pixels: 3, 5", [3, 5], type=int)
    add("--maps", "640x480, 1241x376", sizes, type=map_size, metavar="WIDTHxHEIGHT")
    add("--layouts", "of a map in memory", list(LAYOUTS), choices=list(LAYOUTS))
    add("--precisions", "of a map", list(PRECISIONS), choices=list(PRECISIONS))
    add("--models", "aliked-t16, aliked-n16rot", ["aliked-t16", "aliked-n16rot"], choices=CONFIGS)
    add("--model_precisions", "of a model", list(PRECISIONS), choices=list(PRECISIONS))
    frames = [Path(frame.format(*size)) for size in sizes]
    add("--images", "for the models: a shipped frame per size", frames, type=Path, metavar="FILE")
    p.add_argument("--top_k", type=int, default=1000, help="of the models (default: %(default)s)")
    p.add_argument("--max_rounds", type=int, default=100, help="per case (default: %(default)s)")
    p.add_argument(
        "--max_seconds",
        type=float,
        default=0.1,
        help=f"per case, but at least {MIN_ROUNDS} rounds; {MODEL_SECONDS} times as long for the "
        "model (default: %(default)s)",
    )
    return p


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    """Exit status 1 where the two forms differ."""
    device = choose_device(args.device)
    writable_folder(args.output.parent)
    operator = compiled_for(device)
    torch.manual_seed(0)
    about = machine(device, operator)
    records = []
    print(f"{'microseconds, median':62s}{'plain':>11s}{'compiled':>11s}{'saved':>11s}")
    for record in itertools.chain(*(PARTS[part](args, operator, device) for part in args.parts)):
        print(line(record), flush=True)
        records.append(record | about)
    write_records(args.output, records)
    return int(not all(record["equal"] for record in records))


if __name__ == "__main__":
    cli.run(main, parser())
