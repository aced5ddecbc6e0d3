"""Features of an image as four small levels, evaluated at single pixels.

The published network resizes every level to the image's size, concatenates them and scales every
pixel to unit length (arXiv 2304.03608, section III-A). A descriptor looks at 9 + 4 * M pixels
around its keypoint, so the full map need not exist: it is evaluated at these pixels alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from aliked.patches import get_patches
from aliked.sampling import bilinear_sample


class Frame(NamedTuple):
    """Where the image lies in the padded frame that the network sees, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Pyramid(NamedTuple):
    """Features of the padded frame, [B, D / 4, h, w] per level, and where the image lies in it.

    Level 1 has the frame's resolution; the centres of all levels' corner pixels coincide.
    """

    levels: tuple[torch.Tensor, ...]
    frame: Frame


Maps = torch.Tensor | Pyramid  # unit-length features [B, D, H, W], or what they are made of


def size_of(features: Maps) -> tuple[int, int]:
    """Height and width of the image, in pixels."""
    return features.frame[2:] if isinstance(features, Pyramid) else features.shape[-2:]


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """[B, D, ...] with the D values of every place scaled to length 1."""
    # The squares of half-precision features can leave the type's range: sum them in float32.
    norms = torch.linalg.vector_norm(features.float(), dim=1, keepdim=True)
    return features / norms.clamp(min=1e-6).to(features.dtype)


def patches_of(features: Maps, centres: torch.Tensor, size: int, method: str) -> torch.Tensor:
    """`get_patches` of the unit-length features: centres [B, K, 2] to [B, K, D, size, size]."""
    if not isinstance(features, Pyramid):
        return get_patches(features, centres, size)
    windows = windows_of(features, centres, size, method)
    return windows.transpose(1, 2).unflatten(3, (size, size))


def windows_of(features: Pyramid, centres: torch.Tensor, size: int, method: str) -> torch.Tensor:
    """The patches with channels first and pixels row by row: [B, D, K, size * size]."""
    steps = torch.arange(size, device=centres.device) - (size - 1) // 2
    x = (centres[:, :, :1] + steps.repeat(size)).float()  # [B, K, size * size]
    y = (centres[:, :, 1:] + steps.repeat_interleave(size)).float()
    pixels, inside = features_at(features, x, y, method)
    return pixels * inside[:, None]


def sample(features: Maps, positions: torch.Tensor, method: str) -> torch.Tensor:
    """`bilinear_sample` of the unit-length features: positions [B, N, 2] to [B, D, N]."""
    if not isinstance(features, Pyramid):
        return bilinear_sample(features, positions, method)
    low = positions.floor()
    fraction = (positions - low)[..., None]  # [B, N, 2, 1]
    right, down = fraction.unbind(2)  # [B, N, 1]
    corner = torch.arange(4, device=positions.device)  # (y, x), row by row
    x, y = low[..., :1] + corner % 2, low[..., 1:] + corner // 2  # [B, N, 4]
    weights = torch.cat((1 - right, right), 2).repeat(1, 1, 2)
    weights = weights * torch.cat((1 - down, 1 - down, down, down), 2)
    pixels, inside = features_at(features, x, y, method)
    return (pixels * (weights * inside)[:, None].to(pixels.dtype)).sum(dim=3)


def features_at(
    pyramid: Pyramid, x: torch.Tensor, y: torch.Tensor, method: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length features at pixels, and which of these are inside the image.

    x and y: [B, N, P] whole numbers in float32, pixels. Returns [B, D, N, P] and bool [B, N, P];
    what is outside has the features of the nearest pixel inside.
    """
    top, left, height, width = pyramid.frame
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.clamp(0, width - 1) + left, y.clamp(0, height - 1) + top
    features = READERS[method](pyramid.levels, x.flatten(1), y.flatten(1))
    return unit_length(features).unflatten(2, x.shape[1:]), inside


def read_by_gridsample(
    levels: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """All levels at pixels [B, N] of the frame, [B, D, N]."""
    height, width = levels[0].shape[-2:]
    grid = torch.stack((x * 2 / (width - 1) - 1, y * 2 / (height - 1) - 1), dim=-1)[:, :, None]
    modes = ("nearest", *["bilinear"] * (len(levels) - 1))  # level 1 is read at its own pixels
    parts = [
        F.grid_sample(level.float(), grid, mode=mode, align_corners=True).to(level.dtype)
        for level, mode in zip(levels, modes, strict=True)
    ]
    return torch.cat(parts, dim=1)[..., 0]


def read_by_gather(
    levels: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Sample by looking up the four pixels of each level around each pixel of the frame."""
    height, width = levels[0].shape[-2:]
    parts = []
    for level in levels:
        h, w = level.shape[-2:]
        place = torch.stack((x * (w - 1) / (width - 1), y * (h - 1) / (height - 1)), dim=-1)
        parts.append(bilinear_sample(level, place, "gather"))
    return torch.cat(parts, dim=1)


READERS = {"gather": read_by_gather, "gridsample": read_by_gridsample}
