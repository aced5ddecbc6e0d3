"""The images that training and validation cut their pairs from, all of one size."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image

from training import drawn
from training.photographs import HELD_OUT, TRAINING, load_photograph
from training.settings import Pool

TRAIN, VALIDATE = 0, 1  # keep the random numbers of the two sets apart


def crop(rng: np.random.Generator, photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random part of a photograph, scaled to `height` x `width`, uint8 [H, W, 3].

    The largest such part of the photograph, or down to 0.4 of its sides; mirrored and turned by
    multiples of 90 degrees.
    """
    photograph = np.rot90(photograph, rng.integers(4))[:, :: rng.choice((-1, 1))]
    rows, columns = photograph.shape[:2]
    largest = min(rows / height, columns / width)
    # Never magnified by more than 2, unless the whole photograph is small.
    scale = rng.uniform(min(max(0.4 * largest, 0.5), largest), largest)
    left, top = (rng.uniform(0, n - scale * m) for n, m in ((columns, width), (rows, height)))
    box = (left, top, left + scale * width, top + scale * height)
    image = Image.fromarray(np.ascontiguousarray(photograph))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))


def photograph_or_texture(
    names: tuple[str, ...], rng: np.random.Generator, height: int, width: int
) -> np.ndarray:
    """A fill of shapes: a part of a photograph, or a drawn texture; float [H, W, 3] in [0, 1]."""
    if rng.uniform() < 0.3:
        return drawn.texture(rng, height, width)
    photograph = cached_photograph(names[rng.integers(len(names))])
    rows, columns = photograph.shape[:2]
    if rows < height or columns < width:
        return crop(rng, photograph, height, width) / 255
    top, left = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
    return photograph[top : top + height, left : left + width] / 255


cached_photograph = functools.cache(load_photograph)


def make_image(task: tuple[int, int, int, Pool]) -> np.ndarray:
    """Image `index` of a set, uint8 [H, W, 3]: photographs first, then blended, then drawn."""
    subset, seed, index, pool = task
    rng = np.random.default_rng((seed, subset, index))
    names = (TRAINING, HELD_OUT)[subset]
    size = pool.height, pool.width
    if index < pool.photographs:
        return crop(rng, cached_photograph(names[index % len(names)]), *size)
    if index < pool.photographs + pool.blended:
        return drawn.drawn_image(rng, *size, functools.partial(photograph_or_texture, names))
    return drawn.drawn_image(rng, *size)


def make_pool(subset: int, seed: int, pool: Pool, workers: int | None = None) -> np.ndarray:
    """All images of a set, uint8 [N, H, W, 3], made by `workers` processes (default: all cores)."""
    count = pool.photographs + pool.blended + pool.drawn
    tasks = [(subset, seed, index, pool) for index in range(count)]
    workers = workers or len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers) as executor:
        return np.stack(list(executor.map(make_image, tasks, chunksize=4)))
