"""Convolutional blocks of ALIKED's encoder (arXiv 2304.03608, section III-A).

Attribute names are those of the official state dicts.
"""

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from aliked.patches import is_traced


def longest_side(size: tuple[int, int]) -> int | torch.Tensor:
    """The larger of height and width, kept symbolic where the model is traced or exported."""
    height, width = size
    if isinstance(height, torch.Tensor):  # where the model is traced; Python's max would freeze it
        return torch.maximum(height, width)
    if isinstance(height, int) and isinstance(width, int):
        return max(height, width)  # PyTorch 2.11 cannot compile `sym_max` of plain numbers
    return torch.sym_max(height, width)


def conv3x3(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)


def conv1x1(in_channels: int, out_channels: int, bias: bool = False) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)


def sampled_deform_conv2d(
    x: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """torchvision's `deform_conv2d` with a 3x3 kernel and padding 1, in PyTorch's own operators.

    x: [B, in, H, W]; offsets: [B, 18, H, W] pixels, (dy, dx) interleaved per tap; weight:
    [out, in, 3, 3]. Returns [B, out, H, W].
    """
    height, width = x.shape[-2:]
    dy, dx = offsets.unflatten(1, (9, 2)).unbind(2)  # [B, 9, H, W] each
    tap = torch.arange(9, device=x.device)[:, None, None]
    rows = torch.arange(height, device=x.device)[:, None] + tap // 3 - 1 + dy
    columns = torch.arange(width, device=x.device) + tap % 3 - 1 + dx
    # Outer edges at -1 and 1: with aligned corners a map of one pixel has no outside.
    grid = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), dim=-1)
    samples = F.grid_sample(x, grid.flatten(1, 2), mode="bilinear", align_corners=False)
    samples = samples.unflatten(2, (9, height)).flatten(1, 2)  # [B, in * 9, H, W]
    return F.conv2d(samples, weight.flatten(1)[..., None, None], bias)


class DeformableConv2d(nn.Module):
    """A 3x3 convolution that samples at learned offsets (Dai et al., arXiv 1703.06211), no mask."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.offset_conv = conv3x3(in_channels, 2 * 3 * 3, bias=True)
        self.regular_conv = conv3x3(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] to [B, out, H, W]; offsets are at most a quarter of the longer side.

        The operator computes its sampling positions in the type of its inputs, so it runs in
        float32 in a half-precision model too: `regular_conv` keeps float32 weights.
        """
        limit = longest_side(x.shape[-2:]) / 4
        offsets = self.offset_conv(x).float()  # (dy, dx) interleaved per tap
        offsets = offsets.clamp(-limit, limit)
        if not (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            offsets = offsets.nan_to_num()  # the operator reads where offsets point, NaN or not
        arguments = (x.float(), offsets, self.regular_conv.weight, self.regular_conv.bias)
        if x.is_cuda and off_default_stream(x.device):
            return sampled_deform_conv2d(*arguments).to(x.dtype)
        if x.device.type != "cpu" or torch.is_grad_enabled() or is_traced() or not has_operator():
            # Here, for it takes as long to import as PyTorch, and who reads weights does without.
            from torchvision.ops import deform_conv2d

            return deform_conv2d(*arguments, padding=1).to(x.dtype)
        images, offsets, weight, bias = arguments
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        no_mask = images.new_zeros(len(images), 1)
        ones = [1] * 8  # stride, padding, dilation, and groups of weights and of offsets
        found = torch.ops.torchvision.deform_conv2d(
            images, weight, offsets, no_mask, bias, *ones, False
        )
        return found.to(x.dtype)


@functools.cache
def has_operator() -> bool:
    """Whether torchvision's operators are there, its library loaded without its Python modules.

    Those take as long to import as PyTorch (torch._dynamo, which they import, most of it), and
    are for gradients, tracing and compiling.
    """
    if "torchvision" not in sys.modules and (spec := importlib.util.find_spec("torchvision")):
        for library in Path(spec.origin).parent.glob("_C*.so"):
            with contextlib.suppress(OSError):  # then torchvision says itself what is wrong
                torch.ops.load_library(library)
    return hasattr(torch.ops.torchvision, "deform_conv2d")


def off_default_stream(device: torch.device) -> bool:
    """Whether work on `device` goes, or may later go, to a stream other than the default one.

    Traced, compiled and exported models may; what a CUDA graph captures always does.

    torchvision's CUDA kernels run on the default stream, whatever the current one is: on another
    they race, and a CUDA graph lacks them (pytorch/vision issue 9513). On the default stream they
    are right, and have fewer launches than other operators, which is what eager PyTorch waits for.
    """
    return is_traced() or torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def fold(conv: nn.Module, norm: nn.BatchNorm2d) -> nn.Module:
    """`conv` followed by `norm` in evaluation mode, as one convolution of the same kind."""
    if isinstance(conv, DeformableConv2d):
        # The projection is linear in the samples, so the norm folds into it; the offsets stay.
        conv.regular_conv = fuse_conv_bn_eval(conv.regular_conv, norm)
        return conv
    return fuse_conv_bn_eval(conv, norm)


class ConvBlock(nn.Module):
    """Two convolutions, each with batch norm and SELU."""

    conv = staticmethod(conv3x3)

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.gate = nn.SELU(inplace=True)
        self.conv1 = self.conv(in_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = self.conv(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        x = self.gate(self.bn1(self.conv1(x)))
        return self.gate(self.bn2(self.conv2(x)))

    def fold_batch_norm(self) -> None:
        """Fold both batch norms into their convolutions, for inference only."""
        self.conv1, self.bn1 = fold(self.conv1, self.bn1), nn.Identity()
        self.conv2, self.bn2 = fold(self.conv2, self.bn2), nn.Identity()


class ResBlock(ConvBlock):
    """A `ConvBlock` with a 1x1-projected shortcut added before the last SELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)
        self.downsample = conv1x1(in_channels, out_channels, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in, H, W] to [B, out, H, W]."""
        out = self.gate(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.gate(out + self.downsample(x))


class DeformableResBlock(ResBlock):
    """A `ResBlock` whose two 3x3 convolutions are deformable."""

    conv = DeformableConv2d
