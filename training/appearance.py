"""Photometric changes of whole batches on their device, each image by its own random amounts."""

import functools

import torch
import torch.nn.functional as F

from training.geometry import uniform
from training.settings import Appearance

BLUR_RADIUS = 4  # pixels
# ITU-T T.81, table K.1: the quantisation steps of JPEG's luminance at quality 50.
JPEG_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)


def change_appearance(
    images: torch.Tensor, limits: Appearance, generator: torch.Generator
) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] as another camera, light and file would have it, in 256 steps."""
    images = change_light(images, limits, generator)
    images = change_colour(images, limits, generator)
    images = blur(images, limits.blur, generator).clamp(0, 1)
    sigma = _per_image(images, 0, limits.noise, generator)
    images = images + sigma * torch.randn(images.shape, generator=generator, device=images.device)
    images = compress(images, limits.jpeg, generator)
    return (images.clamp(0, 1) * 255).round() / 255


def change_light(
    images: torch.Tensor, limits: Appearance, generator: torch.Generator
) -> torch.Tensor:
    """Gamma, contrast about the mean, brightness, and a smooth shading across the image."""
    images = (
        images.clamp(1e-4, 1) ** 2 ** _per_image(images, -limits.gamma, limits.gamma, generator)
    )
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = 2 ** _per_image(images, -limits.contrast, limits.contrast, generator)
    images = (images - mean) * contrast + mean
    images = images + _per_image(images, -limits.brightness, limits.brightness, generator)
    coarse = uniform(len(images), -limits.shading, limits.shading, generator, (1, 4, 4))
    coarse = coarse * _per_image(images, 0, 1, generator)
    shading = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=True)
    return images * (1 + shading)


def change_colour(
    images: torch.Tensor, limits: Appearance, generator: torch.Generator
) -> torch.Tensor:
    """Gain of each channel, saturation, and at times no colour at all."""
    count = len(images)
    images = images * uniform(count, 1 - limits.colour, 1 + limits.colour, generator, (3, 1, 1))
    grey = images.mean(dim=1, keepdim=True)
    saturation = _per_image(images, 0.4, 1.3, generator)
    saturation = saturation * (_per_image(images, 0, 1, generator) >= limits.grey)
    return grey + (images - grey) * saturation


def blur(images: torch.Tensor, limit: float, generator: torch.Generator) -> torch.Tensor:
    """Half the images through a Gaussian of random widths along two random axes, as by motion."""
    count, channels = images.shape[:2]
    along, across = (0.1 + limit * uniform(count, 0, 1, generator) ** 2 for _ in range(2))
    blurred = uniform(count, 0, 1, generator) < 0.5
    along, across = (torch.where(blurred, width, 0.1) for width in (along, across))
    angle = uniform(count, 0, torch.pi, generator)[:, None, None]
    steps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1.0, device=images.device)
    y, x = steps[:, None], steps[None, :]
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    kernels = (-((u / along[:, None, None]) ** 2 + (v / across[:, None, None]) ** 2) / 2).exp()
    kernels = kernels / kernels.sum(dim=(1, 2), keepdim=True)
    kernels = kernels.repeat_interleave(channels, dim=0)[:, None]
    padded = F.pad(images, (BLUR_RADIUS,) * 4, mode="replicate")
    return F.conv2d(padded.flatten(0, 1)[None], kernels, groups=len(kernels)).view_as(images)


def compress(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Round the 8x8 cosine transform of a `share` of the images as JPEG does, qualities 35 to 90.

    H and W are multiples of 8. Colours are compressed like brightness and at full resolution.
    """
    steps = jpeg_steps(images.device) / 255
    coarseness = _per_image(images, 0.2, 1.4, generator)[..., None, None]
    mean = images.mean(dim=1, keepdim=True)
    planes = torch.cat((mean, images - mean), dim=1)  # [B, 4, H, W]
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    basis = cosine_basis(images)
    quantum = steps * coarseness
    rounded = ((basis @ blocks @ basis.T) / quantum).round() * quantum
    planes = (basis.T @ rounded @ basis).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    chosen = _per_image(images, 0, 1, generator) < share
    return torch.where(chosen, planes[:, :1] + planes[:, 1:], images)


@functools.cache  # a copy to the device would wait for it at every step
def jpeg_steps(device: torch.device) -> torch.Tensor:
    """`JPEG_STEPS` on a device."""
    return torch.tensor(JPEG_STEPS, dtype=torch.float32, device=device)


def cosine_basis(like: torch.Tensor) -> torch.Tensor:
    """The orthonormal DCT-II of 8 samples, [8, 8], frequencies in rows."""
    n = torch.arange(8, device=like.device, dtype=like.dtype)
    basis = (torch.pi / 8 * (n + 0.5) * n[:, None]).cos() / 2
    return basis * torch.where(n == 0, 0.5**0.5, 1.0)[:, None]


def _per_image(
    images: torch.Tensor, low: float, high: float, generator: torch.Generator
) -> torch.Tensor:
    return uniform(len(images), low, high, generator, (1, 1, 1))
