"""Bilinear sampling of maps at pixel positions."""

import torch
import torch.nn.functional as F


def bilinear_sample(
    maps: torch.Tensor, positions: torch.Tensor, method: str = "gridsample"
) -> torch.Tensor:
    """Interpolate every map at its positions, zeros outside.

    maps: [B, C, H, W]; positions: [B, N, 2] float32, pixels, (x, y), centre of the top-left
    pixel = (0, 0). Returns [B, C, N] of the type of `maps`. `method` is "gridsample", one
    operator and the faster in PyTorch, or "gather", look-ups and arithmetic for runtimes that
    lack that operator or run it wrongly.
    """
    return SAMPLERS[method](maps, positions)


def sample_by_gridsample(maps: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`bilinear_sample` by the operator of that name."""
    height, width = maps.shape[-2:]
    x = positions[..., 0] * 2 / (width - 1) - 1
    y = positions[..., 1] * 2 / (height - 1) - 1
    grid = torch.stack((x, y), dim=-1)[:, :, None]  # [B, N, 1, 2], in [-1, 1]
    # Half-precision positions are up to a quarter of a pixel off at width 1024.
    sampled = F.grid_sample(maps.float(), grid, mode="bilinear", align_corners=True)
    return sampled[..., 0].to(maps.dtype)


def sample_by_gather(maps: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`bilinear_sample` by looking up the four pixels around each position."""
    batch, _, height, width = maps.shape
    pixels = maps.permute(0, 2, 3, 1).flatten(0, 2)  # [B * H * W, C]
    first = torch.arange(batch, device=maps.device)[:, None] * (height * width)
    columns = neighbours(positions[..., 0], width)
    terms = []
    for row, row_weight in neighbours(positions[..., 1], height):
        for column, column_weight in columns:
            values = F.embedding(first + row * width + column, pixels)  # [B, N, C]
            terms.append(values * (row_weight * column_weight)[..., None].to(maps.dtype))
    return sum(terms).transpose(1, 2)


def neighbours(
    position: torch.Tensor, length: int | torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Index and weight of both pixels around each position, along an axis of `length` pixels.

    A pixel outside has weight 0 and the index of the nearest inside.
    """
    position = position.clamp(-1, length)  # far positions would leave the type of the indices
    low = position.floor()
    pairs = []
    for pixel, other in ((low, low + 1), (low + 1, low)):
        nominal = pixel.long()
        index = nominal.clamp(0, length - 1)
        pairs.append((index, (position - other).abs() * (index == nominal)))
    return pairs


SAMPLERS = {"gather": sample_by_gather, "gridsample": sample_by_gridsample}
