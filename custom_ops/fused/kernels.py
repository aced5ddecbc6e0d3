"""Every fused operator; `reference` has a plain PyTorch twin of each by the same name."""

from custom_ops.fused.conv import conv3x3, conv3x3_level
from custom_ops.fused.deform import deform, deform_level
from custom_ops.fused.describe import aggregate, sample_features, sample_offsets
from custom_ops.fused.maxima import find_maxima
from custom_ops.fused.score_map import blend, score_map
from custom_ops.fused.selection import refine, select
from custom_ops.fused.stem import stem

__all__ = [
    "aggregate",
    "blend",
    "conv3x3",
    "conv3x3_level",
    "deform",
    "deform_level",
    "find_maxima",
    "refine",
    "sample_features",
    "sample_offsets",
    "score_map",
    "select",
    "stem",
]
