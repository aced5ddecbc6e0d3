"""What every script does the same way: run its `main`, turn bad input into one sentence."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from aliked.backends import BACKENDS, Spec, create_extractor
from aliked.configs import CONFIGS, get_config
from aliked.errors import EXTRAS, InputError, missing_package
from aliked.features import Extractor


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main(args)` and exit.

    Exit status: what `main` returns (None is 0), 2 for an `InputError` and for a missing package
    that an extra brings, 130 for Ctrl-C.
    """
    args = parser.parse_args(arguments)
    try:
        status = main(args) or 0
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(f"{parser.prog}: error: {missing_package(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def command_line() -> str:
    """This process's command as it can be typed again, for a manifest."""
    program = Path(sys.argv[0])
    if program.name in ("aliked", "__main__.py"):
        return " ".join(["aliked", *sys.argv[1:]])
    return " ".join(["python", *sys.argv])


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
        help="the model's .pth file, or a folder with it (default: the shipped file; of an "
        "official model $ALIKED_WEIGHTS_DIR, the user cache, download)",
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
        type=int,
        default=Spec.top_k,
        metavar="K",
        help="keypoints per image, the best by score; 0 or less: all above --scores_th "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--scores_th",
        type=float,
        metavar="SCORE",
        help="with --top_k 0: lowest score of a keypoint, 0 to 1, such as 0.2",
    )
    group.add_argument(
        "--n_limit",
        type=int,
        default=Spec.n_limit,
        metavar="N",
        help="with --top_k 0: at most this many keypoints per image (default: %(default)s)",
    )


def check_selection(top_k: int, scores_th: float | None) -> float:
    """The threshold, which top-k mode does without; `InputError` where it is missing."""
    if top_k <= 0 and scores_th is None:
        raise InputError(
            f"--top_k {top_k} selects keypoints by score, but there is no threshold; "
            "pass --scores_th as well, for example 0.2"
        )
    return Spec.scores_th if scores_th is None else scores_th


def extractor_spec(args: argparse.Namespace) -> Spec:
    """The options as a `Spec`; `InputError` where they do not go together."""
    get_config(args.model)
    scores_th = check_selection(args.top_k, args.scores_th)
    if args.model_path is not None and args.backend == "pytorch":
        raise InputError(
            f"backend pytorch does not run {args.model_path}; pass --backend onnxruntime"
        )
    return Spec(
        model=args.model,
        top_k=args.top_k,
        scores_th=scores_th,
        n_limit=args.n_limit,
        device=args.device,
        weights=args.weights,
        model_path=args.model_path,
    )


def extractor_from(args: argparse.Namespace) -> Extractor:
    """The extractor that the command line asks for."""
    return create_extractor(args.backend, extractor_spec(args))


def markdown(header: list[str], rows: list[list[str]], left: int) -> str:
    """Return a Markdown table, the first `left` columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
