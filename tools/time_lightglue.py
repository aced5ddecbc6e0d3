"""Time two images to matches on this GPU: the fused kernels with LightGlue, and LightGlue alone.

Compute only: images and results stay on the GPU, by CUDA events. With `--official` the published
code (the file lightglue/lightglue.py of github.com/cvg/LightGlue) is timed in the same run, eager
and with its own `compile()`, all layers, half precision through autocast. Writes a JSON line a row.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from aliked import cli, files
from aliked.backends import Spec
from aliked.backends.fused_lightglue import FusedPair, capture
from aliked.images import list_images, load_image
from aliked.lightglue import LightGlue
from aliked.model import ALIKED
from aliked.parity import MATCH_FP16, MATCH_FP32, compare_matches, in_terms_of, judge_matches
from aliked.weights import LIGHTGLUE, load_state_dict

COMPILE = {
    "none": None,
    "default": "default",
    "autotune": "max-autotune-no-cudagraphs",
}
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,  # knows masks, and float32
}
USUAL = {"fp16": ("flash", "cudnn"), "fp32": ("efficient",)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("images", type=Path, metavar="FOLDER", help="its first two images are matched")
    p.add_argument("--model", default="aliked-n16rot")
    p.add_argument("--top_k", type=int, nargs="+", default=[1000, 2000], metavar="K")
    p.add_argument("--compile", nargs="+", choices=COMPILE, default=list(COMPILE))
    p.add_argument("--attention", nargs="+", choices=ATTENTION, help="default: all that fit")
    p.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    p.add_argument("--weights", type=Path, metavar="FOLDER", help="folder with both weights")
    p.add_argument("--official", type=Path, metavar="FILE", help="the published lightglue.py")
    p.add_argument("--runs", type=int, default=200, help="timed replays (default: %(default)s)")
    p.add_argument("--output", type=Path, metavar="FILE", help="JSON lines to write")
    return p


def timed(run: Callable[[], object], runs: int, warmup: int = 20) -> dict:
    """Median and 90th percentile in milliseconds of device time of `run`."""
    for _ in range(warmup):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in events]
    return {"median_ms": statistics.median(times), "p90_ms": statistics.quantiles(times, n=10)[-1]}


def wall(run: Callable[[], object], runs: int) -> dict:
    """Median in milliseconds by the host's clock of `run`, which waits for its result."""
    times = []
    for _ in range(runs + 20):
        start = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return {"median_ms": statistics.median(times[20:])}


def fused_rows(args, top_k: int, images: list[np.ndarray]) -> Iterator[dict]:
    """The whole pair in each way to run the matcher, judged beside PyTorch in float32."""
    spec = Spec(args.model, top_k, precision=args.precision, device="cuda", weights=args.weights)
    expected = reference(args, top_k, images)
    for compiler, attention in itertools.product(
        args.compile, args.attention or USUAL[args.precision]
    ):
        mode, backend = COMPILE[compiler], ATTENTION[attention]
        # A mask, for fill-ins, needs the second.
        with sdpa_kernel([backend, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
            torch._dynamo.reset()
            pair = FusedPair(spec, args.weights, mode)
            plan = pair.plan(*(image.shape for image in images))
        verdict = judged(pair(*images), expected, args.precision)
        row = {"what": "two images to matches", "compile": mode, "attention": attention}
        yield row | timed(plan.graph.replay, args.runs) | {"parity": verdict}
        row = row | {"what": "two images to matches, copies included"}
        yield row | wall(lambda pair=pair: pair(*images), args.runs)
    graph, _ = capture(lambda: pair.extract(plan.batches[0]))
    yield {"what": "extractor alone, both images"} | timed(graph.replay, args.runs)


def reference(args, top_k: int, images: list[np.ndarray]) -> tuple:
    """Features of both images and their matches, by PyTorch in float32."""
    model = ALIKED.from_pretrained(args.model, top_k, weights=args.weights, device="cuda")
    matcher = LightGlue.from_pretrained(args.weights, device="cuda")
    features = [model.extract(image) for image in images]
    return features, matcher.match(*features, *(image.shape[1::-1] for image in images))


def judged(found, expected: tuple, precision: str) -> str:
    """The verdict on one pair, in words."""
    features, matches = expected
    ours = in_terms_of(
        (features[0].keypoints, features[1].keypoints),
        (found.keypoints0, found.keypoints1),
        found.matches,
    )
    tolerance = MATCH_FP16 if precision == "fp16" else MATCH_FP32
    return judge_matches({"pair": compare_matches(matches, ours)}, tolerance).text


def matcher_rows(args, top_k: int, images: list[np.ndarray]) -> Iterator[dict]:
    """LightGlue alone on the same features, ours and the published code."""
    features, _ = reference(args, top_k, images)
    sides = [
        {
            "keypoints": torch.from_numpy(side.keypoints).cuda()[None],
            "descriptors": torch.from_numpy(side.descriptors).cuda()[None],
            "image_size": torch.tensor([image.shape[1::-1]], dtype=torch.float32, device="cuda"),
        }
        for side, image in zip(features, images, strict=True)
    ]
    inputs = [sides[side][name] for side in (0, 1) for name in ("keypoints", "descriptors")]
    inputs += [side["image_size"] for side in sides]
    ours = LightGlue.from_pretrained(args.weights, device="cuda", precision=args.precision)
    for mode in (COMPILE[compiler] for compiler in args.compile):
        torch._dynamo.reset()
        run = ours if mode is None else torch.compile(ours, fullgraph=True, mode=mode)
        with torch.no_grad():
            graph, _ = capture(lambda run=run: run(*inputs))
        yield {"what": "LightGlue alone", "compile": mode} | timed(graph.replay, args.runs)
    if args.official:
        yield from official_rows(args, top_k, sides)


def official_rows(args, top_k: int, sides: list[dict]) -> Iterator[dict]:
    """The published code, eager and with its own `compile()`."""
    spec = importlib.util.spec_from_file_location("official_lightglue", args.official)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = {f"image{i}": side for i, side in enumerate(sides)}
    for compiled in (False, True):
        matcher = module.LightGlue(
            features=None,
            input_dim=128,
            depth_confidence=-1,
            width_confidence=-1,
            mp=args.precision == "fp16",
        )
        matcher.load_state_dict(load_state_dict(LIGHTGLUE, args.weights), strict=False)
        matcher = matcher.eval().cuda()
        if compiled:
            torch._dynamo.reset()
            matcher.compile(static_lengths=[top_k])
        with torch.inference_mode():
            row = {"what": "published LightGlue alone", "compile": compiled}
            yield row | timed(lambda matcher=matcher: matcher(data), args.runs)


def main(args: argparse.Namespace) -> None:
    """Every row for every K, printed and, with `--output`, kept."""
    images = [load_image(path) for path in list_images(args.images)[:2]]
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": args.model,
        "precision": args.precision,
        "images": [list(image.shape[1::-1]) for image in images],
    }
    rows = []
    for top_k in args.top_k:
        for make in (fused_rows, matcher_rows):
            for row in make(args, top_k, images):
                rows.append(about | {"top_k": top_k} | row)
                print({"top_k": top_k} | row, flush=True)
    if args.output:
        with files.whole_file(args.output) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main, parser())
