"""Run the fused kernels for compute-sanitizer: overlapping launches, clusters, a CUDA graph.

usage: compute-sanitizer --tool memcheck python -m tools.sanitize_fused
and the same with racecheck and synccheck. In half precision the exit status is 1 where launches do
not overlap or no kernel runs in clusters: before Hopper, or where the image is too large for them.
"""

import argparse

import numpy as np
import torch

from aliked import cli
from aliked.backends import Spec, create_extractor
from aliked.configs import CONFIGS
from aliked.errors import InputError
from aliked.fused import cuda_source, deform
from aliked.model import DTYPES
from aliked.options import add_weights_option


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m tools.sanitize_fused",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_weights_option(p)
    default = "default: %(default)s"
    p.add_argument("--model", default="aliked-t16", choices=list(CONFIGS), help=default)
    p.add_argument("--precision", default="fp16", choices=list(DTYPES), help=default)
    p.add_argument("--width", type=int, default=133, help="pixels (default: %(default)s)")
    p.add_argument("--height", type=int, default=101, help="pixels (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    p.add_argument("--top_k", type=int, default=200, help="keypoints (default: %(default)s)")
    p.add_argument("--runs", type=int, default=3, help="of the graph (default: %(default)s)")
    return p


def main(args: argparse.Namespace) -> int:
    """Capture a graph for one size and replay it."""
    if min(args.width, args.height, args.batch, args.top_k, args.runs) < 1:
        raise InputError("nothing would run; give at least 1 of every number")
    clusters, choose_tile = [], deform.choose_tile

    def noted(*arguments) -> deform.Tile:
        tile = choose_tile(*arguments)
        clusters.append(tile.BLOCKS)
        return tile

    deform.choose_tile = noted
    spec = Spec(args.model, args.top_k, precision=args.precision, weights=args.weights)
    extractor = create_extractor("fused", spec)
    random = np.random.default_rng(0)
    size = (args.batch, args.height, args.width, 3)
    batch = extractor.to_device(random.integers(0, 256, size, dtype=np.uint8))
    for _ in range(args.runs):
        outputs = extractor.infer(batch)
    extractor.synchronize()
    overlap = cuda_source.can_overlap(torch.device("cuda", torch.cuda.current_device()))
    found = int((outputs["scores"] > 0).sum())
    print(f"{found} keypoints, launches overlap: {overlap}, blocks in a cluster: {clusters}")
    if args.precision == "fp32" or (overlap and max(clusters) > 1):
        return 0
    print("overlapping launches and clusters were not both in use, so they were not checked")
    return 1


if __name__ == "__main__":
    cli.run(main, parser())
