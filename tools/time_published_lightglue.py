"""Time the published LightGlue on this GPU, as it is and with its own `compile()`, all layers.

    python -m tools.time_published_lightglue assets/sequence_640x480 --published lightglue.py

The file is lightglue/lightglue.py of github.com/cvg/LightGlue. The first two images' features, of
PyTorch in float32, stay on the GPU; half precision is its `mp`, autocast. Compare with the rows
"LightGlue alone" of `measure_timings.py --matcher lightglue`, which times by the same clock.
Writes a JSON line for each K and form, with what it matches beside this project's float32.
"""

import argparse
import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import torch

from aliked import cli, files
from aliked.images import list_images, load_image
from aliked.lightglue import LightGlue
from aliked.matching import Matches, matches_of_rows
from aliked.model import ALIKED
from aliked.parity import compare_matches
from aliked.weights import LIGHTGLUE, load_state_dict
from benchmark.timing import CudaClock

RUNS, WARMUP = 200, 30


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__.partition("\n")[0])
    p.add_argument("images", type=Path, metavar="FOLDER", help="its first two images are matched")
    p.add_argument("--published", type=Path, required=True, metavar="FILE", help="its lightglue.py")
    p.add_argument("--model", default="aliked-n16rot")
    p.add_argument("--top_k", type=int, nargs="+", default=[1000, 2048], metavar="K")
    p.add_argument("--weights", type=Path, metavar="FOLDER", help="folder with both weights")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines")
    return p


def load_module(path: Path) -> ModuleType:
    """The published file as a module."""
    spec = importlib.util.spec_from_file_location("published_lightglue", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def features_of(args: argparse.Namespace, top_k: int) -> tuple[dict, Matches]:
    """Both images' features as the published code takes them, and what ours matches of them."""
    model = ALIKED.from_pretrained(args.model, top_k, weights=args.weights, device="cuda")
    matcher = LightGlue.from_pretrained(args.weights, device="cuda")
    images = [load_image(path) for path in list_images(args.images)[:2]]
    features = [model.extract(image) for image in images]
    sizes = [image.shape[1::-1] for image in images]
    sides = zip(features, sizes, strict=True)
    data = {
        f"image{number}": {
            "keypoints": torch.from_numpy(side.keypoints).cuda()[None],
            "descriptors": torch.from_numpy(side.descriptors).cuda()[None],
            "image_size": torch.tensor([size], dtype=torch.float32, device="cuda"),
        }
        for number, (side, size) in enumerate(sides)
    }
    return data, matcher.match(*features, *sizes)


@torch.inference_mode()
def row(args: argparse.Namespace, module: ModuleType, top_k: int, compiled: bool) -> dict:
    """One form's time and matches."""
    data, expected = features_of(args, top_k)
    options = {"depth_confidence": -1, "width_confidence": -1, "mp": True}
    matcher = module.LightGlue(features=None, input_dim=128, **options)
    matcher.load_state_dict(load_state_dict(LIGHTGLUE, args.weights), strict=False)
    matcher = matcher.eval().cuda()
    if compiled:
        matcher.compile(static_lengths=[top_k])
    clock = CudaClock("cuda")
    for _ in range(WARMUP):
        output = matcher(data)
    found = matches_of_rows(*(output[n][0].cpu().numpy() for n in ("matches0", "matching_scores0")))
    parity = compare_matches(expected, found)
    times = [clock(lambda: matcher(data), torch.cuda.synchronize)[0].ms for _ in range(RUNS)]
    return {
        "top_k": top_k,
        "compiled": compiled,
        "p50": statistics.median(times),
        "p90": statistics.quantiles(times, n=10)[-1],
        "matches": [parity.reference, parity.other, parity.common],
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main(args: argparse.Namespace) -> None:
    """Every K and form, printed and written."""
    torch._dynamo.config.recompile_limit = 64  # a layer is a recompilation
    module, rows = load_module(args.published), []
    for top_k in args.top_k:
        for compiled in (False, True):
            rows.append(row(args, module, top_k, compiled))
            print(rows[-1], flush=True)
    with files.whole_file(args.output) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    cli.run(main, parser())
