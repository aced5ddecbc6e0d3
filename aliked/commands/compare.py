"""Stage 4: what is lost between two runtimes or precisions, keypoint by keypoint."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked.backends import BACKENDS, Spec
from aliked.cli import Parser, command_line, positive
from aliked.comparison import (
    ImageComparison,
    Numbers,
    compare_image,
    draw_histogram,
    match_change,
    report_text,
    write_histogram,
)
from aliked.configs import CONFIGS, get_config
from aliked.doctor import packages
from aliked.download import offer_download
from aliked.drawing import draw_differences, write_picture
from aliked.features import Extractor
from aliked.files import (
    check_kept,
    check_writable,
    remove_files,
    sha256,
    writable_folder,
    write_json,
    write_text,
)
from aliked.images import list_images, load_readable
from aliked.matching import Matcher
from aliked.options import (
    add_device_option,
    add_matcher_options,
    add_selection_options,
    add_size_option,
    add_weights_option,
    check_selection,
    matcher_from,
)
from aliked.parity import RADIUS_PX
from aliked.sides import Side, choose_side, common_model, open_side
from aliked.weights import find_weights

WRITTEN = ("comparison.md", "comparison.json", "dot_products.png", "keypoints_*.png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(
        description=__doc__,
        epilog="Without further options PyTorch in half precision is compared with PyTorch in "
        f"float32, which runs everywhere. Backends: {', '.join(BACKENDS)}.",
    )
    p.add_argument("images", type=Path, metavar="FOLDER", help="folder of images, in their order")
    for role, usual in (("reference", "fp32"), ("other", "fp16")):
        p.add_argument(
            f"--{role}",
            metavar="BACKEND[:PRECISION]",
            help="runtime, and fp32 or fp16 (default: what runs the file and its own precision; "
            f"without a file pytorch:{usual})",
        )
        p.add_argument(
            f"--{role}_model_path", type=Path, metavar="FILE", help="its .onnx or .trt file"
        )
    add_shared_options(p.add_argument_group("both sides"))
    add_size_option(p)
    p.add_argument(
        "--radius",
        type=positive,
        default=RADIUS_PX,
        metavar="PX",
        help="keypoints further apart are not the same (default: %(default)s)",
    )
    add_matcher_options(p.add_argument_group("matching, in float32"))
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of report, numbers and pictures (default: output/compare-DATE-TIME)",
    )
    return p


def add_shared_options(group: argparse._ArgumentGroup) -> None:
    """The model, where it runs, and how it selects keypoints."""
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"one of {', '.join(CONFIGS)} (default: the files', or {Spec.model})",
    )
    add_weights_option(group)
    add_device_option(group)
    add_selection_options(group)


def sides_from(args: argparse.Namespace) -> tuple[Side, Side]:
    """What to compare; `InputError` where the options do not go together."""
    reference = choose_side("reference", args.reference, args.reference_model_path, "fp32")
    other = choose_side("other", args.other, args.other_model_path, "fp16")
    return reference, other


def spec_from(args: argparse.Namespace, sides: tuple[Side, Side]) -> Spec:
    """What both sides have in common."""
    model = common_model(args.model, sides)
    get_config(model)
    return Spec(
        model=model,
        top_k=args.top_k,
        scores_th=check_selection(args.top_k, args.scores_th, args.n_limit),
        n_limit=args.n_limit,
        device=args.device,
        weights=args.weights,
    )


def compare(
    paths: list[Path],
    reference: Extractor,
    other: Extractor,
    radius: float,
    max_size: int | None = None,
) -> Iterator[tuple[np.ndarray, ImageComparison]]:
    """Each image that can be read with what both runtimes find in it, when its turn comes."""
    bar = tqdm(paths, unit="image", disable=None)  # no bar where nobody looks
    for path, image in load_readable(bar, max_size):
        yield (
            image,
            compare_image(path.name, reference(image), other(image), radius, image.shape[1::-1]),
        )


def picture(image: np.ndarray, found: ImageComparison, title: str) -> np.ndarray:
    """The keypoints of both runtimes on the image."""
    keypoints = found.reference.keypoints
    return draw_differences(
        image,
        keypoints[found.pairs.reference],
        keypoints[found.missed],
        found.other.keypoints[found.extra],
        f"{found.name}, {title}",
    )


def main(args: argparse.Namespace) -> None:
    """Compare image by image, each with its picture; then report the numbers in total."""
    offer_download(args.images)
    paths = list_images(args.images)
    sides = sides_from(args)
    spec = spec_from(args, sides)
    folder = args.output or Path("output") / time.strftime("compare-%Y%m%d-%H%M%S")
    check_writable(folder)
    check_kept([args.images], folder, *WRITTEN)
    matcher = matcher_from(args, spec.model)
    extractors = [open_side(side, spec) for side in sides]
    output = writable_folder(folder)
    remove_files(output, *WRITTEN)  # an older run's

    labels = [side.label(extractor) for side, extractor in zip(sides, extractors, strict=True)]
    title = f"{spec.model}: {labels[1]} against {labels[0]}"

    numbers, previous = Numbers(), None
    for image, found in compare(paths, *extractors, args.radius, args.max_size):
        numbers.add_image(found)
        if previous:
            numbers.add_matches(match_change(previous, found, matcher))
        file = output / f"keypoints_{len(numbers.images):04}.png"
        write_picture(file, picture(image, found, title))
        previous = found
    write_results(output, title, numbers, provenance(args, spec, sides, labels, matcher))


def provenance(
    args: argparse.Namespace,
    spec: Spec,
    sides: tuple[Side, Side],
    labels: list[str],
    matcher: Matcher,
) -> dict:
    """What the numbers belong to."""
    files = [side.path or find_weights(spec.model, spec.weights) for side in sides]
    made_from = [{"file": str(file), "sha256": sha256(file)} for file in files]
    return {
        "reference": {"runtime": labels[0], "made_from": made_from[0]},
        "other": {"runtime": labels[1], "made_from": made_from[1]},
        "model": spec.model,
        "top_k": spec.top_k,
        "scores_th": spec.scores_th,
        "n_limit": spec.n_limit,
        "radius_px": args.radius,
        "matcher": args.matcher or "mutual",
        "min_similarity": getattr(matcher, "min_similarity", None),
        "folder": str(args.images),
        "max_size": args.max_size,
        "versions": packages(),
        "command": command_line(),
    }


def write_results(output: Path, title: str, numbers: Numbers, facts: dict) -> None:
    """Print the report; write it, the numbers and the histogram."""
    summary = numbers.summary()
    text = report_text(title, summary, facts["radius_px"], facts["matcher"])
    print(text + "\n")
    figure = draw_histogram(numbers.dot_products(), numbers.similarities(), title)
    write_histogram(output / "dot_products.png", figure)
    write_text(output / "comparison.md", text + "\n")
    write_json(output / "comparison.json", facts | summary)
    print(f"wrote {', '.join(WRITTEN)} to {output}")
