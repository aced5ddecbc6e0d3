"""Every fused operator; `reference` has a plain PyTorch twin of each by the same name."""

from aliked.fused.blocks import block1, block2
from aliked.fused.deform import deform, deform_level
from aliked.fused.describe import sample_descriptors, sample_offsets
from aliked.fused.maxima import find_maxima
from aliked.fused.score_head import score_head
from aliked.fused.selection import refine, select

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
