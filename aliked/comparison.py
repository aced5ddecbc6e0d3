"""Stage 4: what is lost between two runtimes or precisions, keypoint by keypoint."""

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from aliked.cli import markdown
from aliked.features import Features
from aliked.files import whole_file
from aliked.matching import Matcher, Size
from aliked.parity import FeaturePairs, count_not_finite, pair_features


@dataclass(frozen=True)
class ImageComparison:
    """Both runtimes' features of one image, in descending order of their scores, paired."""

    name: str
    reference: Features
    other: Features
    pairs: FeaturePairs
    size: Size | None  # width and height in pixels, for matchers that ask for it

    @property
    def missed(self) -> np.ndarray:
        """Keypoints of the reference without partner: indices, which are ranks by score."""
        return np.delete(np.arange(len(self.reference)), self.pairs.reference)

    @property
    def extra(self) -> np.ndarray:
        """Keypoints of the other without partner: indices, which are ranks by score."""
        return np.delete(np.arange(len(self.other)), self.pairs.other)

    def element_differences(self) -> np.ndarray:
        """|difference| of every element of the descriptors, [P, D] float64."""
        a = self.reference.descriptors[self.pairs.reference].astype(np.float64)
        return np.abs(a - self.other.descriptors[self.pairs.other])


@dataclass(frozen=True)
class MatchChange:
    """Matches between two images with the reference, and what the other makes of them."""

    first: str  # names of the images
    second: str
    reference: int  # matches with the reference
    other: int  # matches with the other
    kept: int  # matches of both, between the same keypoints
    undetected: int  # of those lost: a keypoint of theirs was missed
    similarity: np.ndarray  # [reference] dot products of the reference's matches

    @property
    def lost(self) -> int:
        """Matches that only the reference makes."""
        return self.reference - self.kept

    @property
    def gained(self) -> int:
        """Matches that only the other makes."""
        return self.other - self.kept


def compare_image(
    name: str, reference: Features, other: Features, radius: float, size: Size | None = None
) -> ImageComparison:
    """Sort both runtimes' features of one image by score and pair them, at most `radius` px apart.

    `InputError` when the descriptors differ in length: these are two models, not two runtimes.
    """
    reference, other = by_score(reference), by_score(other)
    pairs = pair_features(reference, other, radius)
    return ImageComparison(name, reference, other, pairs, size)


def by_score(features: Features) -> Features:
    """Features in descending order of `scores`."""
    order = np.argsort(-features.scores, kind="stable")
    return Features(features.keypoints[order], features.scores[order], features.descriptors[order])


def match_change(first: ImageComparison, second: ImageComparison, matcher: Matcher) -> MatchChange:
    """Match two images with either runtime's features, and see which matches are the same.

    Two matches are the same when the keypoints at both their ends are pairs.
    """
    sizes = first.size, second.size
    expected = matcher.match(first.reference, second.reference, *sizes).indices
    found = matcher.match(first.other, second.other, *sizes).indices
    ends = (first, expected[:, 0], found[:, 0]), (second, expected[:, 1], found[:, 1])
    translated = np.stack([_in_reference(image, new) for image, _, new in ends], axis=1)
    detected = [np.isin(old, image.pairs.reference) for image, old, _ in ends]
    a = first.reference.descriptors[expected[:, 0]].astype(np.float64)
    b = second.reference.descriptors[expected[:, 1]]
    return MatchChange(
        first=first.name,
        second=second.name,
        reference=len(expected),
        other=len(found),
        kept=len(set(map(tuple, expected.tolist())) & set(map(tuple, translated.tolist()))),
        undetected=int((~(detected[0] & detected[1])).sum()),
        similarity=(a * b).sum(axis=1),
    )


def _in_reference(image: ImageComparison, indices: np.ndarray) -> np.ndarray:
    """The reference's index of each of the other's keypoints, -1 where it has no partner."""
    partner = np.full(len(image.other), -1)
    partner[image.pairs.other] = image.pairs.reference
    return partner[indices]


COUNTS = ("reference", "other", "both", "missed", "extra", "not_finite")
MATCHES = ("reference", "other", "kept", "lost", "undetected", "gained")
PERCENTILES = {"median": 50, "p90": 90, "p99": 99, "max": 100}
Values = dict[str, np.ndarray]  # by name, one per pair


class Numbers:
    """Collects the numbers of images, and of the matches between consecutive ones."""

    def __init__(self) -> None:
        self.images: list[dict] = []
        self.consecutive: list[dict] = []
        self.dim = 0  # length of the descriptors
        self._values: list[Values] = []
        self._similarities: list[np.ndarray] = []
        self._missed_ranks: list[np.ndarray] = []

    def add_image(self, image: ImageComparison) -> None:
        """Take in one image."""
        values = _values(image)
        self.images.append({"image": image.name} | _counts(image) | _statistics(values))
        self.dim = image.reference.descriptors.shape[1]
        self._values.append(values)
        self._missed_ranks.append(image.missed + 1)

    def add_matches(self, change: MatchChange) -> None:
        """Take in the matches of two consecutive images."""
        names = {"first": change.first, "second": change.second}
        self.consecutive.append(names | {name: getattr(change, name) for name in MATCHES})
        self._similarities.append(change.similarity)

    def dot_products(self) -> np.ndarray:
        """Dot products of the descriptors of all pairs."""
        return self._joined()["dot"]

    def similarities(self) -> np.ndarray:
        """Dot products of the reference's matches between consecutive images."""
        return np.concatenate([np.empty(0), *self._similarities])

    def summary(self) -> dict:
        """All numbers, by image and in total; None where there is none, as of no pairs."""
        total = {name: sum(image[name] for image in self.images) for name in COUNTS}
        total["missed_rank"] = _percentile(np.concatenate(self._missed_ranks), 50)
        total |= _statistics(self._joined())
        if self.consecutive:
            total["matches"] = {n: sum(pair[n] for pair in self.consecutive) for n in MATCHES}
            total["match_similarity"] = _percentile(self.similarities(), 50)
        images = {"images": self.images, "consecutive": self.consecutive}
        return {"descriptor_length": self.dim} | images | {"total": total}

    def _joined(self) -> Values:
        """The values of all images' pairs."""
        return {
            name: np.concatenate([own[name] for own in self._values]) for name in self._values[0]
        }


def _values(image: ImageComparison) -> Values:
    """What is summed up of every pair of an image, [P] each."""
    pairs, elements = image.pairs, image.element_differences()
    return {
        "shift": pairs.shift,
        "score_difference": pairs.score_difference,
        "dot": pairs.dot,
        "at_edge": pairs.at_edge,
        "element_mean": elements.mean(axis=1),
        "element_max": elements.max(axis=1),
    }


def _counts(image: ImageComparison) -> dict[str, int]:
    return {
        "reference": len(image.reference),
        "other": len(image.other),
        "both": len(image.pairs.shift),
        "missed": len(image.missed),
        "extra": len(image.extra),
        "not_finite": count_not_finite(image.reference) + count_not_finite(image.other),
    }


def _statistics(values: Values) -> dict[str, dict[str, float | None]]:
    dot = values["dot"]
    return {
        "at_pixel_edge": int(values["at_edge"].sum()),
        "shift_px": _distribution(values["shift"]),
        "score_difference": _distribution(values["score_difference"]),
        "dot_product": {
            "mean": _mean(dot),
            "p1": _percentile(dot, 1),
            "min": _percentile(dot, 0),
            "min_within_pixel": _percentile(dot[~values["at_edge"]], 0),
        },
        "element_difference": {
            "mean": _mean(values["element_mean"]),
            "max": _percentile(values["element_max"], 100),
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


def report_text(title: str, numbers: dict, radius: float, matcher: str = "mutual") -> str:
    """What `Numbers.summary` gave, as Markdown; `radius` of the pairs in pixels."""
    total = numbers["total"]
    return "\n\n".join(
        [
            f"# {title}",
            _paragraph(
                f"Keypoints of both are each other's nearest and at most {radius:g} px apart; only "
                "the reference has the missed ones, only the other the extra ones."
            ),
            _image_table([*numbers["images"], {"image": "total"} | total]),
            _keypoint_remarks(total),
            _difference_table(total),
            _descriptor_table(total),
            _paragraph(_why_dot_products(total, numbers["descriptor_length"]) + _for_scale(total)),
            *_matching(numbers["consecutive"], total, matcher),
        ]
    )


def _image_table(rows: list[dict]) -> str:
    counts = ["reference", "other", "both", "missed", "extra"]
    header = ["image", *counts, "shift px: median", "max", "dot product: mean", "min"]
    return markdown(
        header,
        [
            [row["image"], *(str(row[name]) for name in counts)]
            + [_difference(row["shift_px"][name]) for name in ("median", "max")]
            + [_dot(row["dot_product"][name]) for name in ("mean", "min")]
            for row in rows
        ],
        left=1,
    )


def _keypoint_remarks(total: dict) -> str:
    text = f"Both found {_share(total['both'], total['reference'])} of the reference's keypoints."
    if total["missed_rank"]:
        text += f" The median rank by score of those missed is {total['missed_rank']:.0f}."
    if total["not_finite"]:
        text += f" NaN or infinity is in {total['not_finite']} keypoints."
    return _paragraph(text)


def _difference_table(total: dict) -> str:
    header = [f"differences of {total['both']} pairs", "median", "90 %", "99 %", "max"]
    lines = {"shift, px": total["shift_px"], "score": total["score_difference"]}
    rows = [[name, *map(_difference, values.values())] for name, values in lines.items()]
    return markdown(header, rows, left=1)


def _descriptor_table(total: dict) -> str:
    dot, element = total["dot_product"], total["element_difference"]
    rows = [
        ["dot product", _dot(dot["mean"]), _dot(dot["p1"]), _dot(dot["min"])],
        ["difference per element", _difference(element["mean"]), "", _difference(element["max"])],
    ]
    return markdown(["descriptors", "mean", "1st percentile", "worst"], rows, left=1)


def _why_dot_products(total: dict, dim: int) -> str:
    """What the lines about descriptors mean, with the numbers at hand."""
    largest = total["element_difference"]["max"]
    text = (
        "The dot product is the line that matters: descriptors have unit length, and matching "
        "compares their dot products, the cosines of the angles between them; it never looks at "
        f"an element. It falls short of 1 by half the sum of the squared differences: with every "
        f"one of {dim} elements off by 0.01, where their usual size is 1/sqrt({dim}) = "
        f"{dim**-0.5:.2g}, it is still {1 - dim * 1e-4 / 2:.4f}."
    )
    if largest:
        least, most = largest**2 / 2, min(2, dim * largest**2 / 2)
        text += (
            f" The largest difference of an element, {largest:.2g}, leaves open anything from "
            f"{least:.1g} to {most:.1g} below 1."
        )
    return text


def _for_scale(total: dict) -> str:
    """Where the worst dot products come from, and how much a change of view costs."""
    dot, similarity, text = total["dot_product"], total.get("match_similarity"), ""
    if total["at_pixel_edge"] and dot["min_within_pixel"] is not None:
        text = (
            f" In {total['at_pixel_edge']} pairs a keypoint lies at a pixel edge, where rounding "
            "decides from which of two patches, a pixel apart, its descriptor comes; the worst of "
            f"the others is {_dot(dot['min_within_pixel'])}."
        )
    if similarity is not None and dot["mean"] is not None:
        text += (
            " For scale: the reference's matches between consecutive images have a median of "
            f"{similarity:.4f}; the change of view costs {1 - similarity:.2g}, the change of "
            f"runtime {abs(1 - dot['mean']):.1g} on average."
        )
    return text


def _match_table(rows: list[dict]) -> str:
    header = ["matches", "reference", "other", "kept", "lost", "of these keypoint missed", "gained"]
    counts = ("reference", "other", "kept", "lost", "undetected", "gained")
    return markdown(
        header, [[row["images"], *(str(row[name]) for name in counts)] for row in rows], left=1
    )


MATCHED_BY = {"mutual": "mutual nearest neighbours of the descriptors", "lightglue": "LightGlue's"}


def _matching(consecutive: list[dict], total: dict, matcher: str) -> list[str]:
    if not consecutive:
        return ["There is only one image, so there is no matching to compare."]
    matches = total["matches"]
    rows = [{"images": f"{pair['first']} - {pair['second']}"} | pair for pair in consecutive]
    share = _share(matches["kept"], matches["reference"])
    remark = (
        f"Matches are {MATCHED_BY[matcher]}; a match is kept when both its "
        f"keypoints are pairs. Of the reference's matches {share} are kept."
    )
    return [_match_table([*rows, {"images": "total"} | matches]), _paragraph(remark)]


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 90)


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _dot(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _share(part: int, whole: int) -> str:
    """A percentage, rounded down, so that only all are 100 %."""
    return f"{10000 * part // whole / 100:.2f} %" if whole else f"{part} of {whole}"


FINEST = 1e-7  # 1 - dot product: below it is the rounding of float32 descriptors
BINS_PER_DECADE = 8


def draw_histogram(dot_products: np.ndarray, similarities: np.ndarray, title: str) -> Figure:
    """Dot products between two runtimes, and for scale those of matches between images.

    The axis is that of 1 - dot product, logarithmic, as nearly all are close to 1; what is
    closer than float32 can tell stands at the right end.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    bins = np.geomspace(FINEST, 2, int(BINS_PER_DECADE * np.log10(2 / FINEST)) + 1)
    axis.hist(_distance(dot_products), bins, color="tab:blue", label="same keypoint, two runtimes")
    if len(similarities):
        axis.hist(
            _distance(similarities),
            bins,
            histtype="step",
            color="tab:orange",
            linewidth=1.5,
            label="for scale: matches between consecutive images, reference",
        )
    axis.set_xscale("log")
    axis.set_yscale("symlog", linthresh=1)  # single keypoints show, and empty bins are empty
    axis.set_xlim(2, FINEST)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda distance, _: f"{1 - distance:.8g}"))
    axis.set_xlabel("dot product of descriptors")
    axis.set_ylabel("keypoints")
    axis.set_title(title, fontsize="medium", wrap=True)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    axis.grid(alpha=0.3)
    return figure


def write_histogram(path: Path, figure: Figure) -> None:
    """Write the figure, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)


def _distance(dot_products: np.ndarray) -> np.ndarray:
    """1 - dot product, within the axis; without what is not a number."""
    return np.clip(1 - dot_products[np.isfinite(dot_products)], FINEST, 2)
