"""Non-maximum suppression in one pass, emitting the surviving pixels as sortable keys.

A key is the score's bits above the inverted pixel index: larger keys are better scores, and equal
scores come in the order of the image, so the order of keys is total and does not depend on which
block ran first.
"""

import torch
import triton
import triton.language as tl

from custom_ops.fused import cuda_source

RADIUS = tl.constexpr(2)  # of the suppression window, and of the border that is dropped
INDEX_BITS = tl.constexpr(32)

# What is kept with the keys, in int32: the number of keys per bin of scores, the number of keys,
# then what `select` adds: how many it kept, and whether their order is that of the image.
# Scores are counted by the leading bits of their float32: 128 bins per octave, 32 octaves. What is
# lower belongs to bin 0, which is not counted: it has what the others leave.
BINS = tl.constexpr(4096)
BIN_SHIFT = tl.constexpr(16)
LOWEST_BIN = tl.constexpr((0x3F800000 >> 16) - 4096 + 1)  # score 1 is in the highest
TALLY = tl.constexpr(4096 + 3)

SOURCE = "maxima.cu"
INNER = 32  # pixels of a tile that are a block's own, as in the source
THREADS = 512
CONSTANTS = tuple(
    (name, globals()[name].value) for name in ("RADIUS", "BINS", "BIN_SHIFT", "LOWEST_BIN", "TALLY")
)


def _allocate(scores):
    batch, height, width = scores.shape
    capacity = (height - 2 * RADIUS.value) * (width - 2 * RADIUS.value)
    keys = scores.new_empty((batch, capacity), dtype=torch.int64)
    return keys, scores.new_zeros((batch, TALLY.value), dtype=torch.int32)


@torch.library.custom_op("aliked::find_maxima", mutates_args=())
def find_maxima(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of 5x5 windows in three rounds: float32 [B, H, W] in [0, 1] to keys and their tally.

    keys: int64 [B, (H - 4) * (W - 4)], in no order, of pixels with a score above 0 that are not in
    the outer two rows and columns; tally: int32 [B, TALLY], keys per bin, their number, two zeros.
    """
    keys, tally = _allocate(scores)
    batch, height, width = scores.shape
    across = triton.cdiv(width, INNER)
    run = cuda_source.compiled(SOURCE, "find_maxima", CONSTANTS, scores.device)
    grid = (triton.cdiv(height, INNER) * across, batch, 1)
    run(grid, (THREADS, 1, 1), [scores, keys, tally, height, width, across])
    return keys, tally


find_maxima.register_fake(_allocate)
