"""What an evaluation measures: pairs of images, numbers of each pair, scores over all of them."""

import abc
import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypedDict

import msgspec
import numpy as np
from tqdm import tqdm

from aliked.drawing import draw_matches
from aliked.features import Features
from aliked.images import one_opencv_thread
from aliked.matching import Matcher
from evaluation.pairs import MUTUAL, Dataset, Image, Pair

RESAMPLES = 1000  # of the bootstrap
Count = Annotated[int, msgspec.Meta(ge=0)]
Error = Annotated[float, msgspec.Meta(ge=0)] | None  # None: nothing was found


def error_auc(errors: np.ndarray, threshold: float) -> float:
    """Area under recall(error) from 0 to `threshold`, divided by it, in [0, 1].

    `errors` [N], a failed pair is infinite. Between the sorted errors, at which the recall is 1/N,
    2/N, ..., the curve is straight; it starts at (0, 0) and is level from the last error below the
    threshold on. This is SuperGlue's (arXiv 1911.11763, section 5.1), which glue-factory computes
    for homographies too.
    """
    errors = np.sort(errors)
    below = errors[errors < threshold]
    recall = np.arange(len(below) + 1) / len(errors)
    return float(np.trapezoid([*recall, recall[-1]], [0, *below, threshold]) / threshold)


@dataclass(frozen=True)
class Score:
    """One column of a table. `of` gives the number, or the numbers, of a pair."""

    name: str  # such as "AUC@3"
    of: Callable[[dict], float | tuple[float, ...]]  # NaN where a pair was not measured by it
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
        """The number of all pairs together; NaN where one of them has none."""
        values = self.values(pairs)
        return float("nan") if np.isnan(values).any() else float(self.summary(values))

    def text(self, value: float) -> str:
        """A value as tables show it."""
        return "-" if np.isnan(value) else f"{self.scale * value:.{self.digits}f}"

    def change_text(self, value: float) -> str:
        """A difference of two values, with its sign and a digit more."""
        digits = self.digits + 1
        rounded = round(self.scale * value, digits)
        return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def auc_score(threshold: float, errors: Callable[[dict], float | tuple], label: str = "") -> Score:
    """The column AUC@`threshold` of one or more errors of every pair."""
    return Score(
        f"AUC@{threshold}{label}", errors, lambda values: error_auc(values.ravel(), threshold)
    )


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


class Row(TypedDict):
    """What a record holds of every pair."""

    name: str
    group: str
    keypoints: Annotated[list[Count], msgspec.Meta(min_length=2, max_length=2)]
    matches: Count


class Task(abc.ABC):
    """One kind of evaluation, over the pairs of one data set.

    The class says how its records become tables; an object measures.
    """

    name: ClassVar[str]  # as the command line and records have it
    row: ClassVar[type]  # a `Row` with what `measure` finds
    help: ClassVar[str]
    scores: ClassVar[tuple[Score, ...]]  # the columns of the table
    compared: ClassVar[tuple[str, ...]]  # those whose change by a system is worth an interval
    headline: ClassVar[str]  # the one that is plotted, and shown group by group
    badness_text: ClassVar[str] = "error {:.1f}"  # how a caption says it, with its unit
    curve: ClassVar[tuple[Score, ...]] = ()  # drawn over its thresholds, such as MMA@1 to MMA@10
    curve_unit: ClassVar[str] = "px"  # of its thresholds
    notes: ClassVar[str]  # what the columns mean, a paragraph

    def __init__(self, dataset: Dataset, parameters: dict) -> None:
        """`parameters`: what the numbers depend on besides data and features, as JSON has it."""
        self.dataset, self.parameters = dataset, dataset.parameters | parameters

    @staticmethod
    @abc.abstractmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the data, and how it is used, to the command line."""

    @classmethod
    @abc.abstractmethod
    def from_options(cls, args: argparse.Namespace) -> "Task":
        """Return the task that the options ask for; `InputError` where they make no sense."""

    @staticmethod
    @abc.abstractmethod
    def badness(row: dict) -> float:
        """Return a number of a pair's row: the largest are the worst pairs."""

    @abc.abstractmethod
    def measure(self, pair: Pair, first: Features, second: Features, matches: np.ndarray) -> dict:
        """Return what the features of a pair's images, and their matches [P, 2], are worth.

        As JSON has it.
        """

    @abc.abstractmethod
    def caption(self, row: dict) -> str:
        """What `measure` found of a pair, in the line below its picture."""

    def right(
        self, pair: Pair, first: Features, second: Features, matches: np.ndarray
    ) -> np.ndarray | None:
        """Which matches of a pair are right, [P] bool; None where nothing is known of them."""
        return None

    @classmethod
    def score(cls, name: str) -> Score:
        """A column by its name."""
        return next(score for score in cls.scores if score.name == name)

    def rows(self, features: Callable[[Image], Features], matcher: Matcher = MUTUAL) -> list[dict]:
        """What was found of every pair, with its name and group, in the order of the pairs."""

        def one(pair: Pair) -> dict:
            found = self.measure(pair, *matched(pair, features, matcher))
            return {"name": pair.name, "group": pair.group} | found

        # A pair per thread: NumPy and OpenCV let the others run.
        with one_opencv_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = pool.map(one, self.dataset.pairs)
            return list(tqdm(rows, "pairs", len(self.dataset.pairs), leave=False, disable=None))

    def picture(
        self, row: dict, features: Callable[[Image], Features], matcher: Matcher = MUTUAL
    ) -> np.ndarray:
        """The matches of the pair that a row is of, as uint8 [H, W, 3] RGB."""
        pair = next(pair for pair in self.dataset.pairs if pair.name == row["name"])
        first, second, matches = matched(pair, features, matcher)
        return draw_matches(
            pair.first.load(),
            first,
            pair.second.load(),
            second,
            matches,
            self.caption(row),
            self.right(pair, first, second, matches),
        )


def matched(
    pair: Pair, features: Callable[[Image], Features], matcher: Matcher
) -> tuple[Features, Features, np.ndarray]:
    """The features of a pair's images and their matches [P, 2]."""
    first, second = features(pair.first), features(pair.second)
    return first, second, matcher.match(first, second, pair.first.size, pair.second.size).indices
