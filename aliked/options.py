"""Options that several commands share, and what they mean: model, weights, extractor, matcher."""

import argparse
from pathlib import Path

from aliked.backends import BACKENDS, Spec, get_backend
from aliked.cli import cosine, share, whole
from aliked.configs import CONFIGS, get_config
from aliked.errors import InputError
from aliked.matching import (
    LIGHTGLUE_DIM,
    MATCHERS,
    MIN_SIMILARITY,
    Matcher,
    MutualMatcher,
    check_descriptor_length,
)
from aliked.weights import LIGHTGLUE


def add_extractor_options(parser: argparse.ArgumentParser) -> None:
    """The image folder, and the options that choose and set up an extractor."""
    parser.add_argument("images", type=Path, metavar="FOLDER", help="folder of images")
    group = parser.add_argument_group("extractor")
    add_model_options(group)
    group.add_argument(
        "--backend",
        default="pytorch",
        metavar="NAME",
        help=f"one of {', '.join(BACKENDS)} (default: %(default)s)",
    )
    group.add_argument(
        "--model_path", type=Path, metavar="FILE", help="model file of a backend that runs a file"
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "fp16"),
        help="of the model, where the backend runs no file, whose precision is its own (default: "
        "fp32, or the only one that the backend has)",
    )
    add_device_option(group)
    add_selection_options(group)


def add_model_options(group: argparse._ArgumentGroup) -> None:
    """Which model, with which weights."""
    group.add_argument(
        "--model",
        default=Spec.model,
        metavar="NAME",
        help=f"one of {', '.join(CONFIGS)} (default: %(default)s)",
    )
    add_weights_option(group)


def add_weights_option(group: argparse._ArgumentGroup) -> None:
    """Where the weights are."""
    group.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="the model's .pth or .safetensors file, or a folder with it (default: the shipped "
        "file; of an official model $ALIKED_WEIGHTS_DIR, the user cache, download)",
    )


def add_device_option(group: argparse._ArgumentGroup) -> None:
    """What to run on."""
    group.add_argument(
        "--device",
        default=Spec.device,
        help="auto (CUDA where there is a GPU), cpu, cuda or cuda:N (default: %(default)s)",
    )


def add_selection_options(group: argparse._ArgumentGroup) -> None:
    """Which keypoints an image gives: the best ones, or those above a threshold."""
    group.add_argument(
        "--top_k",
        type=whole(-1),
        default=Spec.top_k,
        metavar="K",
        help="keypoints per image, the best by score; 0 or less: all above --scores_th "
        f"(default: {Spec.top_k})",
    )
    group.add_argument(
        "--scores_th",
        type=share,
        metavar="SCORE",
        help="with --top_k 0: lowest score of a keypoint, 0 to 1, such as 0.2; an image in which "
        "none passes has no keypoint (the official code would take those above its mean score)",
    )
    group.add_argument(
        "--n_limit",
        type=whole(0),
        default=Spec.n_limit,
        metavar="N",
        help=f"with --top_k 0: at most this many keypoints per image (default: {Spec.n_limit})",
    )


def check_selection(top_k: int, scores_th: float | None, n_limit: int = Spec.n_limit) -> float:
    """The threshold, which top-k mode does without.

    `InputError` where it is missing, and for what would be ignored.
    """
    if top_k <= 0 and scores_th is None:
        raise InputError(
            f"--top_k {top_k} selects keypoints by score, but there is no threshold; "
            "pass --scores_th as well, for example 0.2"
        )
    if top_k > 0 and (scores_th is not None or n_limit != Spec.n_limit):
        option = "--n_limit" if scores_th is None else "--scores_th"
        raise InputError(
            f"{option} selects keypoints by score, but --top_k {top_k} keeps the best ones, "
            "whatever their score; leave it out, or pass --top_k 0"
        )
    return Spec.scores_th if scores_th is None else scores_th


def add_size_option(parser: argparse.ArgumentParser) -> None:
    """Add how large images may be."""
    parser.add_argument(
        "--max_size",
        type=whole(32),
        metavar="PX",
        help="reduce images to this longer side (default: as they are)",
    )


def add_video_options(group: argparse._ActionsContainer) -> None:
    """Add which frames of a video or a camera are taken."""
    group.add_argument(
        "--every", type=whole(1), metavar="N", help="of a video, only every N-th frame"
    )
    group.add_argument(
        "--frames", type=whole(1), metavar="N", help="of a video or a camera, at most N frames"
    )


def check_video_options(args: argparse.Namespace, endless: bool = False) -> None:
    """Raise `InputError` where they are without effect, or a camera's run would have no end."""
    # Here: it loads OpenCV, which most commands do without.
    from aliked.video import is_camera, is_video

    for name in ("every", "frames"):
        if getattr(args, name) is not None and not is_video(args.images):
            raise InputError(f"--{name} needs a video or a camera; leave it out, or give one")
    if is_camera(args.images) and args.frames is None and not endless:
        raise InputError(f"camera {args.images} has no end; pass --frames N")


def choose_precision(backend: str, asked: str | None) -> str:
    """The precision of a backend: as `asked`, or its first; `InputError` where it has none such."""
    row = get_backend(backend)
    if asked and row.suffix:
        raise InputError(
            f"backend {backend} runs a file, whose precision is its own; leave --precision out"
        )
    if asked and asked not in row.precisions:
        raise InputError(
            f"backend {backend} has {' and '.join(row.precisions)} only; leave --precision "
            f"{asked} out"
        )
    return asked or row.precisions[0]


def extractor_spec(args: argparse.Namespace) -> Spec:
    """The options as a `Spec`; `InputError` where they do not go together."""
    get_config(args.model)
    scores_th = check_selection(args.top_k, args.scores_th, args.n_limit)
    on_gpu = args.device.partition(":")[0] == "cuda"
    if on_gpu and "cuda" not in get_backend(args.backend).devices:
        raise InputError(
            f"backend {args.backend} runs on the CPU only; leave --device {args.device} out"
        )
    return Spec(
        model=args.model,
        top_k=args.top_k,
        scores_th=scores_th,
        n_limit=args.n_limit,
        precision=choose_precision(args.backend, args.precision),
        device=args.device,
        weights=args.weights,
        model_path=args.model_path,
    )


def add_matcher_options(group: argparse._ArgumentGroup) -> None:
    """How the features of two images are matched; `matcher_from` knows what was not given."""
    group.add_argument(
        "--matcher",
        choices=MATCHERS,
        help="mutual nearest neighbours of the descriptors, or LightGlue (default: mutual)",
    )
    add_matcher_weights(group)
    group.add_argument(
        "--min_similarity",
        type=cosine,
        metavar="COSINE",
        help="mutual: lowest descriptor similarity of a match, -1 to 1 (default: "
        f"{MIN_SIMILARITY})",
    )


def add_matcher_weights(group: argparse._ActionsContainer) -> None:
    """Where LightGlue's weights are."""
    group.add_argument(
        "--matcher_weights",
        type=Path,
        metavar="PATH",
        help=f"{LIGHTGLUE}.pth, or a folder with it (default: $ALIKED_WEIGHTS_DIR, the user "
        "cache, download)",
    )


def matcher_from(args: argparse.Namespace, model: str, mutual_device: str = "cpu") -> Matcher:
    """The matcher that the command line asks for, for descriptors of `model`.

    LightGlue runs on `--device`, mutual nearest neighbours, which need no PyTorch on a CPU, on
    `mutual_device`.

    `InputError` where an option would be ignored, or the matcher is made for other descriptors.
    """
    if args.matcher == "lightglue":
        if args.min_similarity is not None:
            raise InputError(
                "--min_similarity is of mutual matching, and LightGlue has a score of its own; "
                "leave it out"
            )
        check_descriptor_length(get_config(model).dim, LIGHTGLUE_DIM)
    elif args.matcher_weights is not None:
        raise InputError("--matcher_weights are LightGlue's; pass --matcher lightglue as well")
    if args.matcher != "lightglue":
        limit = MIN_SIMILARITY if args.min_similarity is None else args.min_similarity
        return MutualMatcher(limit, mutual_device)
    from aliked.lightglue import LightGlue
    from aliked.transfer import choose_device  # here: mutual matching needs no PyTorch

    return LightGlue.from_pretrained(args.matcher_weights, choose_device(args.device))
