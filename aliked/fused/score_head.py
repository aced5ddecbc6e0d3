"""The score head: one CUDA C++ kernel in half precision, a chain of Triton's otherwise."""

import torch

from aliked.fused import cuda_source, launches
from aliked.fused.common import operator
from aliked.fused.conv import conv3x3
from aliked.fused.maxima import TALLY
from aliked.fused.score_map import blend, score_map

SOURCE = "score_head.cu"
CONSTANTS = launches.build("score_head", TALLY=TALLY)
BLOCK = launches.threads("score_head")


def grid(batch: int, height: int, frame_width: int) -> tuple[int, int, int]:
    """Blocks for the images, the tiles down and the tiles across `height` rows of scores."""
    return launches.grid("score_head", CONSTANTS, batch=batch, height=height, width=frame_width)


def _allocate(
    s1, s2, s3, s4, first_weight, first_bias, second_weight, second_bias, last_weight, fragments,
    top, left, height, width,
):  # fmt: skip
    scores = s1.new_empty((s1.shape[0], height, width), dtype=torch.float32)
    return scores, s1.new_empty((s1.shape[0], TALLY), dtype=torch.int32)


@operator(_allocate)
def score_head(
    s1: torch.Tensor, s2: torch.Tensor, s3: torch.Tensor, s4: torch.Tensor,
    first_weight: torch.Tensor, first_bias: torch.Tensor,
    second_weight: torch.Tensor, second_bias: torch.Tensor,
    last_weight: torch.Tensor, fragments: torch.Tensor,
    top: int, left: int, height: int, width: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Scores of the image from the levels' shares of the head's first layer.

    s1: [B, H, W, 8]; s2 to s4: 1/2, 1/8 and 1/32 of the size. Their sum and its SELU, two 3x3
    convolutions to 4 channels with SELU, the last to 1 with a sigmoid. fragments: the weights
    again, from `fragments.score_head`. Returns float32 [B, height, width] in [0, 1], from row `top`
    and column `left` on, and the zeros that `find_maxima` counts into.
    """
    if s1.dtype == torch.float32:
        x = conv3x3(blend(s1, s2, s3, s4), first_weight, first_bias)
        x = conv3x3(x, second_weight, second_bias)
        tally = s1.new_zeros((s1.shape[0], TALLY), dtype=torch.int32)
        return score_map(x, last_weight, top, left, height, width), tally
    scores, tally = _allocate(
        s1, s2, s3, s4, first_weight, first_bias, second_weight, second_bias, last_weight,
        fragments, top, left, height, width,
    )  # fmt: skip
    batch, *frame = s1.shape[:3]
    run = cuda_source.compiled(SOURCE, "score_head", CONSTANTS, s1.device)
    tensors = [s1, s2, s3, s4, fragments, first_bias, second_bias, scores, tally]
    run(grid(batch, height, frame[1]), BLOCK, [*tensors, *frame, top, left, height, width])
    return scores, tally
