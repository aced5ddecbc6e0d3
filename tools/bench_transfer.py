"""Time what a call does beside the network: copies to the device and back, and arrays.

Prints the median and the 90th percentile of every step, in microseconds by the wall clock, each
waited for by itself. `all` is a whole call, whose steps are waited for once.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.backends.pytorch import OUTPUTS, to_features
from aliked.features import Extractor
from aliked.images import load_image
from aliked.transfer import download, stage

BACKENDS = ("fused", "pytorch", "pytorch-amp", "pytorch-compile", "pytorch-cudagraph")
Steps = dict[str, Callable[[], object]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--backend", choices=BACKENDS, default="fused")
    parser.add_argument("--models", nargs="+", default=["aliked-t16"])
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--top_k", type=int, default=1000)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--device", default="auto")
    return parser


def steps_of(extractor: Extractor, images: np.ndarray) -> Steps:
    """What is timed for uint8 images [B, H, W, 3], by name."""
    on_device = extractor.to_device(images)
    outputs = {k: v.clone() for k, v in extractor.infer(on_device).items()}
    return {
        "network": lambda: extractor.infer(on_device),
        "stage": lambda: stage(images, extractor.device),
        "upload": lambda: extractor.to_device(images),
        "download": lambda: download(outputs[name] for name in OUTPUTS),
        "download, arrays": lambda: to_features(outputs),
        "all": lambda: extractor.extract_batch(images),
    }


def times_us(run: Callable[[], object], synchronize: Callable[[], None], runs: int) -> np.ndarray:
    """Wall-clock times of `runs` runs after a tenth as many that do not count."""
    times = []
    for _ in range(runs + runs // 10 + 1):
        synchronize()
        start = time.perf_counter_ns()
        run()
        synchronize()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return np.array(times[-runs:])


def lines(args: argparse.Namespace) -> Iterator[str]:
    """The table, a line at a time."""
    image = load_image(args.image)
    yield f"{'model':24}{'batch':>6}  {'step':18}{'p50':>10}{'p90':>10}"
    for model in args.models:
        spec = Spec(
            model,
            top_k=args.top_k,
            precision=args.precision,
            weights=args.weights,
            device=args.device,
        )
        extractor = create_extractor(args.backend, spec)
        for batch in args.batches:
            for name, run in steps_of(extractor, np.stack([image] * batch)).items():
                p50, p90 = np.percentile(times_us(run, extractor.synchronize, args.runs), (50, 90))
                yield f"{model:24}{batch:6}  {name:18}{p50:10.1f}{p90:10.1f}"


def main(args: argparse.Namespace) -> int:
    """Print the table."""
    for line in lines(args):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main, parser())
