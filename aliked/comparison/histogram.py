"""Histogram of descriptor dot products."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from aliked.files import whole_file

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
