"""The numbers of a comparison, by image and in total, ready for JSON."""

import numpy as np

from aliked.comparison import Differences, ImageComparison, MatchChange, join, measure_differences
from aliked.features import Features

COUNTS = ("reference", "other", "both", "missed", "extra", "not_finite")
MATCHES = ("reference", "other", "kept", "lost", "undetected", "gained")
PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}


class Numbers:
    """Collects the numbers of images, and of the matches between consecutive ones."""

    def __init__(self) -> None:
        self.images: list[dict] = []
        self.consecutive: list[dict] = []
        self.dim = 0  # length of the descriptors
        self._differences: list[Differences] = []
        self._similarities: list[np.ndarray] = []
        self._missed_ranks: list[np.ndarray] = []

    def add_image(self, image: ImageComparison) -> None:
        """Take in one image."""
        differences = measure_differences(image)
        self.images.append({"image": image.name} | _counts(image) | _statistics(differences))
        self.dim = image.reference.descriptors.shape[1]
        self._differences.append(differences)
        self._missed_ranks.append(image.missed + 1)

    def add_matches(self, change: MatchChange) -> None:
        """Take in the matches of two consecutive images."""
        names = {"first": change.first, "second": change.second}
        self.consecutive.append(names | {name: getattr(change, name) for name in MATCHES})
        self._similarities.append(change.similarity)

    def dot_products(self) -> np.ndarray:
        """Of the descriptors of all pairs."""
        return join(self._differences).dot

    def similarities(self) -> np.ndarray:
        """Dot products of the reference's matches between consecutive images."""
        return np.concatenate([np.empty(0), *self._similarities])

    def summary(self) -> dict:
        """All numbers, by image and in total; None where there is none, as of no pairs."""
        total = {name: sum(image[name] for image in self.images) for name in COUNTS}
        total["missed_rank"] = _percentile(np.concatenate(self._missed_ranks), 50)
        total |= _statistics(join(self._differences))
        if self.consecutive:
            total["matches"] = {n: sum(pair[n] for pair in self.consecutive) for n in MATCHES}
            total["match_similarity"] = _percentile(self.similarities(), 50)
        images = {"images": self.images, "consecutive": self.consecutive}
        return {"descriptor_length": self.dim} | images | {"total": total}


def _counts(image: ImageComparison) -> dict[str, int]:
    return {
        "reference": len(image.reference),
        "other": len(image.other),
        "both": len(image.pairs.shift),
        "missed": len(image.missed),
        "extra": len(image.extra),
        "not_finite": _not_finite(image.reference) + _not_finite(image.other),
    }


def _not_finite(features: Features) -> int:
    """Keypoints with NaN or infinity in place, score or descriptor."""
    values = np.hstack([features.keypoints, features.scores[:, None], features.descriptors])
    return int((~np.isfinite(values)).any(axis=1).sum())


def _statistics(differences: Differences) -> dict[str, dict[str, float | None]]:
    return {
        "crossed_pixel_edge": int(differences.crossed.sum()),
        "shift_px": _distribution(differences.shift),
        "score_difference": _distribution(differences.score),
        "dot_product": {
            "mean": _mean(differences.dot),
            "p1": _percentile(differences.dot, 1),
            "min": _percentile(differences.dot, 0),
            "min_within_pixel": _percentile(differences.dot[~differences.crossed], 0),
        },
        "element_difference": {
            "mean": _mean(differences.element_mean),
            "max": _percentile(differences.element_max, 100),
        },
    }


def _distribution(values: np.ndarray) -> dict[str, float | None]:
    return {name: _percentile(values, q) for name, q in PERCENTILES.items()}


def _percentile(values: np.ndarray, q: float) -> float | None:
    return _number(np.percentile(values, q)) if len(values) else None


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean()) if len(values) else None


def _number(value: np.floating) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None
