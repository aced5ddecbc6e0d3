"""Pictures of keypoints and matches, drawn on uint8 RGB arrays, and the files they go to."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from aliked.errors import InputError, shown
from aliked.features import Features, check_features_type, check_image
from aliked.files import whole_file

MIN_SIDE = 640  # px: smaller pictures are enlarged to this longer side, so that text fits
PAIR_SIDE, FRAME_SIDE = 1600, 800  # px: larger pairs and animation frames are reduced to this
LINES = 100  # matches of a pair that are drawn as lines: more tint the picture
GAP = 6  # px between the images of a pair
CAPTION_HEIGHT = 28  # px, below the picture
BACKGROUND, TEXT, UNMATCHED = (24, 24, 24), (235, 235, 235), (190, 190, 190)
BRIGHTNESS = 0.65  # of the photograph, so that colours stand out
SUBPIXEL_BITS = 4  # OpenCV draws at fixed-point coordinates with this many fractional bits
LONG_MOTION = 0.1  # of the longer side: motion that is drawn in red
FRAME_MS = 250  # how long the animation shows each frame
# Keypoints of two runtimes or of only one: colour, shape (None: a dot) and its size in px, such
# that a triangle leaves a square at the same place in sight.
BOTH = ((150, 225, 150), None, 0)
MISSED = ((255, 110, 70), cv2.MARKER_SQUARE, 17)
EXTRA = ((90, 200, 255), cv2.MARKER_TRIANGLE_UP, 11)


def draw_matches(
    image0: np.ndarray,
    features0: Features,
    image1: np.ndarray,
    features1: Features,
    matches: np.ndarray,
    caption: str,
    correct: np.ndarray | None = None,
    lines: int | None = LINES,
) -> np.ndarray:
    """Two images, uint8 [H, W, 3] RGB, and lines from matched keypoints to their partners.

    The images are side by side, or one above the other where the first is wider than twice its
    height. `matches` [P, 2] are indices into the features. At most `lines` of them are drawn
    (None: all), spread over the first image, the most similar of each region first; of the others
    the ends are dots. Neighbouring lines have like colours, so that a line out of step shows; with
    `correct` [P] bool, right matches are green and wrong ones red, each by its share. Keypoints
    without partner are grey circles. Returns uint8 [H', W', 3] RGB.
    """
    check_image(image0)
    check_image(image1)
    _check_matches(matches, features0, features1)
    height, width = image0.shape[:2]
    stacked = width > 2 * height
    offset = np.array([0, height + GAP] if stacked else [width + GAP, 0])
    canvas, scale = _rescale(_join(image0, image1, offset), PAIR_SIDE)
    points0 = _moved(features0.keypoints, scale)
    points1 = _moved(features1.keypoints + offset, scale)
    radius = _dot_radius(canvas, len(points0) + len(points1))
    _draw_unmatched(canvas, points0, matches[:, 0], radius)
    _draw_unmatched(canvas, points1, matches[:, 1], radius)
    start, end = points0[matches[:, 0]], points1[matches[:, 1]]
    across = start[:, 0] / (width * scale) if stacked else start[:, 1] / (height * scale)
    colours = np.array(_hues(0.85 * across.clip(0, 1) if correct is None else correct / 3))
    drawn = np.arange(len(matches))
    if lines is not None and lines < len(matches):
        drawn = _chosen(features0, features1, matches, lines, correct)
        caption += f" ({len(drawn)} drawn)"
    _draw_matched(canvas, start, end, colours, drawn, radius)
    return _add_caption(canvas, caption)


def _draw_matched(canvas, start, end, colours, drawn, radius: float) -> None:
    """Small dim dots at the ends of all matches, and lines between bright ones of those `drawn`."""
    dim = (colours * BRIGHTNESS).astype(int).tolist()
    for points in (start, end):
        _draw_dots(canvas, points, dim, 0.6 * radius)
    start, end, colours = start[drawn], end[drawn], colours[drawn].tolist()
    _draw_lines(canvas, start, end, colours, np.clip(LINES / max(len(drawn), 1), 0.3, 0.9))
    for points in (start, end):
        _draw_dots(canvas, points, colours, radius)


def _chosen(
    features0: Features,
    features1: Features,
    matches: np.ndarray,
    lines: int,
    correct: np.ndarray | None,
) -> np.ndarray:
    """Which of the matches are drawn, as by `choose_lines`."""
    first, second = matches.T
    similarity = (features0.descriptors[first] * features1.descriptors[second]).sum(axis=1)
    return choose_lines(features0.keypoints[first], similarity, lines, correct)


def _check_matches(matches: np.ndarray, first: Features, second: Features) -> None:
    """Raise `InputError` unless these are whole numbers [P, 2] that name rows of both features."""
    check_features_type(first)
    check_features_type(second)
    array = isinstance(matches, np.ndarray) and matches.dtype.kind in "iu" and matches.ndim == 2
    if not array or matches.shape[1] != 2:
        raise InputError(f"the matches are {shown(matches)}; give indices [P, 2], as int64")
    if (matches < 0).any() or (matches >= (len(first), len(second))).any():
        raise InputError("the matches name keypoints that the features do not have; match again")


def choose_lines(
    points: np.ndarray, similarity: np.ndarray, count: int, correct: np.ndarray | None = None
) -> np.ndarray:
    """Indices of `count` matches to draw, spread over the image: [count] int64, ascending.

    `points` [P, 2] are where they start. The image is cut into about `count` cells; each gives its
    most similar match, then each its second, and so on. With `correct` [P] bool, right and wrong
    ones have the shares that they have of all.
    """
    if correct is not None:
        right = round(count * float(correct.mean())) if len(correct) else 0
        parts = (np.flatnonzero(correct), right), (np.flatnonzero(~correct), count - right)
        chosen = [own[choose_lines(points[own], similarity[own], n)] for own, n in parts]
        return np.sort(np.concatenate(chosen))
    if count <= 0 or not len(points):
        return np.zeros(0, np.int64)
    low, span = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1)
    side = np.sqrt(span.prod() / count)  # of a cell, pixels
    cell = np.unique(((points - low) // side).astype(np.int64), axis=0, return_inverse=True)[1]
    best = np.lexsort((-similarity, cell.ravel()))  # cell by cell, the most similar first
    first = np.r_[0, np.flatnonzero(np.diff(cell.ravel()[best])) + 1]  # where each cell begins
    rank = np.arange(len(best)) - np.repeat(first, np.diff(np.r_[first, len(best)]))
    order = np.lexsort((-similarity[best], rank))
    return np.sort(best[order[:count]])


def draw_motion(
    previous: Features, image: np.ndarray, features: Features, matches: np.ndarray, caption: str
) -> np.ndarray:
    """An image, uint8 [H, W, 3] RGB, and a line from where each keypoint was in the previous one.

    `matches` [P, 2] are indices into `previous` and `features`. Green keypoints stand still, red
    ones moved by a tenth of the image's longer side or more, grey ones have no partner. Returns
    uint8 [H', W', 3] RGB.
    """
    check_image(image)
    _check_matches(matches, previous, features)
    canvas, scale = _rescale(_darken(image), FRAME_SIDE)
    points = _moved(features.keypoints, scale)
    radius = _dot_radius(canvas, len(points))
    _draw_unmatched(canvas, points, matches[:, 1], radius)
    start, end = _moved(previous.keypoints[matches[:, 0]], scale), points[matches[:, 1]]
    motion = np.hypot(*(end - start).T) / (LONG_MOTION * max(canvas.shape))
    colours = _hues((1 - motion.clip(0, 1)) / 3)
    _draw_lines(canvas, start, end, colours, np.clip(1000 / max(len(matches), 1), 0.4, 1))
    _draw_dots(canvas, end, colours, radius)
    return _add_caption(canvas, caption)


def draw_differences(
    image: np.ndarray, both: np.ndarray, missed: np.ndarray, extra: np.ndarray, caption: str
) -> np.ndarray:
    """An image, uint8 [H, W, 3] RGB, and the keypoints that a second runtime finds, or does not.

    Keypoints are [N, 2] in pixels: those of `both` runtimes are green dots, those that the second
    `missed` red squares, `extra` ones of the second blue triangles; what lies outside the image, or
    nowhere (NaN), is only counted. Returns uint8 [H', W', 3] RGB, legend and caption below.
    """
    canvas, scale = _rescale(_darken(image), PAIR_SIDE)
    kinds = ((both, BOTH, "both"), (missed, MISSED, "missed"), (extra, EXTRA, "extra"))
    radius = _dot_radius(canvas, len(both))
    for points, symbol, _ in kinds:
        inside = ((points > -1) & (points < image.shape[1::-1])).all(axis=1)
        _draw_symbols(canvas, _moved(points[inside], scale), *symbol, radius)
    canvas = _add_caption(canvas, "")
    x, y = 14, len(canvas) - CAPTION_HEIGHT // 2
    for points, symbol, name in kinds:
        _draw_symbols(canvas, np.array([[x, y]]), *symbol, radius)
        x += 14 + _put_text(canvas, f"{name}: {len(points)}", (x + 14, y + 5), 0.5) + 28
    return _add_caption(canvas, caption)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB in the format of the file's suffix, whole or not at all."""
    _write(path, *cv2.imencode(Path(path).suffix, picture[..., ::-1]))


def write_animation(path: Path, frames: Sequence[np.ndarray]) -> None:
    """Write uint8 [H, W, 3] RGB frames as an endless animated WebP, whole or not at all.

    Frames of different sizes get a border on the right and below.
    """
    height, width = np.max([frame.shape[:2] for frame in frames], axis=0)
    canvases = np.full((len(frames), height, width, 3), BACKGROUND[0], np.uint8)
    for canvas, frame in zip(canvases, frames, strict=True):
        canvas[: frame.shape[0], : frame.shape[1]] = frame[..., ::-1]
    animation = cv2.Animation()
    animation.frames = list(canvases)
    animation.durations = np.full(len(frames), FRAME_MS)
    quality = [cv2.IMWRITE_WEBP_QUALITY, 65]
    _write(path, *cv2.imencodeanimation(".webp", animation, quality))


def _write(path: Path, encoded: bool, data: np.ndarray) -> None:
    if not encoded:
        raise RuntimeError(f"OpenCV {cv2.__version__} cannot encode {path}")
    with whole_file(path) as partial:
        data.tofile(partial)


def _darken(image: np.ndarray) -> np.ndarray:
    return (image * BRIGHTNESS).astype(np.uint8)


def _join(image0: np.ndarray, image1: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Both images, darkened, on one canvas; the second at `offset` (x, y)."""
    (h0, w0), (h1, w1), (x, y) = image0.shape[:2], image1.shape[:2], offset
    canvas = np.full((max(h0, y + h1), max(w0, x + w1), 3), BACKGROUND, np.uint8)
    canvas[:h0, :w0] = _darken(image0)
    canvas[y : y + h1, x : x + w1] = _darken(image1)
    return canvas


def _rescale(picture: np.ndarray, max_side: int) -> tuple[np.ndarray, float]:
    """Bring the longer side between MIN_SIDE and `max_side`; also the factor."""
    side = max(picture.shape[:2])
    scale = float(np.clip(side, MIN_SIDE, max_side)) / side
    if scale == 1:
        return picture, scale
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    size = [max(1, round(side * scale)) for side in picture.shape[1::-1]]
    return cv2.resize(picture, size, interpolation=method), scale


def _hues(hue: np.ndarray) -> list[list[int]]:
    """[P] hues (0 red, 1/3 green, 2/3 blue) to RGB colours."""
    hsv = np.full((1, len(hue), 3), (0, 200, 255), np.uint8)
    hsv[0, :, 0] = hue * 180  # OpenCV stores the hue in steps of 2 degrees
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0].tolist() if len(hue) else []


def _fixed(points: np.ndarray) -> list[list[int]]:
    """[P, 2] pixels to OpenCV's fixed-point coordinates."""
    return np.rint(points * 2**SUBPIXEL_BITS).astype(int).tolist()


def _moved(points: np.ndarray, scale: float) -> np.ndarray:
    """Where pixels [P, 2] are in a picture rescaled by `scale`; pixel centres are whole numbers."""
    return (points + 0.5) * scale - 0.5


def _dot_radius(canvas: np.ndarray, count: int) -> float:
    """Radius of a dot, pixels; smaller where `count` dots would cover the picture."""
    spacing = np.sqrt(canvas.shape[0] * canvas.shape[1] / max(count, 1))
    return float(np.clip(0.15 * spacing, 1.2, 2.5))


def _draw_lines(canvas, start, end, colours, opacity: float) -> None:
    """Drawn apart and blended in: many lines have to let the photograph through."""
    layer = canvas.copy()
    for a, b, colour in zip(_fixed(start), _fixed(end), colours, strict=True):
        cv2.line(layer, a, b, colour, 1, cv2.LINE_AA, SUBPIXEL_BITS)
    cv2.addWeighted(layer, opacity, canvas, 1 - opacity, 0, dst=canvas)


def _draw_dots(canvas, points, colours, radius: float, thickness: int = cv2.FILLED) -> None:
    fixed_radius = int(radius * 2**SUBPIXEL_BITS)
    for point, colour in zip(_fixed(points), colours, strict=True):
        cv2.circle(canvas, point, fixed_radius, colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)


def _draw_symbols(canvas, points, colour, marker: int | None, size: int, radius: float) -> None:
    """Dots of `radius`, or markers of `size`, outlined to stand out among the dots."""
    if marker is None:
        _draw_dots(canvas, points, [colour] * len(points), radius)
        return
    for point in np.rint(points).astype(int).tolist():
        for outline, thickness in ((BACKGROUND, 4), (colour, 2)):
            cv2.drawMarker(canvas, point, outline, marker, size, thickness, cv2.LINE_AA)


def _draw_unmatched(canvas, points, matched, radius: float) -> None:
    rest = np.delete(points, matched, axis=0)
    _draw_dots(canvas, rest, [UNMATCHED] * len(rest), radius, thickness=1)


def _add_caption(canvas: np.ndarray, caption: str) -> np.ndarray:
    """A line of text below the picture, in smaller letters where it would not fit."""
    # At the name of a file that is not UTF-8 OpenCV ends the process: a segmentation fault.
    caption = caption.encode(errors="backslashreplace").decode()
    height, width = canvas.shape[:2]
    (text_width, _), _ = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, 1, 1)
    size = min(0.5, (width - 16) / max(text_width, 1))
    canvas = np.vstack([canvas, np.full((CAPTION_HEIGHT, width, 3), BACKGROUND, np.uint8)])
    _put_text(canvas, caption, (8, height + CAPTION_HEIGHT - 9), size)
    return canvas


def _put_text(canvas: np.ndarray, text: str, origin: tuple[int, int], size: float) -> int:
    """Write from the lower left corner `origin`; the width in pixels."""
    cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, size, TEXT, 1, cv2.LINE_AA)
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]


QUIT_KEYS = (ord("q"), 27)  # 27: Esc


def why_no_window() -> str | None:
    """Why no window can be shown here, or None."""
    if sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return "there is no display"
    if not cv2.currentUIFramework():
        return "this OpenCV is built without windows (replace it by opencv-python to have them)"
    return None


def show(title: str, picture: np.ndarray) -> bool:
    """Show uint8 [H, W, 3] RGB until a key is pressed; False for q, Esc or a closed window."""
    cv2.imshow(title, picture[..., ::-1])
    while cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) >= 1:
        key = cv2.waitKey(50)
        if key != -1:
            return key & 0xFF not in QUIT_KEYS
    return False
