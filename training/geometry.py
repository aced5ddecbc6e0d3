"""Random homographies, and pairs of views that they relate."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from training.settings import Geometry

SUPERSAMPLING = 2  # samples per pixel and direction: a view may be half the source's scale
SOURCE_SCALE = (0.7, 1.5)  # source pixels per pixel of the first view
LARGEST_VIEW = 1.2  # of the source's shorter side
HORIZON = 0.05  # the homogeneous denominator below which a point is as good as at infinity


class ViewPairs(NamedTuple):
    """Two views of each image, and how their pixels correspond."""

    first: torch.Tensor  # [B, 3, S, S] in [0, 1]
    second: torch.Tensor  # [B, 3, S, S]
    homography: torch.Tensor  # [B, 3, 3], pixels of `first` to pixels of `second`


def project(points: torch.Tensor, homography: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [B, N, 2] through [B, 3, 3]; also which of them are before the horizon, [B, N]."""
    image = points @ homography[:, :, :2].mT + homography[:, None, :, 2]
    depth = image[..., 2:]
    return image[..., :2] / depth.clamp(min=HORIZON), depth[..., 0] > HORIZON


def inside(points: torch.Tensor, size: int, border: float = 0.0) -> torch.Tensor:
    """Which of [B, N, 2] lie in a square image, at least `border` pixels from its edge."""
    return ((points >= border) & (points <= size - 1 - border)).all(dim=-1)


def uniform(
    count: int, low: float, high: float, generator: torch.Generator, shape: tuple[int, ...] = ()
) -> torch.Tensor:
    """[count, *shape] on the generator's device."""
    device = generator.device
    return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)


def matrices(rows: list[list[torch.Tensor | float]], like: torch.Tensor) -> torch.Tensor:
    """[B, 3, 3] from nine entries, numbers or [B]."""
    # Filled on the device: a copy from the host would wait for it.
    flat = [
        x if isinstance(x, torch.Tensor) else torch.full_like(like, x) for row in rows for x in row
    ]
    return torch.stack(flat, dim=1).unflatten(1, (3, 3))


def inverse(homography: torch.Tensor) -> torch.Tensor:
    """The inverses of [B, 3, 3], without `torch.linalg.inv`'s check, which waits for the device."""
    return torch.linalg.inv_ex(homography).inverse


def similarity(angle, scale_x, scale_y, x, y) -> torch.Tensor:
    """Stretch, then turn, then move: [B, 3, 3] from [B] each."""
    cos, sin = angle.cos(), angle.sin()
    rows = [[cos * scale_x, -sin * scale_y, x], [sin * scale_x, cos * scale_y, y], [0, 0, 1]]
    return matrices(rows, angle)


def random_homographies(
    count: int, limits: Geometry, share: float, generator: torch.Generator
) -> torch.Tensor:
    """[B, 3, 3] between two views whose coordinates run from -1 to 1.

    Each is as strong as a random part of `share` of the limits allows, so that mild and strong
    ones come together.
    """
    strength = share * uniform(count, 0.1, 1, generator)

    def draw(limit: float) -> torch.Tensor:
        return strength * uniform(count, -limit, limit, generator)

    scale, stretch = 2 ** draw(limits.scale), 2 ** (draw(limits.stretch) / 2)
    move = draw(limits.translation), draw(limits.translation)
    plane = similarity(draw(math.radians(limits.rotation)), scale * stretch, scale / stretch, *move)
    tilt = [[1, 0, 0], [0, 1, 0], [draw(limits.perspective), draw(limits.perspective), 1]]
    return plane @ matrices(tilt, scale)


def random_source_frames(
    count: int, size: int, source: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    """[B, 3, 3] from the first view's coordinates, -1 to 1, to pixels of a source (height, width).

    Upright within 15 degrees or, half the time, at any angle; mirrored half the time. No larger
    than `LARGEST_VIEW`, unless the least `SOURCE_SCALE` is.
    """
    height, width = source
    low, high = SOURCE_SCALE
    # A large view of a small source would show much of it twice, reflected.
    high = max(low, min(high, LARGEST_VIEW * min(source) / size))
    half = uniform(count, low, high, generator) * size / 2
    angle = uniform(count, -1, 1, generator)
    angle = angle * torch.where(uniform(count, 0, 1, generator) < 0.5, math.pi, math.pi / 12)
    mirror = uniform(count, -1, 1, generator).sign()
    x, y = (
        n / 2 + (n / 2 - half).clamp(min=0) * uniform(count, -1, 1, generator)
        for n in (width, height)
    )
    return similarity(angle, half * mirror, half, x, y)


def view(sources: torch.Tensor, to_source: torch.Tensor, size: int) -> torch.Tensor:
    """[B, 3, S, S] cut out of sources [B, 3, H, W]; `to_source` maps view pixels to theirs.

    Beyond its edges a source goes on mirrored, for both views alike.
    """
    fine = size * SUPERSAMPLING
    steps = (torch.arange(fine, device=sources.device) + 0.5) / SUPERSAMPLING - 0.5
    pixels = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
    positions, _ = project(pixels.expand(len(sources), -1, -1), to_source)
    height, width = sources.shape[-2:]
    x, y = positions[..., 0] * 2 / (width - 1) - 1, positions[..., 1] * 2 / (height - 1) - 1
    grid = torch.stack((x, y), dim=-1).unflatten(1, (fine, fine))
    samples = F.grid_sample(sources, grid, padding_mode="reflection", align_corners=True)
    return F.avg_pool2d(samples, SUPERSAMPLING)


def random_pairs(
    sources: torch.Tensor, size: int, limits: Geometry, share: float, generator: torch.Generator
) -> ViewPairs:
    """Two views of each source, float [B, 3, H, W] in [0, 1], `size` pixels square."""
    count = len(sources)
    motion = random_homographies(count, limits, share, generator)
    frame = random_source_frames(count, size, sources.shape[-2:], generator)
    step = 2 / (size - 1)
    to_unit = matrices([[step, 0, -1], [0, step, -1], [0, 0, 1]], sources[:, 0, 0, 0])
    first = view(sources, frame @ to_unit, size)
    second = view(sources, frame @ inverse(motion) @ to_unit, size)
    homography = inverse(to_unit) @ motion @ to_unit
    return ViewPairs(first, second, homography / homography[:, 2:, 2:])
