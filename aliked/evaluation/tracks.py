"""Tracks: keypoints followed from image to image."""

from collections.abc import Sequence

import numpy as np


def track_starts(links: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """How many tracks start with each image but the last, and how many images they span together.

    `links` has, for every pair of consecutive images, indices [P, 2] of the keypoints that are the
    same; none occurs twice. A track spans at least two images. One (number, images) per pair.
    """
    starts = []
    spans: dict[int, int] = {}  # images from a keypoint of the pair's second image on
    for pair, following in _backwards(links):
        spans = {int(i): 1 + spans.get(int(j), 1) for i, j in pair}
        continued = set(following[:, 1].tolist())
        lengths = [span for keypoint, span in spans.items() if keypoint not in continued]
        starts.append((len(lengths), sum(lengths)))
    return starts[::-1]


def _backwards(links: Sequence[np.ndarray]):
    """Every pair from the last on, with the pair before it."""
    before = [np.empty((0, 2), int), *links[:-1]]
    return zip(reversed(links), reversed(before), strict=True)
