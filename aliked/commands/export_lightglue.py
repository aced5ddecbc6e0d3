"""Export LightGlue to ONNX, alone or behind ALIKED, and prove the file on pairs of real images."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aliked.cli import Parser, whole
from aliked.commands.export import checked_output, conclude
from aliked.configs import Form, get_config
from aliked.download import offer_download
from aliked.errors import InputError
from aliked.export.lightglue import (
    MatcherOptions,
    Pair,
    PairOptions,
    export_matcher,
    export_pair,
    verify_matcher,
    verify_pair,
)
from aliked.files import scratch_file, sha256
from aliked.images import list_images, load_image
from aliked.lightglue import LightGlue
from aliked.matching import LIGHTGLUE_DIM, check_descriptor_length
from aliked.model import ALIKED, DTYPES
from aliked.options import add_matcher_weights, add_model_options
from aliked.parity import Verdict
from aliked.sampling import SAMPLERS
from aliked.weights import LIGHTGLUE, find_weights

MODEL = "aliked-n16rot"


class Images(NamedTuple):
    """Two images of the folder."""

    name: str
    image0: np.ndarray  # uint8 [H, W, 3] RGB
    image1: np.ndarray


class Job(NamedTuple):
    """How to write the file and how to judge it."""

    options: MatcherOptions | PairOptions
    export: Callable[[Path], object]
    verify: Callable[[Path], Verdict]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = Parser(description=__doc__)
    p.add_argument(
        "images", type=Path, metavar="FOLDER", help="images: neighbours are the pairs of the check"
    )
    p.add_argument(
        "--graph",
        choices=("matcher", "pair"),
        default="matcher",
        help="matcher: features of two images to matches; pair: two images to keypoints and "
        "matches (default: %(default)s)",
    )
    p.add_argument(
        "--model_output",
        type=Path,
        metavar="FILE",
        help="file to write (default: converted_model/lightglue-GRAPH-topK-PRECISION.onnx)",
    )
    p.add_argument(
        "--num_pairs",
        type=whole(1),
        default=3,
        metavar="N",
        help="check on the first N pairs of the folder (default: %(default)s)",
    )
    add_matcher_weights(p)
    add_model_options(p.add_argument_group("extractor, which gives the features of the check"))
    add_graph_options(p.add_argument_group("graph"))
    p.set_defaults(model=MODEL)
    return p


def add_graph_options(group: argparse._ArgumentGroup) -> None:
    """How the file is written."""
    group.add_argument(
        "--top_k",
        type=whole(1),
        default=1000,
        metavar="K",
        help="keypoints per image that the file is made for (default: %(default)s)",
    )
    group.add_argument(
        "--dynamic",
        action="store_true",
        help="matcher: any number of keypoints and pairs; pair: any sizes of images",
    )
    group.add_argument(
        "--io",
        choices=("default", "colmap"),
        default="default",
        help="inputs and outputs of the matcher: this project's, or those that COLMAP's LightGlue "
        "matcher loads, for any number of keypoints (default: %(default)s)",
    )
    group.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    group.add_argument("--opset_version", type=int, default=19, metavar="N", help="17, 18 or 19")
    group.add_argument(
        "--uint8_input", action="store_true", help="pair: inputs uint8 [B, H, W, 3] RGB"
    )
    group.add_argument(
        "--deform_conv",
        choices=("gridsample", "gather"),
        help="pair: how standard operators express deformable convolution (default: gridsample)",
    )
    group.add_argument(
        "--sampling",
        choices=tuple(SAMPLERS),
        help="pair: how scores and features are sampled (default: gridsample)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise `InputError` for another model's descriptors, and what the chosen graph lacks."""
    check_descriptor_length(get_config(args.model).dim, LIGHTGLUE_DIM)
    if args.graph == "pair" and args.io == "colmap":
        raise InputError("COLMAP runs the matcher alone; leave out --graph pair with --io colmap")
    if args.graph == "matcher" and args.uint8_input:
        raise InputError("a matcher takes no image; pass --graph pair with --uint8_input")
    for name in ("deform_conv", "sampling"):
        if args.graph == "matcher" and getattr(args, name):
            raise InputError(f"a matcher samples nothing; pass --graph pair with --{name}")
        setattr(args, name, getattr(args, name) or "gridsample")


def output_path(args: argparse.Namespace) -> Path:
    """Where the file goes, after making sure that it can."""
    open_count = args.graph == "matcher" and (args.dynamic or args.io == "colmap")
    rows = "any" if open_count else f"top{args.top_k}"
    kind = "colmap" if args.io == "colmap" else args.graph
    name = f"lightglue-{kind}-{rows}-{args.precision}.onnx"
    return checked_output(args.model_output or Path("converted_model") / name)


def load_pairs(args: argparse.Namespace) -> list[Images]:
    """The first pairs of neighbours in the folder."""
    offer_download(args.images)
    paths = list_images(args.images)[: args.num_pairs + 1]
    if len(paths) < 2:
        raise InputError(f"{args.images} holds {len(paths)} image; the check needs two")
    images = [(path.name, load_image(path)) for path in paths]
    pairs = [
        Images(f"{name0} - {name1}", image0, image1)
        for (name0, image0), (name1, image1) in itertools.pairwise(images)
    ]
    if args.graph == "pair" and not args.dynamic:
        require_first_sizes(args.images, pairs)
    return pairs


def require_first_sizes(folder: Path, pairs: list[Images]) -> None:
    """Raise `InputError` at the first pair whose sizes are not those of the first one."""
    sizes = [" and ".join("{1}x{0}".format(*image.shape) for image in pair[1:]) for pair in pairs]
    for pair, size in zip(pairs, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"{pair.name} in {folder} have {size} pixels, but {pairs[0].name} have {sizes[0]}; "
                "a file for fixed sizes is checked on pairs of them: give images of one size, pass "
                "--num_pairs 1, or export it with --dynamic for any"
            )


def matcher_job(args: argparse.Namespace, matchers: list[LightGlue], pairs: list[Images]) -> Job:
    """The matcher alone; `matchers` are the one to export and the float32 reference."""
    top_k = None if args.dynamic or args.io == "colmap" else args.top_k
    options = MatcherOptions(top_k, args.opset_version, args.io)
    model = load_model(args, "fp32")
    features = [
        Pair(
            name,
            *(model.extract(image) for image in images),
            *(image.shape[1::-1] for image in images),
        )
        for name, *images in pairs
    ]
    return Job(
        options,
        lambda path: export_matcher(matchers[0], path, options),
        lambda path: verify_matcher(path, matchers[1], args.precision, options, features),
    )


def pair_job(args: argparse.Namespace, matchers: list[LightGlue], pairs: list[Images]) -> Job:
    """From two images to matches; the sizes are those of the first pair."""
    options = PairOptions(
        *(image.shape[1::-1] for image in pairs[0][1:]),
        opset=args.opset_version,
        deform_conv=args.deform_conv,
        dynamic=args.dynamic,
        uint8_input=args.uint8_input,
    )
    model = load_model(args, args.precision)
    model.form = Form(args.sampling)
    reference = load_model(args, "fp32")
    return Job(
        options,
        lambda path: export_pair(model, matchers[0], path, options),
        lambda path: verify_pair(path, reference, matchers[1], args.precision, pairs),
    )


def load_model(args: argparse.Namespace, precision: str) -> ALIKED:
    """The extractor in one precision."""
    return ALIKED.from_pretrained(args.model, args.top_k, weights=args.weights, precision=precision)


def main(args: argparse.Namespace) -> int:
    """Export, check, judge, and only then give the file its name."""
    check_options(args)
    path, pairs = output_path(args), load_pairs(args)
    matchers = [
        LightGlue.from_pretrained(args.matcher_weights, precision=precision)
        for precision in (args.precision, "fp32")
    ]
    job = (pair_job if args.graph == "pair" else matcher_job)(args, matchers, pairs)
    with scratch_file(path) as candidate:
        job.export(candidate)
        print(f"exported LightGlue to ONNX opset {args.opset_version}; ONNX's full check passed")
        verdict = job.verify(candidate)
        return conclude(candidate, path, verdict, facts_of(args, job.options))


def facts_of(args: argparse.Namespace, options: MatcherOptions | PairOptions) -> dict:
    """What the file is and what it was made from, for its manifest."""
    weights = [find_weights(LIGHTGLUE, args.matcher_weights)]
    if args.graph == "pair":
        weights.append(find_weights(args.model, args.weights))
    return {
        "graph": args.graph,
        "model": args.model,
        "precision": args.precision,
        **asdict(options),
        "weights": [{"file": file.name, "sha256": sha256(file)} for file in weights],
    }
