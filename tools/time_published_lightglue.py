"""Time the published LightGlue on this GPU: as it is, with its own `compile()`, and adaptively.

    python -m tools.time_published_lightglue assets/sequence_640x480 --published lightglue.py

The file is lightglue/lightglue.py of github.com/cvg/LightGlue. The first two images' features, of
PyTorch in float32, stay on the GPU; half precision is its `mp`, autocast. Compare with the rows
"LightGlue alone" of `measure_timings.py --matcher lightglue`, which times by the same clock: they
run all layers on all keypoints. Adaptive depth and width depend on the data, so they stand here for
both codes; on a GPU the published one drops keypoints only where there are 1024 or 1536 of them.
Writes a JSON line for each K and form, with what it matches beside this project's float32.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from aliked import cli, files
from aliked.features import Features
from aliked.images import list_images, load_image
from aliked.lightglue import LightGlue
from aliked.matching import Matches, Size, matches_of_rows
from aliked.model import ALIKED
from aliked.parity import compare_matches
from aliked.weights import LIGHTGLUE, load_state_dict
from benchmark.environment import git_commit
from benchmark.timing import CudaClock

RUNS, WARMUP = 200, 30
CONFIDENCES = {"depth_confidence": 0.95, "width_confidence": 0.99}  # the paper's


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.partition("\n")[0])
    p.add_argument("images", type=Path, metavar="FOLDER", help="its first two images are matched")
    p.add_argument("--published", type=Path, required=True, metavar="FILE", help="its lightglue.py")
    p.add_argument("--model", default="aliked-n16rot")
    p.add_argument("--top_k", type=cli.whole(1), nargs="+", default=[1000, 2048], metavar="K")
    p.add_argument("--weights", type=Path, metavar="FOLDER", help="folder with both weights")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    return p


def load_module(path: Path) -> ModuleType:
    """The published file as a module."""
    spec = importlib.util.spec_from_file_location("published_lightglue", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pair(NamedTuple):
    """Two images' features and sizes (width, height)."""

    features: tuple[Features, Features]
    sizes: tuple[Size, Size]

    def published(self) -> dict:
        """What the published code takes, on the GPU."""
        return {
            f"image{number}": {
                "keypoints": torch.from_numpy(features.keypoints).cuda()[None],
                "descriptors": torch.from_numpy(features.descriptors).cuda()[None],
                "image_size": torch.tensor([size], dtype=torch.float32, device="cuda"),
            }
            for number, (features, size) in enumerate(zip(*self, strict=True))
        }


def features_of(args: argparse.Namespace, top_k: int) -> Pair:
    """The features of the first two images, by PyTorch in float32."""
    model = ALIKED.from_pretrained(args.model, top_k, weights=args.weights, device="cuda")
    first, second = (load_image(path) for path in list_images(args.images)[:2])
    features = model.extract(first), model.extract(second)
    return Pair(features, (first.shape[1::-1], second.shape[1::-1]))


@dataclass(frozen=True)
class Form:
    """One way to run a matcher."""

    code: str  # "published" or "ours"
    compiled: bool = False  # by its own `compile()`
    adaptive: bool = False  # depth and width, with the paper's confidences


FORMS = (
    Form("published"),
    Form("published", compiled=True),
    Form("published", adaptive=True),
    Form("ours", adaptive=True),
)


def published(form: Form, args: argparse.Namespace, pair: Pair) -> Callable[[], Any]:
    """What runs the published code once."""
    module = load_module(args.published)
    options = dict(CONFIDENCES) if form.adaptive else dict.fromkeys(CONFIDENCES, -1)
    matcher = module.LightGlue(features=None, input_dim=128, mp=True, **options)
    matcher.load_state_dict(load_state_dict(LIGHTGLUE, args.weights), strict=False)
    matcher = matcher.eval().cuda()
    if form.compiled:
        matcher.compile(static_lengths=[len(pair.features[0])])
    data = pair.published()
    return lambda: matcher(data)


def ours(form: Form, args: argparse.Namespace, pair: Pair) -> Callable[[], Matches]:
    """What runs this project's matcher once, on features that are on the device already."""
    options = CONFIDENCES if form.adaptive else {}
    matcher = LightGlue.from_pretrained(args.weights, "cuda", "fp16", **options)
    prepared = [matcher.prepare(*side) for side in zip(pair.features, pair.sizes, strict=True)]
    return lambda: matcher.match_prepared(*prepared)


def to_matches(output: Any) -> tuple[Matches, int]:
    """The matches of either code, and how many layers ran."""
    if isinstance(output, Matches):
        return output, output.layers
    rows = (output[name][0].cpu().numpy() for name in ("matches0", "matching_scores0"))
    return matches_of_rows(*rows), output["stop"]


@torch.inference_mode()
def row(args: argparse.Namespace, form: Form, top_k: int) -> dict:
    """One form's time and matches."""
    pair = features_of(args, top_k)
    run = (published if form.code == "published" else ours)(form, args, pair)
    clock = CudaClock("cuda")
    for _ in range(WARMUP):
        output = run()
    found, layers = to_matches(output)
    options = CONFIDENCES if form.adaptive else {}
    reference = LightGlue.from_pretrained(args.weights, device="cuda", **options)
    parity = compare_matches(reference.match(*pair.features, *pair.sizes), found)
    times = [clock(run, torch.cuda.synchronize)[0].ms for _ in range(RUNS)]
    return {
        **asdict(form),
        "top_k": top_k,
        "p50": statistics.median(times),
        "p90": statistics.quantiles(times, n=10)[-1],
        "layers": layers,
        "matches": [parity.reference, parity.other, parity.common],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": git_commit(),
    }


def main(args: argparse.Namespace) -> None:
    """Every K and form, printed and written."""
    torch._dynamo.config.recompile_limit = 64  # a layer is a recompilation
    rows = []
    for top_k in args.top_k:
        for form in FORMS:
            rows.append(row(args, form, top_k))
            print(rows[-1], flush=True)
    files.write_text(args.output, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main, parser())
