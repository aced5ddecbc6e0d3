"""The two convolutional blocks: one CUDA C++ kernel each in half precision, else Triton's."""

import torch

from aliked.fused import cuda_source, launches
from aliked.fused.common import operator
from aliked.fused.conv import conv3x3, conv3x3_level
from aliked.fused.stem import stem

SOURCE = "blocks.cu"
POOL1, POOL2 = 2, 4


def constants(channels_in: int, level_weight: torch.Tensor) -> tuple[tuple[str, int], ...]:
    """The source's constants for one block."""
    channels, quarter = level_weight.shape
    return launches.build("blocks", IN=channels_in, OUT=channels, QUARTER=quarter)


def shape(kernel: str, kept: torch.Tensor) -> tuple[tuple, tuple]:
    """Grid and block of a kernel whose output is `kept`: a block per tile."""
    batch, height, width = kept.shape[:3]
    sizes = launches.grid(kernel, batch=batch, height=height, width=width)
    return sizes, launches.threads(kernel)


def _allocate1(
    images, stem_weight, stem_bias, weight, bias, level_weight, score_weight, fragments,
    height, width, top, left,
):  # fmt: skip
    batch, channels = images.shape[0], weight.shape[1]
    return (
        weight.new_empty((batch, height, width, channels)),
        weight.new_empty((batch, height // POOL1, width // POOL1, channels)),
        weight.new_empty((batch, height, width, 8)),
    )


@operator(_allocate1)
def block1(
    images: torch.Tensor, stem_weight: torch.Tensor, stem_bias: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, level_weight: torch.Tensor,
    score_weight: torch.Tensor, fragments: torch.Tensor,
    height: int, width: int, top: int, left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`stem`, then `conv3x3_level` without a shortcut and with means of 2x2 pixels.

    fragments: the weights again, from `fragments.block1`.
    """
    if weight.dtype == torch.float32:
        x = stem(images, stem_weight, stem_bias, height, width, top, left)
        return conv3x3_level(x, weight, bias, None, None, level_weight, score_weight, POOL1)
    outputs = _allocate1(
        images, stem_weight, stem_bias, weight, bias, level_weight, score_weight, fragments,
        height, width, top, left,
    )  # fmt: skip
    run = cuda_source.compiled(SOURCE, "block1", constants(3, level_weight), weight.device)
    sizes = (*images.shape[1:3], height, width, top, left)
    arguments = [images, fragments, stem_bias, bias, *outputs, *sizes]
    run(*shape("block1", outputs[0]), arguments)
    return outputs


def _allocate2(
    x, first_weight, first_bias, weight, bias, shortcut_weight, level_weight, score_weight,
    fragments,
):  # fmt: skip
    batch, height, width = x.shape[:3]
    return (
        x.new_empty((batch, height, width, level_weight.shape[1])),
        x.new_empty((batch, height // POOL2, width // POOL2, weight.shape[1])),
        x.new_empty((batch, height, width, 8)),
    )


@operator(_allocate2)
def block2(
    x: torch.Tensor, first_weight: torch.Tensor, first_bias: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, shortcut_weight: torch.Tensor,
    level_weight: torch.Tensor, score_weight: torch.Tensor, fragments: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`conv3x3`, then `conv3x3_level` with the input as shortcut and means of 4x4 pixels.

    fragments: the weights again, from `fragments.block2`.
    """
    if x.dtype == torch.float32:
        y = conv3x3(x, first_weight, first_bias)
        return conv3x3_level(y, weight, bias, x, shortcut_weight, level_weight, score_weight, POOL2)
    outputs = _allocate2(
        x, first_weight, first_bias, weight, bias, shortcut_weight, level_weight, score_weight,
        fragments,
    )  # fmt: skip
    run = cuda_source.compiled(SOURCE, "block2", constants(x.shape[3], level_weight), x.device)
    arguments = [x, fragments, first_bias, bias, *outputs, *x.shape[1:3]]
    run(*shape("block2", outputs[0]), arguments)
    return outputs
