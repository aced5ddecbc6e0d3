"""The ALIKED variants as one table (arXiv 2304.03608, table I), and what can be asked of them."""

import os
import re
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path

from aliked.errors import InputError, shown
from aliked.files import as_path

RADIUS = 2  # pixels: of the suppression and refinement windows, and of the border without keypoints
STRIDE = 32  # of the coarsest features: images are padded to a multiple of it
MAX_TOP_K = 3840  # that one TopK of TensorRT can return


@dataclass(frozen=True)
class Config:
    """Sizes of one variant."""

    channels: tuple[int, int, int, int]  # c1..c4, after each block
    dim: int  # D: descriptor length, also the channels of the aggregated feature map
    kernel_size: int  # K: side of the patch that predicts the sample offsets
    num_positions: int  # M: deformable sample positions per keypoint
    shipped: bool = False  # its weights are part of the project, trained by `training/train.py`


CONFIGS = {
    "aliked-t16-homography": Config(
        (8, 16, 32, 64), dim=64, kernel_size=3, num_positions=16, shipped=True
    ),
    "aliked-t16": Config((8, 16, 32, 64), dim=64, kernel_size=3, num_positions=16),
    "aliked-n16": Config((16, 32, 64, 128), dim=128, kernel_size=3, num_positions=16),
    "aliked-n16rot": Config((16, 32, 64, 128), dim=128, kernel_size=3, num_positions=16),
    "aliked-n32": Config((16, 32, 64, 128), dim=128, kernel_size=3, num_positions=32),
}


DEFAULT_MODEL = "aliked-t16-homography"  # the one whose weights are part of the project
OFFICIAL = tuple(name for name, config in CONFIGS.items() if not config.shipped)


def get_config(name: str) -> Config:
    """The sizes of variant `name`; `InputError` when there is no such variant."""
    if not isinstance(name, str) or name not in CONFIGS:
        raise InputError(f"unknown model {shown(name)}; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


def most_rows(height: int, width: int) -> int:
    """The pixels of an image at which there can be a keypoint: detection drops its border."""
    return max(height - 2 * RADIUS, 0) * max(width - 2 * RADIUS, 0)


@dataclass(frozen=True)
class Selection:
    """Which keypoints of an image are kept: the best, or those above a threshold."""

    top_k: int = 1000  # the best by score; <= 0: those above `scores_th`
    scores_th: float = 0.2  # lowest score at the maximum, 0 to 1
    n_limit: int = 5000  # most keypoints in threshold mode
    # A threshold that no score passes gives no keypoint. False, as in the official code: those
    # above the image's mean score, which are more than a low threshold gives.
    strict: bool = True

    def check(self) -> None:
        """Raise `InputError` where these are no numbers, or none to select by."""
        for name in ("top_k", "n_limit"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise InputError(f"{name} is {shown(value)}; give a whole number")
        th = self.scores_th
        if not isinstance(th, Real) or isinstance(th, bool) or not 0 <= th <= 1:
            raise InputError(f"scores_th is {shown(th)}; give a number from 0 to 1")
        if self.by_threshold and self.n_limit <= 0:
            raise InputError(f"n_limit is {self.n_limit} in threshold mode; it must be at least 1")
        if not isinstance(self.strict, bool):
            raise InputError(f"strict is {shown(self.strict)}; give True or False")

    @property
    def by_threshold(self) -> bool:
        """Whether the score decides, and not the number."""
        return self.top_k <= 0

    @property
    def limit(self) -> int:
        """The most keypoints of an image."""
        return self.n_limit if self.by_threshold else self.top_k

    def rows(self, height: int, width: int) -> int:
        """Return how many rows an image's outputs have, fill-ins included."""
        return min(self.limit, most_rows(height, width))

    def __str__(self) -> str:
        if not self.by_threshold:
            return str(self.top_k)
        rule = "" if self.strict else ", else > mean"
        return f"score > {self.scores_th:g}{rule} (max {self.n_limit})"


# tf32, which only TensorRT's backends have, is float32 that is multiplied with the 11 significant
# bits of half precision.
PRECISIONS = ("fp32", "tf32", "fp16")


DEVICES = re.compile("auto|cpu|cuda(:[0-9]+)?")


@dataclass(frozen=True)
class Spec:
    """What to run. A backend that runs a file (`model_path`) takes the rest from that file."""

    model: str = DEFAULT_MODEL
    top_k: int = Selection.top_k  # <= 0: threshold mode
    scores_th: float = Selection.scores_th
    n_limit: int = Selection.n_limit
    precision: str = "fp32"  # of PRECISIONS
    device: str = "auto"  # "auto", "cpu", "cuda" or "cuda:N"
    weights: Path | None = None
    model_path: Path | None = None
    compile_mode: str = "reduce-overhead"  # of torch.compile: with CUDA graphs
    strict: bool = Selection.strict  # of the threshold

    def check(self) -> None:
        """Raise `InputError` for a field of another type or value than it can have."""
        get_config(self.model)
        self.selection.check()
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            names = ", ".join(PRECISIONS)
            raise InputError(f"unknown precision {shown(self.precision)}; choose one of {names}")
        for name in ("weights", "model_path"):
            path = getattr(self, name)
            if path is not None and not isinstance(path, str | os.PathLike):
                raise InputError(f"{name} is {shown(path)}; give the path of a file")
            if path is not None:
                as_path(path)
        if not isinstance(self.device, str) or not DEVICES.fullmatch(self.device):
            raise InputError(f"unknown device {shown(self.device)}; give auto, cpu, cuda or cuda:N")

    @property
    def selection(self) -> Selection:
        """Which keypoints are kept."""
        return Selection(self.top_k, self.scores_th, self.n_limit, self.strict)

    @property
    def tf32(self) -> bool:
        """Whether float32 may be multiplied in TF32, where a model of half precision has it."""
        return self.precision != "fp32"

    def in_its_types(self) -> "Spec":
        """With "fp32" for "tf32", as whatever writes or converts the model names its types."""
        return replace(self, precision="fp32") if self.precision == "tf32" else self


@dataclass(frozen=True)
class Form:
    """How the graph is written where runtimes differ. The features are the same in every form."""

    sampling: str = "gridsample"  # or "gather": the method of `bilinear_sample`
    # For files: by operators that TensorRT runs fast (docs/tensorrt-graph.md), and in threshold
    # mode in descending order, as the official order takes a sort that TensorRT lacks.
    exported: bool = False
    dynamic: bool = False  # exported with symbolic sizes, which rule out some of these operators

    @property
    def static(self) -> bool:
        """Whether it is a file for images of one size."""
        return self.exported and not self.dynamic
