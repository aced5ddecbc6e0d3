"""Check and time the fused kernels on this GPU, one by one and as a whole.

For every model, precision and image size: each operator against its plain twin on the data that
it really gets, each operator's time inside a CUDA graph with the bytes that it must move, and the
whole extractor. Writes one JSON record per line.
"""

import argparse
import json
import math
import statistics
from dataclasses import astuple
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from aliked import cli, files
from aliked.backends import Spec
from aliked.backends.fused import FusedExtractor
from aliked.configs import CONFIGS
from aliked.fused import kernels, pipeline, reference, trace, weights
from aliked.images import load_image
from aliked.model import ALIKED, DTYPES

REPEATS = 20  # launches of one operator in a graph, so that the graph's own launch hardly counts
TOLERANCE = {"fp32": 2e-5, "fp16": 5e-3}  # of the largest output: a few roundings


def median_us(run, runs: int = 200, warmup: int = 20) -> float:
    """Median device time of `run`, in microseconds."""
    for _ in range(warmup):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in events)


def operator_us(call: trace.Call) -> float:
    """Time of one operator inside a graph of `REPEATS`."""
    run = getattr(kernels, call.name)
    run(*call.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run(*call.arguments)
    return median_us(graph.replay, 20, warmup=2) / REPEATS


def moved_bytes(call: trace.Call) -> int:
    """Every argument read once and every result written once."""
    tensors = [*call.arguments, *call.outputs]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def ceilings() -> dict:
    """What this card does at best, in bytes and FLOP per second.

    That is in a copy, bytes read and written, and in a half-precision product of 8192 x 8192
    matrices.
    """
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    copy_us = median_us(lambda: target.copy_(source), runs=20, warmup=3)
    a, b = torch.randn(2, 8192, 8192, dtype=torch.float16, device="cuda")
    product_us = median_us(lambda: a @ b, runs=20, warmup=3)
    return {
        "gpu": torch.cuda.get_device_name(),
        "operator": "ceiling",
        "bytes_per_s": 2 * source.nbytes / copy_us * 1e6,
        "flops_per_s": 2 * 8192**3 / product_us * 1e6,
    }


def arithmetic(call: trace.Call) -> int:
    """FLOP of an operator's convolutions and products, as its plain twin does them."""
    counted = {torch.ops.torchvision.deform_conv2d.default: deform_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        trace.run(call, reference)
    return counter.get_total_flops()


def deform_flops(x_shape, weight_shape, *arguments, out_shape=None, **options) -> int:
    """Of the product; the sampling is not counted."""
    batch, _, height, width = x_shape
    return 2 * batch * height * width * math.prod(weight_shape)


def record_calls(spec: Spec, images: torch.Tensor, ops) -> list[trace.Call]:
    """The operator calls of one run."""
    selection = spec.selection
    model = ALIKED.from_pretrained(spec.model, *astuple(selection), weights=spec.weights)
    packed = weights.pack(model, DTYPES[spec.precision], images.device)
    recorder = trace.Recorder(ops)
    pipeline.extract(images, packed, selection, recorder)
    return recorder.calls


def operator_records(spec: Spec, images: torch.Tensor, timed: bool) -> list[dict]:
    """One record per operator call: its difference from the twin and its time."""
    records = []
    for i, call in enumerate(record_calls(spec, images, reference)):
        errors = trace.differences(call, kernels)
        record = {"step": i, "operator": call.name, "errors": errors, "bytes": moved_bytes(call)}
        record["flops"] = arithmetic(call)
        record["passed"] = max(errors) <= TOLERANCE[spec.precision]
        if timed:
            record["us"] = operator_us(call)
        records.append(record)
    return records


def extractor_record(spec: Spec, images: torch.Tensor) -> dict:
    """Time and memory of the whole extractor on images already on the device."""
    extractor = FusedExtractor(spec)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    extractor.infer(images)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    (plan,) = extractor.plans.values()
    return {
        "operator": "infer",
        "us": median_us(lambda: extractor.infer(images)),
        "graph_us": median_us(plan.graph.replay),
        "peak_bytes": peak,
    }


def print_records(title: str, records: list[dict]) -> None:
    """A short table."""
    print(f"\n{title}")
    for r in records:
        flag = "" if r.get("passed", True) else "  FAILED"
        error = " ".join(f"{error:.0e}" for error in r.get("errors", []))
        us = f"{r['us']:8.2f} us" if "us" in r else ""
        rate = f"{r['bytes'] / r['us'] / 1e3:7.0f} GB/s" if "us" in r and "bytes" in r else ""
        extra = (
            f"graph {r['graph_us']:.2f} us, {r['peak_bytes'] / 2**20:.1f} MiB"
            if "graph_us" in r
            else ""
        )
        print(f"  {r['operator']:16s}{us} {rate} {error} {extra}{flag}")
    if all("us" in r for r in records):
        print(f"  sum of operators {sum(r['us'] for r in records if 'errors' in r):.1f} us")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__)
    p.add_argument("images", type=Path, nargs="+", help="image files, one per size")
    p.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    p.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    p.add_argument("--top_k", type=int, default=1000, help="keypoints; default %(default)s")
    p.add_argument("--batches", type=int, nargs="+", default=[1], help="images per batch")
    p.add_argument("--weights", type=Path, help="folder with <model>.pth")
    p.add_argument("--check_only", action="store_true", help="no timing")
    p.add_argument("--output", type=Path, help="JSONL file to write")
    return p


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    """Exit status 1 where an operator differs from its twin."""
    torch.backends.cudnn.allow_tf32 = False  # the twins are plain float32
    everything = [] if args.check_only else [ceilings()]
    for model in args.models:
        for precision in args.precisions:
            for path in args.images:
                for batch in args.batches:
                    everything += run_case(args, model, precision, path, batch)
    if args.output:
        lines = (json.dumps(record) + "\n" for record in everything)
        files.write_text(args.output, "".join(lines))
    failed = sum(not record.get("passed", True) for record in everything)
    print(f"\n{len(everything)} records, {failed} failed")
    return int(failed > 0)


def run_case(args, model: str, precision: str, path: Path, batch: int) -> list[dict]:
    """All records of one model, precision, image and batch size."""
    image = torch.from_numpy(load_image(path)).cuda()
    images = torch.stack([image.roll(7 * i, dims=1) for i in range(batch)])
    weights_file = args.weights / f"{model}.pth" if args.weights else None
    spec = Spec(model=model, top_k=args.top_k, precision=precision, weights=weights_file)
    records = operator_records(spec, images, timed=not args.check_only)
    if not args.check_only:
        records.append(extractor_record(spec, images))
    case = {"model": model, "precision": precision, "shape": list(images.shape[:3])}
    print_records(str(case), records)
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    return [{**gpu, **case, **record} for record in records]


if __name__ == "__main__":
    cli.run(main, parser())
