"""Every fused operator; `reference` has a plain PyTorch twin of each by the same name."""

from custom_ops.fused.blocks import block1, block2
from custom_ops.fused.deform import deform, deform_level
from custom_ops.fused.describe import sample_descriptors, sample_offsets
from custom_ops.fused.maxima import find_maxima
from custom_ops.fused.score_head import score_head
from custom_ops.fused.selection import refine, select

__all__ = [
    "block1",
    "block2",
    "deform",
    "deform_level",
    "find_maxima",
    "refine",
    "sample_descriptors",
    "sample_offsets",
    "score_head",
    "select",
]
