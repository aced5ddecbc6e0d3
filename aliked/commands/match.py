"""Look at the matches between consecutive images of a folder, a video or a camera.

In a window, or as files.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from aliked.backends import create_extractor, get_backend
from aliked.cli import Parser, whole
from aliked.download import offer_download
from aliked.drawing import (
    LINES,
    draw_matches,
    draw_motion,
    show,
    why_no_window,
    write_animation,
    write_picture,
)
from aliked.errors import InputError
from aliked.features import Extractor, Features
from aliked.files import check_kept, check_writable, remove_files, writable_folder
from aliked.images import list_images, load_readable, reduced
from aliked.matching import Matcher
from aliked.options import (
    add_extractor_options,
    add_matcher_options,
    add_size_option,
    add_video_options,
    check_video_options,
    extractor_spec,
    matcher_from,
)
from aliked.video import frames, is_video
from aliked.weights import describe_weights

MAX_FRAMES = 100  # of the animation, which is held in memory
ANIMATION = "motion.webp"
WRITTEN = ("pair_*.jpg", ANIMATION)


@dataclass(frozen=True)
class Frame:
    """One image with its features."""

    name: str
    image: np.ndarray  # uint8 [H, W, 3] RGB
    features: Features


@dataclass(frozen=True)
class MatchedFrames:
    """Two consecutive images and their matches."""

    first: Frame
    second: Frame
    matches: np.ndarray  # [P, 2] indices into the features of both

    def displacement(self) -> float:
        """Pixels between matched keypoints, summed."""
        i, j = self.matches.T
        shift = self.second.features.keypoints[j] - self.first.features.keypoints[i]
        return float(np.hypot(*shift.T).sum())

    def summary(self) -> str:
        """The pair in one line: names, keypoints, matches."""
        first, second = self.first, self.second
        return (
            f"{first.name} - {second.name}: "
            f"{len(first.features)} and {len(second.features)} keypoints, "
            f"{matches_text(len(self.matches), self.displacement())}"
        )

    def picture(self, lines: int | None) -> np.ndarray:
        """Both images and at most `lines` matches between them (None: all)."""
        first, second = self.first, self.second
        return draw_matches(
            first.image,
            first.features,
            second.image,
            second.features,
            self.matches,
            self.summary(),
            lines=lines,
        )

    def motion(self) -> np.ndarray:
        """The second image and where its keypoints came from."""
        first, second = self.first, self.second
        return draw_motion(
            first.features, second.image, second.features, self.matches, self.summary()
        )


class Files:
    """Pairs as one picture each, and one animation."""

    def __init__(self, folder: Path, lines: int | None) -> None:
        self.folder, self.lines = folder, lines
        self.pictures: list[Path] = []
        self.frames: list[np.ndarray] = []
        remove_files(folder, *WRITTEN)  # of an older run

    def present(self, pair: MatchedFrames) -> bool:
        """Write the pair's picture; True: go on."""
        self.pictures.append(self.folder / f"pair_{len(self.pictures) + 1:04}.jpg")
        write_picture(self.pictures[-1], pair.picture(self.lines))
        if len(self.frames) < MAX_FRAMES:
            self.frames.append(pair.motion())
        return True

    def close(self) -> None:
        """Write the animation and say where everything is."""
        animation = self.folder / ANIMATION
        write_animation(animation, self.frames)
        last = f" to {self.pictures[-1].name}" if len(self.pictures) > 1 else ""
        print(f"pictures:  {self.pictures[0]}{last}")
        shown = len(self.frames)
        part = f" (the first {shown} pairs)" if shown < len(self.pictures) else ""
        print(f"animation: {animation}{part}")


class Window:
    """Pairs in a window, one after the other."""

    def __init__(self, lines: int | None) -> None:
        self.lines = lines

    def present(self, pair: MatchedFrames) -> bool:
        """Show the pair until a key is pressed; False where the user has seen enough."""
        return show("ALIKED matches", pair.picture(self.lines))

    def close(self) -> None:
        """Leave the window to the end of the program."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        description=__doc__,
        epilog="Two images or more, a video file, or the number of a camera, take FOLDER's place. "
        "In the window any key goes on to the next pair, q or Esc quits.",
    )
    add_extractor_options(parser)
    parser.add_argument(
        "more", type=Path, nargs="*", metavar="IMAGE", help="further images, where FOLDER is one"
    )
    add_size_option(parser)
    add_video_options(parser.add_argument_group("a video or a camera"))
    add_matcher_options(parser.add_argument_group("matching"))
    parser.add_argument(
        "--lines",
        type=lambda text: None if text == "all" else whole(0)(text),
        default=LINES,
        metavar="N",
        help="how many matches of a pair to draw, spread over the image, the most similar first; "
        "or all (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write files into this folder, no window (default where there is no window: demo)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Match each image with the next; show or write every pair; sum up."""
    obstacle = None if args.output else why_no_window()
    check_video_options(args, endless=not args.output and not obstacle)
    images, what = open_images(args)
    spec = extractor_spec(args)
    folder = (args.output or Path("demo")) if args.output or obstacle else None
    if folder:
        check_writable(folder)
        check_kept([args.images, *args.more], folder, *WRITTEN)
    matcher = matcher_from(args, args.model)
    extractor = create_extractor(args.backend, spec)
    output = folder and writable_folder(folder)
    model = args.model_path or f"{args.model} ({describe_weights(args.model, args.weights)})"
    print(f"{model} on {extractor.name}, {what}")
    if args.matcher == "lightglue":
        print("matched by LightGlue")
    if get_backend(args.backend).compiles:
        print("compiling at the first image of each size, which takes minutes")
    if obstacle:
        print(f"no window, because {obstacle}: writing pictures into {output}")

    view = Files(output, args.lines) if output else Window(args.lines)
    count = matches = displacement = 0
    for pair in match_consecutive(images, extractor, matcher):
        print(pair.summary())
        count += 1
        matches += len(pair.matches)
        displacement += pair.displacement()
        if not view.present(pair):
            break
    if not count:
        if args.more:
            raise InputError("only one of these images can be read; give two that can")
        only = "frame; give a video" if is_video(args.images) else "readable image; give a folder"
        raise InputError(f"{args.images} has one {only} with at least two")
    pairs = "1 pair" if count == 1 else f"{count} pairs"
    print(f"in total: {pairs}, {matches_text(matches, displacement)}")
    view.close()


def open_images(args: argparse.Namespace) -> tuple[Iterator[tuple[str, np.ndarray]], str]:
    """Images with their names, each read when its turn comes, and what they are in words."""
    if is_video(args.images):
        if args.more:
            raise InputError(f"{args.images} is a video or a camera; leave {args.more[0]} out")
        images = frames(args.images, args.every or 1, args.frames)
        return ((name, reduced(image, args.max_size)) for name, image in images), str(args.images)
    offer_download(args.images)
    if args.images.is_file() and not args.more:
        raise InputError(f"{args.images} is one image; give another one as well, or a folder")
    if args.images.is_dir() and args.more:
        raise InputError(f"{args.images} is a folder; give it alone, or images only")
    paths = [args.images, *args.more] if args.more else list_images(args.images)
    if len(paths) < 2:
        raise InputError(f"{args.images} has one image; give a folder with at least two")
    images = ((path.name, image) for path, image in load_readable(paths, args.max_size))
    return images, f"{len(paths)} images"


def match_consecutive(
    images: Iterable[tuple[str, np.ndarray]], extractor: Extractor, matcher: Matcher
) -> Iterator[MatchedFrames]:
    """Match neighbours; features of each image are extracted when its turn comes."""
    seen = (Frame(name, image, extractor(image)) for name, image in images)
    for first, second in pairwise(seen):
        sizes = (frame.image.shape[1::-1] for frame in (first, second))
        matches = matcher.match(first.features, second.features, *sizes)
        yield MatchedFrames(first, second, matches.indices)


def matches_text(count: int, displacement: float) -> str:
    """A number of matches and, from the sum of their displacements in pixels, the mean."""
    mean = f", mean displacement {displacement / count:.1f} px" if count else ""
    return f"{count} matches{mean}"
