"""Frames of a video file or a camera, as `aliked.images` gives photographs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from aliked.errors import InputError
from aliked.files import as_path
from aliked.images import quiet_opencv

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
SHORT = 0.9  # of its frames: a video that ends before is named; some containers only estimate them

# FFmpeg is to print nothing about a bad file: the caller says what is wrong, once. OpenCV reads
# this when it first opens a video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def is_camera(source: str | Path) -> bool:
    """Whether this is the number of a camera ("0"), and no folder that has it for a name."""
    return str(source).isdecimal() and not Path(source).is_dir()


def is_video(source: str | Path) -> bool:
    """Whether this names a video file, or a camera by its number, and no folder."""
    named = str(source).lower().endswith(VIDEO_SUFFIXES)
    return is_camera(source) or (named and not Path(source).is_dir())


def frames(
    source: str | Path, every: int = 1, limit: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Each `every`-th frame of a video file or a camera, at most `limit` of them.

    Yields a name ("clip.mp4/000012", "camera0/000012", counted from 0 over all frames) and uint8
    [H, W, 3] RGB. `InputError` where there is no such camera, or the file is no video that OpenCV
    can read; a file that ends long before its container says is named on stderr. A camera goes on
    until `limit` or an interrupt.
    """
    camera = is_camera(source)
    if not camera:
        source = as_path(source)
    if not camera and not Path(source).is_file():
        raise InputError(f"there is no video {source}; give a file, or the number of a camera")
    if str(source).encode(errors="replace").decode() != str(source):  # which OpenCV cannot bear
        raise InputError(f"the name of the video {str(source)!r} is not UTF-8; rename it")
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
        if count != limit and not camera:
            _name_if_short(source, capture)
    finally:
        capture.release()


def _skip_to(capture: cv2.VideoCapture, steps: int) -> np.ndarray | None:
    """The frame that many `steps` on; the ones between are not converted to pixels."""
    for _ in range(steps - 1):
        if not capture.grab():
            return None
    return capture.read()[1]


def _name_if_short(source: str | Path, capture: cv2.VideoCapture) -> None:
    """Say that a video which was read to its end has far fewer frames than its container says."""
    read = int(capture.get(cv2.CAP_PROP_POS_FRAMES))
    said = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if read < SHORT * said:
        sentence = f"{source} ends after {read} of the {said} frames that it claims; is it cut off?"
        print(sentence, file=sys.stderr)
