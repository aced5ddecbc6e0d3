"""An ALIKED model's weights in the layouts that the kernels read."""

from typing import NamedTuple

import torch
from torch import nn

from aliked.backbone import DeformableConv2d
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


class Level(NamedTuple):
    """What reads a block's output at the same pixel."""

    level_weight: torch.Tensor  # [C, D / 4]
    score_weight: torch.Tensor  # [D / 4, 8]: this level's rows of the score head's first layer


class Descriptor(NamedTuple):
    """The descriptor head."""

    patch_weight: torch.Tensor  # [9 * D, 2 * M] (row, column, channel)
    patch_bias: torch.Tensor  # [2 * M] float32
    offset_weight: torch.Tensor  # [2 * M, 2 * M]
    offset_bias: torch.Tensor  # [2 * M] float32
    project_weight: torch.Tensor  # [D, D]
    aggregate_weight: torch.Tensor  # [M * D, D]


class Weights(NamedTuple):
    """Everything, on one device, in float16 or float32; biases always in float32."""

    convs: tuple[Conv, Conv, Conv, Conv]  # of blocks 1 and 2
    deforms: tuple[Deform, Deform, Deform, Deform]  # of blocks 3 and 4
    shortcuts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # [C, C'] of blocks 2 to 4
    levels: tuple[Level, Level, Level, Level]
    score_convs: tuple[Conv, Conv, torch.Tensor]  # 8 to 4, 4 to 4, and 4 to 1 as [36, 1]
    descriptor: Descriptor


def matrix(conv: nn.Conv2d) -> torch.Tensor:
    """A convolution's weight [CO, CI, h, w] as [h * w * CI, CO]."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2)


def conv(layer: nn.Conv2d, shortcut: nn.Conv2d | None = None) -> Conv:
    """A layer and, added to its bias, the bias of the shortcut that joins its output."""
    bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
    return Conv(matrix(layer), bias if shortcut is None else bias + shortcut.bias)


def deform(layer: DeformableConv2d, shortcut: nn.Conv2d | None = None) -> Deform:
    """As `conv`, for a deformable layer."""
    return Deform(*conv(layer.offset_conv), *conv(layer.regular_conv, shortcut))


def descriptor(model: ALIKED) -> Descriptor:
    """The descriptor head's weights."""
    first, _, second = model.desc_head.offset_conv
    return Descriptor(
        matrix(first),
        first.bias,
        matrix(second),
        second.bias,
        matrix(model.desc_head.sf_conv),
        model.desc_head.agg_weights.flatten(0, 1),
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
    weights = Weights(
        convs=tuple(
            item
            for block, shortcut in zip(blocks[:2], last[:2], strict=True)
            for item in (conv(block.conv1), conv(block.conv2, shortcut))
        ),
        deforms=tuple(
            item
            for block, shortcut in zip(blocks[2:], last[2:], strict=True)
            for item in (deform(block.conv1), deform(block.conv2, shortcut))
        ),
        shortcuts=tuple(matrix(shortcut) for shortcut in last[1:]),
        levels=tuple(
            Level(matrix(projection), share)
            for projection, share in zip(projections, first_layer, strict=True)
        ),
        score_convs=(
            conv(model.score_head[2]),
            conv(model.score_head[4]),
            matrix(model.score_head[6]),
        ),
        descriptor=descriptor(model),
    )
    return convert(weights, dtype, device)
