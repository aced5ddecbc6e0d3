"""Non-maximum suppression in one pass, emitting the surviving pixels as sortable keys.

A key is the score's bits above the inverted pixel index: larger keys are better scores, and equal
scores come in the order of the image, so the order of keys is total and does not depend on which
block ran first.
"""

import torch

from aliked.configs import RADIUS, most_rows
from aliked.fused import cuda_source, launches
from aliked.fused.common import operator

# What is kept with the keys, in int32: the number of keys per bin of scores, the number of keys,
# then what `select` adds: how many it kept, and whether their order is that of the image; one more
# makes whole 16 bytes of a row.
# Scores are counted by the leading bits of their float32: 128 bins per octave, 32 octaves. What is
# lower belongs to bin 0, which is not counted: it has what the others leave.
BINS = 4096
BIN_SHIFT = 16
LOWEST_BIN = (0x3F800000 >> BIN_SHIFT) - BINS + 1  # score 1 is in the highest
TALLY = BINS + 4

SOURCE = "maxima.cu"
TALLY_CONSTANTS = (
    ("RADIUS", RADIUS),
    ("BINS", BINS),
    ("BIN_SHIFT", BIN_SHIFT),
    ("LOWEST_BIN", LOWEST_BIN),
    ("TALLY", TALLY),
)
CONSTANTS = launches.build("maxima", **dict(TALLY_CONSTANTS))
BLOCK = launches.threads("find_maxima", CONSTANTS)


def grid(batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Blocks for the images, the tiles down and the tiles across."""
    return launches.grid("find_maxima", CONSTANTS, batch=batch, height=height, width=width)


def _allocate(scores, tally):
    batch, height, width = scores.shape
    return scores.new_empty((batch, most_rows(height, width)), dtype=torch.int64)


@operator(_allocate, mutates=("tally",))
def find_maxima(scores: torch.Tensor, tally: torch.Tensor) -> torch.Tensor:
    """Maxima of 5x5 windows in three rounds: float32 [B, H, W] in [0, 1] to keys.

    Returns keys, int64 [B, (H - 4) * (W - 4)], in no order, of pixels with a score above 0 that are
    not in the outer two rows and columns; how many, and how many per bin, is added to `tally`,
    int32 [B, TALLY].
    """
    keys = _allocate(scores, tally)
    batch, height, width = scores.shape
    run = cuda_source.compiled(SOURCE, "find_maxima", CONSTANTS, scores.device)
    run(grid(batch, height, width), BLOCK, [scores, keys, tally, height, width])
    return keys
