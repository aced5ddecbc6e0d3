"""Time what a call does beside the network: copies to the device and back, and arrays.

Prints the median and the 90th percentile of every step, in microseconds by the wall clock, each
waited for by itself. `all` is a whole call, whose steps are waited for once; that of `fused` copies
by the driver, not by PyTorch as the steps do.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.backends.pytorch import to_features
from aliked.errors import InputError
from aliked.features import OUTPUTS, Extractor
from aliked.images import load_image
from aliked.model import DTYPES
from aliked.options import add_device_option, add_weights_option
from aliked.transfer import download
from benchmark.timing import no_garbage_collection, wall_clock

BACKENDS = ("fused", "pytorch", "pytorch-amp", "pytorch-compile", "pytorch-cudagraph")
Steps = dict[str, Callable[[], object]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m tools.bench_transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("image", type=Path, help="an image, which fills the batches")
    default = "default: %(default)s"
    p.add_argument("--backend", choices=BACKENDS, default="fused", help=default)
    p.add_argument("--models", nargs="+", default=["aliked-t16"], metavar="NAME", help=default)
    p.add_argument("--precision", choices=list(DTYPES), default="fp16", help=default)
    p.add_argument("--top_k", type=int, default=1000, metavar="K", help=f"keypoints, {default}")
    p.add_argument("--batches", nargs="+", type=int, default=[1, 32], metavar="N", help=default)
    p.add_argument("--runs", type=int, default=200, metavar="N", help=f"of every step, {default}")
    add_weights_option(p)
    add_device_option(p)
    return p


def steps_of(extractor: Extractor, images: np.ndarray) -> Steps:
    """What is timed for uint8 images [B, H, W, 3], by name."""
    on_device = extractor.to_device(images)
    outputs = {k: v.clone() for k, v in extractor.infer(on_device).items()}
    return {
        "network": lambda: extractor.infer(on_device),
        "upload": lambda: extractor.to_device(images),
        "download": lambda: download(outputs[name] for name in OUTPUTS),
        "download, arrays": lambda: to_features(outputs),
        "all": lambda: extractor.extract_batch(images),
    }


def times_us(run: Callable[[], object], synchronize: Callable[[], None], runs: int) -> np.ndarray:
    """Wall-clock times of `runs` runs after a tenth as many that do not count."""
    with no_garbage_collection():
        laps = [wall_clock(run, synchronize)[0] for _ in range(runs + runs // 10 + 1)]
    return np.array([1000 * lap.ms for lap in laps[-runs:]])


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
    if min(*args.batches, args.runs, args.top_k) < 1:
        raise InputError("nothing would run; give at least 1 of every number")
    for line in lines(args):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main, parser())
