"""Square windows cut out of a map around integer centres, zeros outside the map."""

import torch


def get_patches(maps: torch.Tensor, centres: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a `size` x `size` window around every centre out of its map.

    maps: [B, C, H, W]; centres: [B, N, 2] integers, pixels, (x, y). A window of even size has
    one pixel more to the right and below. Returns [B, N, C, size, size] of the type of `maps`,
    zero wherever the window leaves the map (ALIKED, arXiv 2304.03608, section IV-B).
    """
    channels, height, width = maps.shape[1:]
    steps = torch.arange(size, device=maps.device) - (size - 1) // 2
    x = (centres[:, :, None, 0] + steps)[:, :, None, :]  # [B, N, 1, size]
    y = (centres[:, :, None, 1] + steps)[:, :, :, None]  # [B, N, size, 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # [B, N, size, size]
    # Clamping into the map and zeroing afterwards avoids a padded copy of the whole map.
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    index = index.flatten(1)[:, None].expand(-1, channels, -1)  # [B, C, N * size * size]
    values = maps.flatten(2).gather(2, index).unflatten(2, (-1, size, size))
    return (values * inside[:, None]).transpose(1, 2)
