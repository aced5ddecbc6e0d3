"""Frames of a video file or a camera, as `aliked.images` gives photographs."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from aliked.errors import InputError
from aliked.files import as_path
from aliked.images import quiet_opencv

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def is_video(source: str | Path) -> bool:
    """Whether this names a video file, or a camera by its number ("0")."""
    return str(source).isdigit() or str(source).lower().endswith(VIDEO_SUFFIXES)


def add_video_options(group: argparse._ActionsContainer) -> None:
    """`--every` and `--frames`."""
    group.add_argument("--every", type=_positive, metavar="N", help="each N-th frame of a video")
    group.add_argument(
        "--frames", type=_positive, metavar="N", help="at most N frames of a video or a camera"
    )


def check_video_options(args: argparse.Namespace, endless: bool = False) -> None:
    """Raise `InputError` where they are without effect, or a camera's run would have no end."""
    for name in ("every", "frames"):
        if getattr(args, name) is not None and not is_video(args.images):
            raise InputError(f"--{name} needs a video or a camera; leave it out, or give one")
    if str(args.images).isdigit() and args.frames is None and not endless:
        raise InputError(f"camera {args.images} has no end; pass --frames N")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def frames(
    source: str | Path, every: int = 1, limit: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Each `every`-th frame of a video file or a camera, at most `limit` of them.

    Yields a name ("clip.mp4/000012", "camera0/000012", counted from 0 over all frames) and uint8
    [H, W, 3] RGB. `InputError` where there is no such camera, or the file is no video that OpenCV
    can read. A camera goes on until `limit` or an interrupt.
    """
    camera = str(source).isdigit()
    if not camera:
        source = as_path(source)
    if not camera and not Path(source).is_file():
        raise InputError(f"there is no video {source}; give a file, or the number of a camera")
    with quiet_opencv():
        capture = cv2.VideoCapture(int(str(source)) if camera else str(source))
    folder = f"camera{source}" if camera else Path(source).name
    try:
        first, image = capture.read()
        if not first:
            raise InputError(
                f"camera {source} gives no image; connect it, or give another number"
                if camera
                else f"{source} is damaged or no video that OpenCV can read; convert it to MP4"
            )
        index = count = 0
        while image is not None and count != limit:
            yield f"{folder}/{index:06}", cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            count += 1
            index += every
            image = _skip_to(capture, every)
    finally:
        capture.release()


def _skip_to(capture: cv2.VideoCapture, steps: int) -> np.ndarray | None:
    """The frame that many `steps` on; the ones between are not converted to pixels."""
    for _ in range(steps - 1):
        if not capture.grab():
            return None
    return capture.read()[1]
