"""The images that training and validation cut their pairs from, all of one size."""

import functools
import math
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image

from aliked.errors import InputError
from training import drawn
from training.photographs import HELD_OUT, TRAINING, load_photograph
from training.settings import Pool

TRAIN, VALIDATE = 0, 1  # keep the random numbers of the two sets apart


def fill_with(
    rng: np.random.Generator, photograph: np.ndarray, height: int, width: int
) -> np.ndarray:
    """`height` x `width` of a photograph at a random scale, uint8 [H, W, 3].

    Mirrored and turned by multiples of 90 degrees; magnified at most until it fills the image, so
    that it stays sharp, and reflected at its edges where it does not.
    """
    photograph = np.rot90(photograph, rng.integers(4))[:, :: rng.choice((-1, 1))]
    rows, columns = photograph.shape[:2]
    needed = height / rows, width / columns
    # Twice its size has to fill the image: a second copy would look like a wrong match.
    smallest = max(min(1, *needed), *(side / 2 for side in needed))
    scale = rng.uniform(smallest, max(smallest, 1, *needed))
    size = math.ceil(columns * scale), math.ceil(rows * scale)
    image = Image.fromarray(np.ascontiguousarray(photograph))
    image = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    missing = [max(0, n - m) for n, m in zip((height, width), image.shape[:2], strict=True)]
    before = [rng.integers(n + 1) for n in missing]
    padding = [(b, n - b) for b, n in zip(before, missing, strict=True)]
    image = np.pad(image, (*padding, (0, 0)), mode="symmetric")
    return cut(rng, image, height, width)


def cut(rng: np.random.Generator, image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random `height` x `width` of an image that is no smaller."""
    rows, columns = image.shape[:2]
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    return image[top : top + height, left : left + width]


def photograph_or_texture(
    names: tuple[str, ...], rng: np.random.Generator, height: int, width: int
) -> np.ndarray:
    """A fill of shapes: a part of a photograph, or a drawn texture; float [H, W, 3] in [0, 1]."""
    if rng.uniform() < 0.3:
        return drawn.texture(rng, height, width)
    photograph = cached_photograph(names[rng.integers(len(names))])
    rows, columns = photograph.shape[:2]
    if rows < height or columns < width:
        return fill_with(rng, photograph, height, width) / 255
    return cut(rng, photograph, height, width) / 255


cached_photograph = functools.cache(load_photograph)


def make_image(task: tuple[int, int, int, Pool]) -> np.ndarray:
    """Image `index` of a set, uint8 [H, W, 3]: photographs first, then blended, then drawn."""
    subset, seed, index, pool = task
    rng = np.random.default_rng((seed, subset, index))
    names = (TRAINING, HELD_OUT)[subset]
    size = pool.height, pool.width
    if index < pool.photographs:
        return fill_with(rng, cached_photograph(names[index % len(names)]), *size)
    if index < pool.photographs + pool.blended:
        return drawn.drawn_image(rng, *size, functools.partial(photograph_or_texture, names))
    return drawn.drawn_image(rng, *size)


def make_pool(subset: int, seed: int, pool: Pool) -> np.ndarray:
    """All images of a set, uint8 [N, H, W, 3], made by a process for each core.

    Raises `InputError` where there are none.
    """
    count = pool.photographs + pool.blended + pool.drawn
    if count == 0:
        raise InputError("there are no images; give photographs, blended or drawn more than 0")
    tasks = [(subset, seed, index, pool) for index in range(count)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        return np.stack(list(executor.map(make_image, tasks, chunksize=4)))
