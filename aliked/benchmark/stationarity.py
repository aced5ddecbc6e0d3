"""Have run times settled? A trend test for the warm-up, and what makes timed runs unstable.

Images are run in turn and may differ in cost, so run times have the period of the image sequence:
windows cover whole passes, and timed runs are compared with the usual time of their own image.
"""

import math
from collections.abc import Sequence

import numpy as np

MIN_WINDOW, MAX_WINDOW = 20, 60  # runs that the warm-up's test looks at
SETTLED_DRIFT = 0.02  # between the halves of the window: of no consequence
SIGNIFICANT = 1.96  # standard deviations, two-sided 5 %
UNSTABLE_DRIFT = 0.05  # between the halves of the timed runs
UNSTABLE_SPREAD = 0.25  # from the 10th to the 90th percentile, of the median
REPEATED_WITHIN = 0.05  # the medians of two processes or runs, where times are to be relied on


def apart(medians: Sequence[float]) -> float:
    """How far medians of the same row are apart, of the smallest: see `REPEATED_WITHIN`."""
    return max(medians) / min(medians) - 1


def window_length(period: int) -> int:
    """How many runs to look at when images repeat after `period` runs: an even number of passes."""
    two_passes = 2 * period
    return min(MAX_WINDOW, two_passes * math.ceil(MIN_WINDOW / two_passes))


def drift(times: Sequence[float]) -> float:
    """How much slower the second half ran than the first, of the medians; 0.1 is 10 % slower."""
    half = len(times) // 2
    return float(np.median(times[half:]) / np.median(times[:half]) - 1)


def trend(times: Sequence[float]) -> float:
    """Mann-Kendall's test: the trend in standard deviations, positive when runs get slower."""
    n = len(times)
    values = np.asarray(times)
    balance = np.sign(values[None, :] - values[:, None])[np.triu_indices(n, 1)].sum()
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return float((balance - np.sign(balance)) / deviation)


def has_settled(times: Sequence[float], period: int) -> bool:
    """Whether the last runs neither drift noticeably nor show a significant trend."""
    length = window_length(period)
    if len(times) < length:
        return False
    window = times[-length:]
    return abs(drift(window)) <= SETTLED_DRIFT or abs(trend(window)) < SIGNIFICANT


def instability(times: Sequence[float], period: int) -> list[str]:
    """Why the timed runs are not to be relied on; empty when they are.

    Run `i` is of image `i % period`.
    """
    relative = _relative_to_own_image(np.asarray(times, float), period)
    reasons = []
    moved = drift(relative) if len(relative) > 1 else 0.0
    if abs(moved) > UNSTABLE_DRIFT:
        reasons.append(f"drift of {moved:+.0%} from the first to the second half of the runs")
    low, middle, high = np.percentile(relative, (10, 50, 90))
    spread = (high - low) / middle
    if spread > UNSTABLE_SPREAD:
        reasons.append(f"spread of {spread:.0%} from the 10th to the 90th percentile")
    return reasons


def _relative_to_own_image(times: np.ndarray, period: int) -> np.ndarray:
    """Times divided by the median of their own image, where every image ran at least 3 times."""
    if len(times) < 3 * period:
        return times
    own = np.array([np.median(times[image::period]) for image in range(period)])
    return times / own[np.arange(len(times)) % period]
