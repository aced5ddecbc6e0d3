"""An ALIKED model's weights in the layouts that the kernels read."""

from typing import NamedTuple

import torch
from torch import nn

from aliked.backbone import DeformableConv2d
from aliked.fused import fragments
from aliked.model import ALIKED


class Conv(NamedTuple):
    """A 3x3 convolution with its batch norm folded in."""

    weight: torch.Tensor  # [9 * CI, CO] (row, column, channel)
    bias: torch.Tensor  # [CO] float32


class Deform(NamedTuple):
    """A deformable 3x3 convolution with its batch norm folded in."""

    offset_weight: torch.Tensor  # [9 * CI, 18]
    offset_bias: torch.Tensor  # [18] float32
    weight: torch.Tensor  # [9 * CI, CO]
    bias: torch.Tensor  # [CO] float32
    fragments: torch.Tensor  # [., 256]: all that the half-precision kernel multiplies by


class Level(NamedTuple):
    """What reads a block's output at the same pixel."""

    level_weight: torch.Tensor  # [C, D / 4]
    score_weight: torch.Tensor  # [D / 4, 8]: this level's rows of the score head's first layer


class Offsets(NamedTuple):
    """What predicts the sample positions."""

    patch_weight: torch.Tensor  # [9 * D, 2 * M] (row, column, channel)
    patch_bias: torch.Tensor  # [2 * M] float32
    offset_weight: torch.Tensor  # [2 * M, 2 * M]
    offset_bias: torch.Tensor  # [2 * M] float32
    level_fragments: torch.Tensor  # [32, .] the first level's projection, by lane
    patch_fragments: torch.Tensor  # [., 256] both weights, as the half-precision kernel takes them


class Samples(NamedTuple):
    """What makes a descriptor of the features at the sample positions."""

    project_weight: torch.Tensor  # [D, D]
    aggregate_weight: torch.Tensor  # [M * D, D]
    level_fragments: torch.Tensor  # as in `Offsets`
    sample_fragments: torch.Tensor  # [., 128] both weights


class ScoreHead(NamedTuple):
    """The score head's 3x3 convolutions; the first layer is part of the levels."""

    first_weight: torch.Tensor  # [9 * 8, 4]
    first_bias: torch.Tensor  # [4] float32
    second_weight: torch.Tensor  # [9 * 4, 4]
    second_bias: torch.Tensor  # [4] float32
    last_weight: torch.Tensor  # [9 * 4, 1]
    fragments: torch.Tensor  # [15, 128]: all that the half-precision kernel multiplies by


class Descriptor(NamedTuple):
    """The descriptor head."""

    offsets: Offsets
    samples: Samples


class Weights(NamedTuple):
    """Everything, on one device, in float16 or float32; biases always in float32."""

    convs: tuple[Conv, Conv, Conv, Conv]  # of blocks 1 and 2
    blocks: tuple[torch.Tensor, torch.Tensor]  # [., 128]: `fragments` of both and levels
    deforms: tuple[Deform, Deform, Deform, Deform]  # of blocks 3 and 4
    shortcuts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [C, C'] of blocks 2 to 4
    levels: tuple[Level, Level, Level, Level]
    score_head: ScoreHead
    descriptor: Descriptor


def matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A convolution's weight [CO, CI, h, w] as [h * w * CI, CO]."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2)


def conv(layer: nn.Conv2d, shortcut: nn.Conv2d | None = None) -> Conv:
    """A layer and, added to its bias, the bias of the shortcut that joins its output."""
    bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
    return Conv(matrix(layer), bias if shortcut is None else bias + shortcut.bias)


def deform(
    layer: DeformableConv2d,
    shortcut: nn.Conv2d | None = None,
    projection: nn.Conv2d | None = None,
) -> Deform:
    """As `conv`, for a deformable layer and the projection of the level that it ends, if any."""
    offset, main = conv(layer.offset_conv), conv(layer.regular_conv, shortcut)
    below = () if shortcut is None else (matrix(shortcut), matrix(projection))
    return Deform(*offset, *main, fragments.deform(offset.weight, main.weight, *below))


def block_fragments(
    convs: tuple[Conv, ...], shortcut: torch.Tensor, levels: tuple[Level, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the half-precision kernels of the first two blocks read."""
    first, second, third, fourth = (item.weight for item in convs)
    return (
        fragments.block1(first, second, *levels[0]),
        fragments.block2(third, fourth, shortcut, *levels[1]),
    )


def score_head(model: ALIKED) -> ScoreHead:
    """The score head's weights."""
    first, second = conv(model.score_head[2]), conv(model.score_head[4])
    last = matrix(model.score_head[6])
    packed = fragments.score_head(first.weight, second.weight, last)
    return ScoreHead(*first, *second, last, packed)


def descriptor(model: ALIKED) -> Descriptor:
    """The descriptor head's weights."""
    first, _, second = model.desc_head.offset_conv
    patch_weight, offset_weight = matrix(first), matrix(second)
    project_weight = matrix(model.desc_head.sf_conv)
    aggregate_weight = model.desc_head.agg_weights.flatten(0, 1)
    level = fragments.first_level(matrix(model.conv1))
    patches = fragments.offsets(patch_weight, offset_weight)
    samples = fragments.samples(project_weight, aggregate_weight)
    return Descriptor(
        Offsets(patch_weight, first.bias, offset_weight, second.bias, level, patches),
        Samples(project_weight, aggregate_weight, level, samples),
    )


def convert(value, dtype: torch.dtype, device: torch.device):
    """Every tensor of a nested tuple on the device: vectors in float32, matrices in `dtype`."""
    if isinstance(value, torch.Tensor):
        dtype = torch.float32 if value.ndim == 1 else dtype
        return value.detach().to(device, dtype).contiguous()
    converted = [convert(item, dtype, device) for item in value]
    return type(value)(*converted) if hasattr(value, "_fields") else tuple(converted)


def pack(model: ALIKED, dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of a float32 model whose batch norms are folded (`ALIKED.from_pretrained`)."""
    blocks = (model.block1, model.block2, model.block3, model.block4)
    last = [getattr(block, "downsample", None) for block in blocks]
    first_layer = matrix(model.score_head[0]).unflatten(0, (4, -1))  # [4, D / 4, 8]
    projections = (model.conv1, model.conv2, model.conv3, model.conv4)
    convs = tuple(
        item
        for block, shortcut in zip(blocks[:2], last[:2], strict=True)
        for item in (conv(block.conv1), conv(block.conv2, shortcut))
    )
    levels = tuple(
        Level(matrix(projection), share)
        for projection, share in zip(projections, first_layer, strict=True)
    )
    weights = Weights(
        convs=convs,
        blocks=block_fragments(convs, matrix(last[1]), levels),
        deforms=tuple(
            item
            for block, shortcut, projection in zip(
                blocks[2:], last[2:], projections[2:], strict=True
            )
            for item in (deform(block.conv1), deform(block.conv2, shortcut, projection))
        ),
        shortcuts=tuple(matrix(shortcut) for shortcut in last[1:]),
        levels=levels,
        score_head=score_head(model),
        descriptor=descriptor(model),
    )
    return convert(weights, dtype, device)
