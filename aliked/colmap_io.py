"""Running a file of COLMAP's contract the way COLMAP does."""

from pathlib import Path

import cv2
import numpy as np

from aliked.backends.onnxruntime import OUTPUTS, open_session
from aliked.features import Features, drop_fill_ins

STRIDE = 32


def pad_right_bottom(image: np.ndarray) -> np.ndarray:
    """Replicate the last row and column of [H, W, 3] up to a multiple of 32."""
    height, width = image.shape[:2]
    border = (0, -height % STRIDE, 0, -width % STRIDE)
    return cv2.copyMakeBorder(image, *border, cv2.BORDER_REPLICATE)


class ColmapExtractor:
    """A file written with `--io colmap`, on the CPU."""

    name = "onnxruntime-cpu"

    def __init__(self, path: Path, max_keypoints: int, min_score: float):
        self.session = open_session(path, "CPUExecutionProvider", {})
        self.limits = {
            "max_keypoints": np.array(max_keypoints, np.int64),
            "min_score": np.array(min_score, np.float32),
        }

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB, padded by `pad_right_bottom`, to `Features` of the padded image."""
        batch = image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        rows = self.session.run(OUTPUTS, {"image": batch, **self.limits})
        keypoints, descriptors, scores = (row[0] for row in rows)
        corner = np.array(image.shape[1::-1], np.float32) - 1  # [2], (x, y)
        return drop_fill_ins((keypoints + 1) / 2 * corner, descriptors, scores)
