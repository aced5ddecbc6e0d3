"""Images made of noise, for tests that need no photograph."""

import numpy as np


def texture(height, width, seed=0):
    """A random image with structure at several scales, so that it has many maxima."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for step in (1, 4, 16):
        coarse = generator.uniform(size=(height // step + 1, width // step + 1, 3))
        image += coarse.repeat(step, 0).repeat(step, 1)[:height, :width]
    return (image / 3 * 255).astype(np.uint8)
