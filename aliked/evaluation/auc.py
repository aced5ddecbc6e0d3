"""The area under the curve of recall over error, as the field computes it."""

import numpy as np


def error_auc(errors: np.ndarray, threshold: float) -> float:
    """Area under recall(error) from 0 to `threshold`, divided by it, in [0, 1].

    `errors` [N], a failed pair is infinite. Between the sorted errors, at which the recall is 1/N,
    2/N, ..., the curve is straight; it starts at (0, 0) and is level from the last error below the
    threshold on (SuperGlue, arXiv 1911.11763, section 5.1).
    """
    errors = np.sort(errors)
    below = errors[errors < threshold]
    recall = np.arange(len(below) + 1) / len(errors)
    return float(np.trapezoid([*recall, recall[-1]], [0, *below, threshold]) / threshold)
