"""What a task reports of its pairs: a number each, and how many pairs become one."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

RESAMPLES = 1000  # of the bootstrap
KINDS = {
    "homography": "aliked.evaluation.homography",
    "pose": "aliked.evaluation.pose",
    "sequences": "aliked.evaluation.sequences",
}


@dataclass(frozen=True)
class Score:
    """One column of a table. `of` gives the number, or the numbers, of a pair."""

    name: str  # such as "AUC@3"
    of: Callable[[dict], float | tuple[float, ...]]
    summary: Callable[[np.ndarray], float] = np.mean  # of the pairs' numbers [P] or [P, M]
    percent: bool = True  # a fraction, shown as 0 to 100
    digits: int = 1

    @property
    def scale(self) -> int:
        """What a value is shown times."""
        return 100 if self.percent else 1

    def values(self, pairs: Sequence[dict]) -> np.ndarray:
        """The numbers of all pairs, [P] or [P, M]."""
        return np.array([self.of(pair) for pair in pairs], float)

    def value(self, pairs: Sequence[dict]) -> float:
        """The number of all pairs together."""
        return float(self.summary(self.values(pairs)))

    def text(self, value: float) -> str:
        """A value as tables show it."""
        return f"{self.scale * value:.{self.digits}f}"

    def change_text(self, value: float) -> str:
        """A difference of two values, with its sign and a digit more."""
        digits = self.digits + 1
        rounded = round(self.scale * value, digits)
        return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


@dataclass(frozen=True)
class Kind:
    """What is known of a task in general. A module of `KINDS` has it as `KIND`."""

    scores: tuple[Score, ...]  # the columns of the table
    compared: tuple[str, ...]  # names of those whose change by a system is worth an interval
    headline: str  # name of the one that is plotted, and shown group by group
    badness: Callable[[dict], float]  # of a pair: the largest are the worst
    badness_text: str = "error {:.1f}"  # how a caption says it, with its unit
    curve: tuple[Score, ...] = ()  # drawn over its thresholds, such as MMA@1 to MMA@10
    notes: str = ""  # what the columns mean, a paragraph

    def score(self, name: str) -> Score:
        """A column by its name."""
        return next(score for score in self.scores if score.name == name)


def kind_of(task: str) -> Kind:
    """What is known of a task, by its name in records."""
    module: ModuleType = importlib.import_module(KINDS[task])
    return module.KIND


@dataclass(frozen=True)
class Difference:
    """A change of a score, with its bootstrap interval that holds 95 %."""

    mean: float
    low: float
    high: float


def paired_difference(
    score: Score, pairs: Sequence[dict], reference: Sequence[dict], seed: int
) -> Difference:
    """How much a score of `pairs` is above that of the `reference`, which has the same pairs.

    Both are resampled together, pair by pair with replacement (Efron's percentile interval).
    """
    own, other = score.values(pairs), score.values(reference)
    random = np.random.default_rng(seed)
    changes = [
        score.summary(own[chosen]) - score.summary(other[chosen])
        for chosen in random.integers(0, len(own), (RESAMPLES, len(own)))
    ]
    low, high = np.percentile(changes, (2.5, 97.5))
    return Difference(float(score.summary(own) - score.summary(other)), float(low), float(high))
