"""Which maxima become keypoints, their order, and their refinement to sub-pixel positions.

The kernels are CUDA C++ (`selection.cu`) in either precision: scores are float32.
"""

import torch
import triton

from aliked.fused import cuda_source
from aliked.fused.common import float_bits
from aliked.fused.maxima import TALLY_CONSTANTS

SOURCE = "selection.cu"
SLACK = 1024  # keys that may pass beside the k best: ranking them is cheaper than finding the k-th
THREADS = 256
KEYS = 16  # pixels per thread of `select`: of nine, one at most is a maximum, but on plateaus
MAX_PROGRAMS = 128  # that share the filtering: each finds the smallest key by itself
FEW = 4096  # keys, which every block of `refine` reads: with more, a warp ranks four


def constants(room: int) -> tuple:
    """The definitions before `selection.cu`."""
    return (*TALLY_CONSTANTS, ("EACH", 1 if room <= FEW else 4))


def _allocate_select(keys, tally, means, k, threshold):
    return keys.new_empty((len(keys), min(k + SLACK, keys.shape[1])))


@torch.library.custom_op("aliked::select", mutates_args=("tally",))
def select(
    keys: torch.Tensor, tally: torch.Tensor, means: torch.Tensor | None, k: int, threshold: float
) -> torch.Tensor:
    """Keep the k best keys of each image, and up to `SLACK` more; all of them where k is more.

    With `means`, float32 [B], the mean score of each image: keep those above `threshold` if they
    are at most k. Where none is, or the threshold is not above 0, the mean takes its place.
    Returns keys, int64 [B, room], in no order. Two values of each image's `tally`, zero before,
    become how many there are and whether the order to bring them into is that of the image (1) or
    of the scores (0).
    """
    chosen = _allocate_select(keys, tally, means, k, threshold)
    run = cuda_source.compiled(SOURCE, "select_keys", constants(chosen.shape[1]), keys.device)
    run(*select_launch(keys, tally, means, chosen, k, threshold))
    return chosen


select.register_fake(_allocate_select)


def select_launch(keys, tally, means, chosen, k: int, threshold: float) -> tuple:
    """Grid, block and arguments of `select_keys`."""
    capacity = keys.shape[1]
    programs = min(MAX_PROGRAMS, triton.cdiv(capacity, THREADS * KEYS))
    bits = float_bits(threshold) if threshold > 0 else -1
    by_threshold = means is not None
    values = [int(by_threshold), capacity, chosen.shape[1], k, bits]
    tensors = [keys, tally, means if by_threshold else tally, chosen]
    return (programs, len(keys), 1), (THREADS, 1, 1), [*tensors, *values]


def _allocate_refine(chosen, tally, scores, k):
    def rows(*last):
        return scores.new_empty((len(scores), k, *last))

    return rows(2), rows(), rows(), rows()


@torch.library.custom_op("aliked::refine", mutates_args=())
def refine(
    chosen: torch.Tensor, tally: torch.Tensor, scores: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank what `select` kept, take the first k and refine them by the soft-argmax of the window.

    Returns float32 keypoints [B, k, 2] in pixels, (x, y), and [B, k] each: the score there, the
    score at the maximum, the dispersity (DKD, arXiv 2112.02906, section III-B).
    """
    outputs = _allocate_refine(chosen, tally, scores, k)
    definitions = constants(chosen.shape[1])
    run = cuda_source.compiled(SOURCE, "refine_keypoints", definitions, scores.device)
    run(*refine_launch(chosen, tally, scores, outputs, k))
    return outputs


refine.register_fake(_allocate_refine)


def refine_launch(chosen, tally, scores, outputs: tuple, k: int) -> tuple:
    """Grid, block and arguments of `refine_keypoints`."""
    batch, height, width = scores.shape
    room = chosen.shape[1]
    share = THREADS // 32 * dict(constants(room))["EACH"]
    grid = (triton.cdiv(room, share), batch, 1)
    return grid, (THREADS, 1, 1), [chosen, tally, scores, *outputs, height, width, room, k]
