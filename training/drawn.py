"""Images drawn by a program: fractal noise, shapes, text, patterns, and scenes of all of them.

Every image is made from one `numpy.random.Generator`, so that a seed names a set of images.
"""

import math
import string
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Rng = np.random.Generator
Texture = Callable[[Rng, int, int], np.ndarray]  # rng, height, width to float [H, W, 3] in [0, 1]

SUPERSAMPLING = 3  # of drawn edges, per direction: Pillow itself draws them jagged
SHAPES = (1.3e-4, 5e-4, 1.3e-3)  # per pixel of a scene: few, some or many
LETTERS = string.ascii_letters + string.digits + ".,:;!?&%()/+-"


def colour(rng: Rng) -> np.ndarray:
    """A random colour, [3] in [0, 1]; half of them are nearly grey, as most of the world is."""
    grey = rng.uniform()
    return np.clip(grey + rng.normal(size=3) * rng.choice((0.05, 0.3)), 0, 1)


def flat(rng: Rng, height: int, width: int) -> np.ndarray:
    """One colour."""
    return np.broadcast_to(colour(rng), (height, width, 3)).copy()


def gradient(rng: Rng, height: int, width: int) -> np.ndarray:
    """From one colour to another, along a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    along = x * math.cos(angle) + y * math.sin(angle)
    along = (along - along.min()) / max(np.ptp(along), 1)
    return colour(rng) + along[..., None] * (colour(rng) - colour(rng))


def fractal_noise(rng: Rng, height: int, width: int, power: float) -> np.ndarray:
    """[H, W] in [0, 1] whose amplitude falls as frequency^-power; photographs have about 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.normal(size=(height, width))) * frequency**-power
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, (height, width))
    return np.clip(0.5 + noise / (5 * noise.std() + 1e-9), 0, 1)


def noise(rng: Rng, height: int, width: int) -> np.ndarray:
    """Fractal noise in two colours, at times in steps, which gives it sharp contours."""
    field = fractal_noise(rng, height, width, rng.uniform(0.6, 1.8))
    if rng.uniform() < 0.4:
        levels = rng.integers(2, 6)
        field = np.floor(field * levels).clip(max=levels - 1) / (levels - 1)
    first, second = colour(rng), colour(rng)
    fine = fractal_noise(rng, height, width, rng.uniform(0.4, 1.2))[..., None] - 0.5
    return first + field[..., None] * (second - first) + fine * rng.uniform(0, 0.4)


def pattern(rng: Rng, height: int, width: int) -> np.ndarray:
    """Checks, stripes or bricks; cells differ in brightness, so that they can be told apart."""
    size = rng.uniform(6, 60)
    cell_height, cell_width = size, size * rng.choice((1, 2, 3, 20))
    angle = rng.normal() * 0.3
    y, x = np.mgrid[0:height, 0:width]
    u, v = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    row = np.floor(v / cell_height).astype(int)
    u = u + (row % 2) * cell_width / 2 * rng.integers(0, 2)
    column = np.floor(u / cell_width).astype(int)
    table = rng.uniform(size=(64, 64))
    shade = table[row % 64, column % 64] * rng.uniform(0.1, 1) + (row + column) % 2
    joint = ((v / cell_height) % 1 < 0.1) | ((u / cell_width) % 1 < 0.1 * size / cell_width)
    base, other = colour(rng), colour(rng)
    image = base + shade[..., None] / 2 * (other - base)
    return np.where(joint[..., None], colour(rng), image) if rng.uniform() < 0.5 else image


def writing(rng: Rng, height: int, width: int) -> np.ndarray:
    """Lines of random letters on one colour."""
    background, ink = flat(rng, height, width), colour(rng)
    mask = Image.new("L", (width, height))
    pen = ImageDraw.Draw(mask)
    y = rng.uniform(-10, 5)
    while y < height:
        size = rng.uniform(9, 60) if rng.uniform() < 0.5 else rng.uniform(9, 18)
        letters = rng.choice(list(LETTERS + " " * 12), size=int(2.5 * width / size) + 1)
        font = ImageFont.load_default(size)
        pen.text((rng.uniform(-20, width / 3), y), "".join(letters), fill=255, font=font)
        y += size * rng.uniform(1.0, 1.8)
    share = np.asarray(mask, np.float32)[..., None] / 255
    return background + share * (ink - background)


DETAILED: tuple[Texture, ...] = (noise, pattern, writing)
TEXTURES: tuple[Texture, ...] = (flat, gradient, noise, *DETAILED)


def texture(rng: Rng, height: int, width: int) -> np.ndarray:
    """One of the `TEXTURES`."""
    return TEXTURES[rng.integers(len(TEXTURES))](rng, height, width)


def outline(rng: Rng, radius: float) -> np.ndarray:
    """A polygon around the origin, [N, 2] pixels: a bar, a smooth blob, a star or any polygon."""
    kind = rng.integers(4)
    if kind == 0:
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1, rng.uniform(0.03, 1))
    else:
        count = (48, 2 * rng.integers(3, 8), rng.integers(3, 8))[kind - 1]
        angles = np.sort(np.linspace(0, 2 * math.pi, count, endpoint=False))
        lengths = np.ones(count)
        if kind == 1:
            lengths += 0.25 * np.cos(rng.integers(1, 6) * angles) * rng.uniform()
        elif kind == 2:
            lengths[::2] = rng.uniform(0.3, 0.8)
        else:
            lengths = rng.uniform(0.4, 1, count)
        corners = np.stack((np.cos(angles), np.sin(angles)), axis=1) * lengths[:, None]
        corners = corners * (1, rng.uniform(0.4, 1))
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    return corners @ turn * radius


def polygon_mask(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """The share of each pixel inside a polygon, float [H, W]; corners in pixels, (x, y)."""
    mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    ImageDraw.Draw(mask).polygon([tuple(xy) for xy in corners * SUPERSAMPLING], fill=255)
    return np.asarray(mask.reduce(SUPERSAMPLING), np.float32) / 255


def put_shape(image: np.ndarray, rng: Rng, radius: float, fill: Texture) -> None:
    """Paint one shape filled with `fill` onto `image`; one in eight is a shadow instead."""
    height, width = image.shape[:2]
    centre = rng.uniform((0, 0), (width, height))
    corners = centre + outline(rng, radius)
    low = np.floor(corners.min(axis=0)).clip(0).astype(int)
    high = np.ceil(corners.max(axis=0)).clip(max=(width, height)).astype(int)
    (x0, y0), (x1, y1) = low, high
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    share = polygon_mask(corners - low, y1 - y0, x1 - x0)[..., None]
    part = image[y0:y1, x0:x1]
    inside = part * rng.uniform(0.4, 0.8) if rng.uniform() < 0.12 else fill(rng, *part.shape[:2])
    part += share * (inside - part)


def scene(rng: Rng, height: int, width: int, fill: Texture = texture) -> np.ndarray:
    """Shapes of all sizes in front of each other, small ones most often, as things are seen."""
    image = fill(rng, height, width).astype(np.float32)
    count = int(rng.choice(SHAPES) * height * width)
    # Few large and many small: sizes follow a power law, as in photographs.
    radii = 6 * rng.uniform(0.005, 1, count) ** -0.8
    for radius in np.sort(radii.clip(max=200))[::-1]:
        put_shape(image, rng, radius * rng.uniform(0.7, 1.5), fill)
    return image


def drawn_image(rng: Rng, height: int, width: int, fill: Texture = texture) -> np.ndarray:
    """One drawn image, uint8 [H, W, 3]: four times in five a scene of `fill`, else one texture."""
    if rng.uniform() < 0.8:
        image = scene(rng, height, width, fill)
    else:
        image = DETAILED[rng.integers(len(DETAILED))](rng, height, width)
    image = image * rng.uniform(0.6, 1) + rng.uniform(0, 0.15)
    picture = Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(float(rng.choice((0, 0.5, 0.8))))))
