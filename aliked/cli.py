"""What every script does the same way: run its `main`, turn bad input into one sentence."""

import argparse
import errno
import io
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from aliked.backends import BACKENDS, Spec, get_backend
from aliked.configs import CONFIGS, get_config
from aliked.errors import EXTRAS, InputError, missing_package
from aliked.files import shortest
from aliked.matching import (
    LIGHTGLUE_DIM,
    MATCHERS,
    MIN_SIMILARITY,
    Matcher,
    MutualMatcher,
    check_descriptor_length,
)
from aliked.weights import LIGHTGLUE


class Parser(argparse.ArgumentParser):
    """A command line whose faults are `InputError`s: one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(message)


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main(args)` and exit.

    Exit status: what `main` returns (None is 0), 2 with one sentence for an `InputError`, a package
    that an extra brings and is missing, a full disk or too little memory, 128 + N where signal N
    ended it (130 for Ctrl-C, 141 where nobody reads the output any more).
    """
    stop_by_exception()
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(parser.parse_args(arguments)) or 0
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        status = _status_of(error, parser.prog)
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _status_of(error, parser.prog)
        # What could not be written would be tried, and complained about, once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def command_line() -> str:
    """This process's command as it can be typed again, for manifests and records.

    Of a path outside the working directory only the name is told, as in `.../weights`: the folders
    above it are of this machine, and records are published.
    """
    program, *words = sys.argv
    words = ["aliked", *words] if is_command() else ["python", program, *words]
    return shlex.join(map(_without_folders, words))


def is_command() -> bool:
    """Whether this process is the command `aliked`, not a script of the checkout."""
    return Path(sys.argv[0]).name in ("aliked", "__main__.py")


def _without_folders(word: str) -> str:
    """A word of a command line, such as `FILE` or `--output=FILE`, without this machine's folders.

    Paths that are relative stay as they are.
    """
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        short = shortest(path)
        value = str(Path("...", path.name) if short.is_absolute() else short)
    return f"{option}{equals}{value}"


def stop_by_exception() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what is half-written is removed."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, stop)


def _status_of(error: Exception, prog: str) -> int:
    """Say in a sentence what has gone wrong outside the program; raise `error` if nothing has."""
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    sentence = str(error) if isinstance(error, InputError) else _outside(error)
    if sentence is None:
        raise error
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    return 2


OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "Insufficient memory")


def _outside(error: Exception) -> str | None:
    """The sentence for an error of the machine, whichever library it comes through."""
    if isinstance(error, ModuleNotFoundError):
        known = (error.name or "").partition(".")[0] in EXTRAS
        return missing_package(error) if known else None
    text = " ".join(str(error).split())
    place = getattr(error, "filename", None) or ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"the disk {place and f'of {place} '}is full; make room and run the same again"
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        reason = text[:200] or type(error).__name__
        return f"there is not enough memory ({reason}); give smaller images"
    if isinstance(error, OSError):
        return f"{place or 'the output'}: {error.strerror or text}; give another path"
    return None


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number from `low`, or `above` it, to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or math.isinf(value) or (above and value == low):
            least = f"above {low:g}" if above else f"from {low:g}"
            most = "" if math.isinf(high) else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]} is no number {least}{most}")
        return value

    return parse


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            most = "" if high == 2**31 - 1 else f", at most {high}"
            raise argparse.ArgumentTypeError(
                f"{text[:40]} is no whole number to go by; give at least {low}{most}"
            )
        return value

    return parse


positive, share, cosine = number(0, above=True), number(0, 1), number(-1, 1)
seed = whole(0, 10**9)  # every library takes these, and some more from each on


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table, the first `left` columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


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
    from aliked.video import is_video  # here: it loads OpenCV, which most commands do without

    for name in ("every", "frames"):
        if getattr(args, name) is not None and not is_video(args.images):
            raise InputError(f"--{name} needs a video or a camera; leave it out, or give one")
    if str(args.images).isdigit() and args.frames is None and not endless:
        raise InputError(f"camera {args.images} has no end; pass --frames N")


def add_lines_option(parser: argparse.ArgumentParser, usual: int) -> None:
    """Add how many matches a picture shows: a number, or None for "all"."""
    parser.add_argument(
        "--lines",
        type=lambda text: None if text == "all" else whole(0)(text),
        default=usual,
        metavar="N",
        help="how many matches of a pair to draw, spread over the image, the most similar first; "
        "or all (default: %(default)s)",
    )


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
