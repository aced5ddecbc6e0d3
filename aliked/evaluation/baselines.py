"""OpenCV's SIFT and ORB behind the call that every runtime has."""

from collections.abc import Callable

import cv2
import numpy as np

from aliked.features import Features, check_image

ORB_BITS = 256


class Baseline:
    """One of OpenCV's detectors, with its best `top_k` keypoints."""

    def __init__(self, name: str, top_k: int):
        self.name, self.top_k = name, top_k
        create, self.to_unit_length = DETECTORS[name]
        self.detector = create(top_k)

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; scores are the detector's responses, not in [0, 1]."""
        check_image(image)
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        found, rows = self.detector.detectAndCompute(grey, None)
        if rows is None:
            return Features(*(np.zeros(shape, np.float32) for shape in ((0, 2), 0, (0, 1))))
        keypoints = np.array([keypoint.pt for keypoint in found], np.float32)
        scores = np.array([keypoint.response for keypoint in found], np.float32)
        # SIFT returns more where several orientations of one place have the same response.
        best = np.argsort(-scores, kind="stable")[: self.top_k]
        return Features(keypoints[best], scores[best], self.to_unit_length(rows[best]))


def unit_vectors(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] at unit length, float32; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def unit_bits(rows: np.ndarray) -> np.ndarray:
    """Bit strings, uint8 [N, 32], as vectors of +-1/16, float32 [N, 256].

    Their dot product is 1 - 2 h / 256 for a Hamming distance of h bits, exactly: the most similar
    vectors are those at the smallest Hamming distance.
    """
    bits = np.unpackbits(rows, axis=1).astype(np.float32)
    return (2 * bits - 1) / np.float32(ORB_BITS**0.5)


DETECTORS: dict[str, tuple[Callable, Callable]] = {
    "sift": (lambda top_k: cv2.SIFT_create(nfeatures=top_k), unit_vectors),
    "orb": (lambda top_k: cv2.ORB_create(nfeatures=top_k), unit_bits),
}
