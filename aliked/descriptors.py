"""Sparse deformable descriptor head, SDDH (arXiv 2304.03608, section III-B).

Attribute names are those of the official state dicts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from aliked.backbone import conv1x1, longest_side
from aliked.configs import Form
from aliked.pyramid import Maps, Pyramid, patches_of, sample, size_of, windows_of


def linear(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A convolution over windows of its own size, [..., C * k * k] to [..., out].

    As a matrix product it also runs over no keypoints at all, which some runtimes' convolutions
    refuse.
    """
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class SDDH(nn.Module):
    """Describes each keypoint by features sampled at M positions predicted from its patch."""

    def __init__(self, dim: int, kernel_size: int, num_positions: int):
        super().__init__()
        self.kernel_size = kernel_size
        self.offset_conv = nn.Sequential(
            nn.Conv2d(dim, 2 * num_positions, kernel_size),
            nn.SELU(inplace=True),
            conv1x1(2 * num_positions, 2 * num_positions, bias=True),
        )
        self.sf_conv = conv1x1(dim, dim)
        self.agg_weights = nn.Parameter(torch.rand(num_positions, dim, dim))

    def sample_offsets(
        self, features: Maps, keypoints: torch.Tensor, method: str = "gridsample"
    ) -> torch.Tensor:
        """Offsets of the M sample positions from each keypoint: [B, K, M, 2] pixels, (x, y)."""
        limit = longest_side(size_of(features)) / 4
        # The patch is centred at the sub-pixel keypoint, truncated.
        patches = patches_of(features, keypoints.long(), self.kernel_size, method)
        size = self.offset_conv[0].weight[0].numel()  # in numbers, as in `detection.soft_argmax`
        hidden = F.selu(linear(self.offset_conv[0], patches.reshape(*keypoints.shape[:2], size)))
        offsets = linear(self.offset_conv[2], hidden).float().clamp(-limit, limit)
        # The first M channels are dx, the last M are dy.
        return offsets.unflatten(2, (2, self.agg_weights.shape[0])).transpose(2, 3)

    def forward(self, features: Maps, keypoints: torch.Tensor, form: Form) -> torch.Tensor:
        """Features of B images and keypoints [B, K, 2] in pixels to unit-length [B, K, D]."""
        if form.static:
            return self.convolve(features, keypoints, form)
        offsets = self.sample_offsets(features, keypoints, form.sampling)
        positions = keypoints[:, :, None] + offsets  # [B, K, M, 2]
        sampled = sample(features, positions.flatten(1, 2), form.sampling)
        sampled = F.selu(linear(self.sf_conv, sampled.transpose(1, 2)))  # [B, K * M, C]
        # Summing over positions and channels at once is one matrix product.
        weights = self.agg_weights.flatten(0, 1)  # [M * C, D]
        descriptors = sampled.reshape(*keypoints.shape[:2], weights.shape[0]) @ weights
        return F.normalize(descriptors.float(), dim=2)

    def convolve(self, features: Pyramid, keypoints: torch.Tensor, form: Form) -> torch.Tensor:
        """`forward` by convolutions along each keypoint's window and positions.

        They take features as they lie in memory where channels come last, which spares TensorRT two
        slow transpositions.
        """
        first, _, second = self.offset_conv
        windows = windows_of(features, keypoints.long(), self.kernel_size, form.sampling)
        hidden = F.conv2d(windows, first.weight.flatten(2).unsqueeze(2), first.bias)
        limit = longest_side(size_of(features)) / 4
        offsets = second(F.selu(hidden)).float().clamp(-limit, limit)  # [B, 2 * M, K, 1]
        offsets = offsets.transpose(1, 2).unflatten(2, (2, -1))[..., 0].transpose(2, 3)
        positions = keypoints[:, :, None] + offsets  # [B, K, M, 2]
        sampled = sample(features, positions.flatten(1, 2), form.sampling)
        sampled = F.selu(self.sf_conv(sampled.unflatten(2, positions.shape[1:3])))  # [B, C, K, M]
        weight = self.agg_weights.permute(2, 1, 0).unsqueeze(2)  # [D, C, 1, M]
        descriptors = F.conv2d(sampled, weight)[..., 0].transpose(1, 2)
        return F.normalize(descriptors.float(), dim=2)
