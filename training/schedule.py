"""What changes as training goes on, by the share of it that is over."""

import math

from training.settings import Geometry, Optimiser


def learning_rate(progress: float, options: Optimiser) -> float:
    """Linear warm-up to `learning_rate`, then half a cosine down to `final_learning_rate`."""
    if progress < options.warm_up:
        return options.learning_rate * (progress + 1e-3) / (options.warm_up + 1e-3)
    share = min(1.0, (progress - options.warm_up) / (1 - options.warm_up))
    span = options.learning_rate - options.final_learning_rate
    return options.final_learning_rate + span * (1 + math.cos(math.pi * share)) / 2


def geometry_share(progress: float, limits: Geometry) -> float:
    """How much of the limits the homographies may use: from `start` to 1 within `ramp`."""
    return min(1.0, limits.start + (1 - limits.start) * progress / limits.ramp)


def average_decay(step: int, options: Optimiser) -> float:
    """How much of the averaged weights stays at a step: little at first, when they are random."""
    return min(options.average_decay, (1 + step) / (10 + step))
