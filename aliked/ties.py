"""Where rounding decides from which pixel a keypoint is refined."""

import numpy as np
import torch

from aliked.detection import RADIUS, suppress_non_maxima
from aliked.features import check_image
from aliked.model import ALIKED, plain_float32, to_tensor
from aliked.patches import get_patches
from aliked.transfer import upload

# Two scores that differ by less are in either order, depending on a convolution's order of sums: on
# photographs one of 10,000 keypoints has such a neighbour. From there it is refined to another
# place, 0.02 to 0.04 px away in the cases seen, which says nothing about the runtime. (Without any
# texture half of the maxima are ties.)
TIE = 1e-5


@torch.inference_mode()
def find_ties(model: ALIKED, image: np.ndarray) -> np.ndarray:
    """Maxima of the score map of a uint8 [H, W, 3] image with another pixel's score within `TIE`.

    The other pixel is in the 5x5 window that a maximum suppresses. Returns [T, 2] float32, pixels,
    (x, y). Runs the dense part of the network for it. Raises `InputError` as `ALIKED.extract` does.
    """
    check_image(image)
    with plain_float32():
        _, scores = model.dense(to_tensor(upload(image[None], model.conv1.weight.device)))
    maxima = suppress_non_maxima(scores)[0, 0].nonzero().flip(1)[None]  # [1, M, 2], (x, y)
    windows = get_patches(scores, maxima, 2 * RADIUS + 1).flatten(2)  # [1, M, 25]
    centres = windows[:, :, windows.shape[2] // 2, None]
    tied = ((windows - centres).abs() < TIE).sum(dim=2) > 1  # the centre itself is one
    return maxima[tied].cpu().numpy().astype(np.float32)
