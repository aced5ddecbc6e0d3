"""Where rounding decides from which pixel a keypoint is refined."""

from typing import NamedTuple

import numpy as np
import torch

from aliked.configs import RADIUS
from aliked.detection import suppress_non_maxima
from aliked.features import Features
from aliked.model import ALIKED
from aliked.patches import get_patches

# Two scores that differ by less are in either order, depending on a convolution's order of sums: on
# photographs one of 10,000 keypoints has such a neighbour. From there it is refined to another
# place, 0.02 to 0.04 px away in the cases seen, which says nothing about the runtime. (Without any
# texture half of the maxima are ties.)
TIE = 1e-5


class Expected(NamedTuple):
    """What another runtime should give of an image, and where rounding decides about it."""

    features: Features
    ties: np.ndarray  # [T, 2] float32, pixels, (x, y)


@torch.inference_mode()
def expect(model: ALIKED, image: np.ndarray) -> Expected:
    """What to expect of an image, uint8 [H, W, 3] RGB; `InputError` as of `ALIKED.extract`."""
    features, score_map = model.maps(image)
    return Expected(model.features_of(features, score_map), find_ties(score_map))


def find_ties(scores: torch.Tensor) -> np.ndarray:
    """Maxima of a score map [1, 1, H, W] with another pixel's score within `TIE`, [T, 2].

    The other pixel is in the 5x5 window that a maximum suppresses.
    """
    maxima = suppress_non_maxima(scores)[0, 0].nonzero().flip(1)[None]  # [1, M, 2], (x, y)
    windows = get_patches(scores, maxima, 2 * RADIUS + 1).flatten(2)  # [1, M, 25]
    centres = windows[:, :, windows.shape[2] // 2, None]
    tied = ((windows - centres).abs() < TIE).sum(dim=2) > 1  # the centre itself is one
    return maxima[tied].cpu().numpy().astype(np.float32)
