"""Find the fastest tile sizes of the Triton kernels on this GPU and keep them in the user's cache.

They run in float32 only; the kernels of half precision have nothing that this would find. Every
setting is checked against the kernel's plain twin before it is timed: one that gives wrong results
is left out, as is one that this GPU cannot run.
"""

import argparse
import itertools
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from aliked import cli, files
from aliked.backends import Spec
from aliked.configs import CONFIGS
from aliked.fused import kernels, reference, trace, tuning
from aliked.images import load_image
from aliked.model import PRECISIONS
from tools.bench_fused import TOLERANCE, operator_us, record_calls

CHOICES = {
    "deform": {
        "M": [16], "N": [32, 64], "TAPS": [1, 3], "R": [32, 64], "K": [16, 32, 64],
        "STAGES": [2, 3], "num_warps": [4, 8],
    },
    "deform_level": {
        "M": [16], "TAPS": [1, 3], "R": [32, 64], "K": [16, 32, 64], "STAGES": [1, 3],
        "num_warps": [4, 8],
    },
    "sample_offsets": {
        "M": [8, 16], "R": [32, 64], "K": [32, 64], "STAGES": [3], "num_warps": [4, 8],
    },
}  # fmt: skip


# Which two arguments an operator describes itself by, where they are not the first two.
KEY_ARGUMENTS = {
    "deform": (0, 3),
    "deform_level": (0, 3),
    "sample_offsets": (1, 2),
}


def key(call: trace.Call) -> str:
    """The call's key in the file of settings, as its operator asks for it."""
    first, second = KEY_ARGUMENTS.get(call.name, (0, 1))
    return tuning.describe(call.name, call.arguments[first], call.arguments[second])


def settings(call: trace.Call) -> list[dict]:
    """Every setting to try for a call."""
    choices = CHOICES[call.name]
    found = []
    for values in itertools.product(*choices.values()):
        setting = dict(zip(choices, values, strict=True))
        if setting.get("N", 0) > call.outputs[0].shape[-1]:
            continue
        found.append(setting)
    return found


def run_with(call: trace.Call, setting: dict) -> tuple[torch.Tensor, ...] | None:
    """Results with a setting; None where this GPU cannot run it."""
    tuning.found(call.outputs[0].device)[key(call)] = setting
    try:
        return trace.run(call, kernels)
    except (triton.runtime.OutOfResources, triton.CompilationError, RuntimeError):
        return None


def compile_share(spec: Spec, image: Path, operators: list, share: int, shares: int) -> None:
    """Compile one share of all settings, so that the main process finds them in Triton's cache."""
    calls = distinct(record(spec, image), operators)
    work = [(call, setting) for call in calls for setting in settings(call)]
    for call, setting in work[share::shares]:
        run_with(call, setting)


def right(got: tuple | None, want: tuple, tolerance: float) -> bool:
    """Whether there are results and all are within the tolerance."""
    if got is None:
        return False
    return max(trace.relative(a, b) for a, b in zip(got, want, strict=True)) <= tolerance


@torch.inference_mode()
def record(spec: Spec, image: Path) -> list[trace.Call]:
    """The calls of one run of the plain twins."""
    images = torch.from_numpy(load_image(image))[None].cuda()
    return record_calls(spec, images, reference)


def distinct(calls: list[trace.Call], operators: list[str]) -> list[trace.Call]:
    """One call per key, of the given operators."""
    return list({key(call): call for call in calls if call.name in operators}.values())


@torch.inference_mode()
def tune(call: trace.Call, tolerance: float) -> tuple[dict, float, int]:
    """The fastest right setting of a call, its time in microseconds and how many were wrong."""
    want = trace.run(call, reference)
    times, wrong = [], 0
    for setting in settings(call):
        if right(run_with(call, setting), want, tolerance):
            times.append((operator_us(call, runs=5), setting))
        else:
            wrong += 1
    us, best = min(times, key=lambda item: item[0])
    tuning.found(call.outputs[0].device)[key(call)] = best
    return best, us, wrong


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("image", type=Path, help="image file of the size to tune for")
    p.add_argument("--models", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    p.add_argument("--precisions", nargs="+", default=["fp32"], choices=list(PRECISIONS))
    p.add_argument("--operators", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    p.add_argument("--weights", type=Path, help="folder with <model>.pth")
    p.add_argument("--jobs", type=int, default=4, help="processes that compile; default 4")
    return p


def main(args: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the twins are plain float32
    device = torch.device("cuda", torch.cuda.current_device())
    for model, precision in itertools.product(args.models, args.precisions):
        weights = args.weights / f"{model}.pth" if args.weights else None
        spec = Spec(model=model, precision=precision, weights=weights)
        with get_context("spawn").Pool(args.jobs) as pool:
            shares = [(spec, args.image, args.operators, i, args.jobs) for i in range(args.jobs)]
            pool.starmap(compile_share, shares)
        for call in distinct(record(spec, args.image), args.operators):
            best, us, wrong = tune(call, TOLERANCE[precision])
            print(f"{us:8.2f} us  {key(call)}  {best}  ({wrong} wrong)", flush=True)
            files.write_json(tuning.settings_file(device), tuning.found(device))
    print(f"wrote {tuning.settings_file(device)}")


if __name__ == "__main__":
    cli.run(main, parser())
