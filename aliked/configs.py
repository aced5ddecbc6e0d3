"""The ALIKED variants as one table: the published ones (arXiv 2304.03608, table I) and our own."""

from dataclasses import dataclass

from aliked.errors import InputError


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


OFFICIAL = tuple(name for name, config in CONFIGS.items() if not config.shipped)


def get_config(name: str) -> Config:
    """The sizes of variant `name`; `InputError` when there is no such variant."""
    if name not in CONFIGS:
        raise InputError(f"unknown model {name!r}; choose one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


@dataclass(frozen=True)
class Form:
    """How the graph is written where runtimes differ. The features are the same in every form."""

    sampling: str = "gridsample"  # or "gather": the method of `bilinear_sample`
    # For files: by operators that TensorRT runs fast (docs/tensorrt-graph.md), and in threshold
    # mode in descending order, as the official order takes a sort that TensorRT lacks.
    exported: bool = False
    dynamic: bool = False  # exported with symbolic sizes, which rule out some of these operators
