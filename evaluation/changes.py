"""Changes of a photograph with a known homography: light, blur, noise, rotation, scale, viewpoint.

Everything is decided by a seed and computed in whole numbers, or in float64 that is rounded to
whole numbers far from a tie, so that every machine makes the same pixels."""

import hashlib
import math
from collections.abc import Callable

import numpy as np

STEPS = 256  # sample positions between two pixels
LEVELS = 4  # strengths of each change
FOCAL_LENGTH = 1.2  # in image widths: about 45 degrees across
NEARER = 0.75  # of the distance, for changes of viewpoint: less is seen of what lies outside


class Dice:
    """Random numbers of a seed. PCG64's bits are the same in every version of NumPy."""

    def __init__(self, seed: str):
        digest = hashlib.sha256(seed.encode()).digest()
        self.bits = np.random.PCG64(int.from_bytes(digest[:8], "little"))

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(self.bits.random_raw()) / 2**64

    def sign(self) -> int:
        """A random sign, -1 or 1."""
        return 1 if self.uniform(-1, 1) > 0 else -1

    def bytes(self, *shape: int) -> np.ndarray:
        """Uniform uint8 of this shape."""
        count = math.prod(shape)
        return (
            self.bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count].reshape(shape)
        )


Changed = tuple[np.ndarray, np.ndarray]  # the new image, and 3x3 from pixels of the old one to it


def light(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """Another exposure curve, and a shadow that deepens across the image."""
    gamma = (1.25, 1.5, 1.9, 2.5)[level] ** dice.sign()
    shade = (0.3, 0.5, 0.7, 0.85)[level]  # of the light missing at the darkest place
    curve = np.rint(255 * (np.arange(256) / 255) ** gamma).astype(np.int64)
    height, width = image.shape[:2]
    angle = dice.uniform(0, 2 * math.pi)
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    across = math.cos(angle) * x + math.sin(angle) * y
    share = (across - across.min()) / (across.max() - across.min())
    gain = np.rint(2**16 * (1 - shade * share)).astype(np.int64)[..., None]
    return ((curve[image] * gain + 2**15) >> 16).astype(np.uint8), np.eye(3)


def blur(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """Blur an image by a Gaussian."""
    sigma = (1.0, 2.0, 3.0, 4.5)[level] * dice.uniform(0.9, 1.1)  # pixels
    radius = math.ceil(3 * sigma)
    steps = np.arange(-radius, radius + 1)
    kernel = np.rint(2**12 * np.exp(-(steps**2) / (2 * sigma**2))).astype(np.int64)
    smooth = image.astype(np.int64)
    for axis in (0, 1):
        size = image.shape[axis]
        places = _mirrored(np.arange(-radius, size + radius), size)
        padded = smooth.take(places, axis)
        smooth = sum(
            int(weight) * padded.take(range(i, i + size), axis) for i, weight in enumerate(kernel)
        )
    total = int(kernel.sum()) ** 2
    return ((smooth + total // 2) // total).astype(np.uint8), np.eye(3)


def noise(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """Independent noise in every value, nearly Gaussian: the sum of four uniform numbers."""
    sigma = (6, 14, 26, 42)[level]  # grey levels
    total = (
        dice.bytes(4, *image.shape).sum(axis=0, dtype=np.int64) - 2 * 255
    )  # variance 4 * 5461.25
    noisy = image + (2 * total * sigma + 148) // 296  # the standard deviation is 147.8
    return noisy.clip(0, 255).astype(np.uint8), np.eye(3)


def rotation(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """A turn about the middle of the image."""
    angle = math.radians((15, 30, 60, 120)[level] * dice.uniform(0.9, 1.1)) * dice.sign()
    cos, sin = math.cos(angle), math.sin(angle)
    middle = _middle(image)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return _warped(image, middle @ turn @ np.linalg.inv(middle))


def scale(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """A part of the image, enlarged."""
    factor = (1.25, 1.6, 2.1, 2.8)[level] * dice.uniform(0.95, 1.05)
    room = 0.5 * (1 - 1 / factor)  # how far the part's middle can be from the image's
    height, width = image.shape[:2]
    x, y = dice.uniform(-room, room) * width, dice.uniform(-room, room) * height
    middle = _middle(image)
    zoom = np.array([[factor, 0, -factor * x], [0, factor, -factor * y], [0, 0, 1]])
    return _warped(image, middle @ zoom @ np.linalg.inv(middle))


def viewpoint(image: np.ndarray, level: int, dice: Dice) -> Changed:
    """The photograph as a print, filmed from aside."""
    tilt = math.radians((15, 30, 42, 54)[level] * dice.uniform(0.95, 1.05))
    axis = dice.uniform(0, 2 * math.pi)  # in the print's plane, about which the camera goes round
    kx, ky = math.cos(axis), math.sin(axis)
    cross = np.array([[0, 0, ky], [0, 0, -kx], [-ky, kx, 0]])
    rotate = np.eye(3) + math.sin(tilt) * cross + (1 - math.cos(tilt)) * cross @ cross
    # A point (x, y) of the print, in focal lengths from its middle, is at (x, y, 0) before, and the
    # camera at distance 1 in front of it; then it goes round and nearer.
    plane = rotate @ np.diag([1.0, 1.0, 0.0])
    plane[:, 2] += (0, 0, NEARER)
    focal = FOCAL_LENGTH * image.shape[1]
    camera = _middle(image) @ np.diag([focal, focal, 1])
    homography = camera @ plane @ np.linalg.inv(camera)
    return _warped(image, homography / homography[2, 2])


CHANGES: dict[str, Callable[[np.ndarray, int, Dice], Changed]] = {
    "light": light,
    "blur": blur,
    "noise": noise,
    "rotation": rotation,
    "scale": scale,
    "viewpoint": viewpoint,
}


def change(image: np.ndarray, kind: str, level: int, seed: str) -> Changed:
    """Change an image, uint8 [H, W, 3], to one of the same size.

    `level` 0 to `LEVELS` - 1 is the strength; `seed` decides the rest, together with both. Returns
    the new image, and the 3x3 homography from pixels of the old image to the new one.
    """
    return CHANGES[kind](image, level, Dice(f"{seed} {kind} {level}"))


def _middle(image: np.ndarray) -> np.ndarray:
    """From coordinates about the image's middle to pixels."""
    height, width = image.shape[:2]
    return np.array([[1, 0, (width - 1) / 2], [0, 1, (height - 1) / 2], [0, 0, 1.0]])


def _mirrored(index: np.ndarray, size: int) -> np.ndarray:
    """Indices beyond an edge as those of the mirror image, the edge itself not repeated."""
    period = 2 * (size - 1)
    inside = index % period
    return np.minimum(inside, period - inside)


def _warped(image: np.ndarray, homography: np.ndarray) -> Changed:
    """The image through a homography, bilinear, mirrored beyond its edges.

    No change makes an image so much smaller that it would need more than one sample a pixel.
    """
    height, width = image.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    points = np.linalg.inv(homography) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    x, y = np.rint(STEPS * points[:2] / points[2]).astype(np.int64)
    columns = _mirrored(x // STEPS, width), _mirrored(x // STEPS + 1, width)
    rows = _mirrored(y // STEPS, height) * width, _mirrored(y // STEPS + 1, height) * width
    right, below = (x % STEPS).astype(np.int32), (y % STEPS).astype(np.int32)
    flat = image.reshape(-1, 3).astype(np.int32)
    total = np.full(flat.shape, STEPS**2 // 2, np.int32)  # a half, for rounding
    for row, wy in zip(rows, (STEPS - below, below), strict=True):
        for column, wx in zip(columns, (STEPS - right, right), strict=True):
            total += (wx * wy)[:, None] * flat.take(row + column, axis=0)
    return (total // STEPS**2).reshape(image.shape).astype(np.uint8), homography
