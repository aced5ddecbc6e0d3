"""Which maxima become keypoints, their order, and their refinement to sub-pixel positions.

The kernels are CUDA C++ (`selection.cu`) in either precision: scores are float32.
"""

import torch

from aliked.fused import cuda_source, launches
from aliked.fused.common import operator
from aliked.fused.cuda_source import float_bits
from aliked.fused.maxima import TALLY_CONSTANTS

SOURCE = "selection.cu"
SLACK = launches.number("SLACK")  # keys that may pass beside the k best


def constants(room: int) -> tuple:
    """The definitions before `selection.cu`."""
    few = launches.number("FEW_KEYS")
    return launches.build("selection", **dict(TALLY_CONSTANTS), EACH=1 if room <= few else 4)


def _allocate_select(keys, tally, means, k, threshold):
    return keys.new_empty((len(keys), min(k + SLACK, keys.shape[1])))


@operator(_allocate_select, mutates=("tally",))
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


def select_launch(keys, tally, means, chosen, k: int, threshold: float) -> tuple:
    """Grid, block and arguments of `select_keys`."""
    capacity = keys.shape[1]
    grid = launches.grid("select_keys", capacity=capacity, batch=len(keys))
    bits = float_bits(threshold) if threshold > 0 else -1
    by_threshold = means is not None
    values = [int(by_threshold), capacity, chosen.shape[1], k, bits]
    tensors = [keys, tally, means if by_threshold else tally, chosen]
    return grid, launches.threads("select_keys"), [*tensors, *values]


def _allocate_refine(chosen, tally, scores, k):
    def rows(*last):
        return scores.new_empty((len(scores), k, *last))

    return rows(2), rows(), rows(), rows()


@operator(_allocate_refine)
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


def refine_launch(chosen, tally, scores, outputs: tuple, k: int) -> tuple:
    """Grid, block and arguments of `refine_keypoints`."""
    batch, height, width = scores.shape
    room = chosen.shape[1]
    grid = launches.grid("refine_keypoints", constants(room), room=room, batch=batch)
    arguments = [chosen, tally, scores, *outputs, height, width, room, k]
    return grid, launches.threads("refine_keypoints"), arguments
