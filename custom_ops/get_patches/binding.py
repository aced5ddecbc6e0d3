"""The operator in Python: its function, shapes and derivative. Its library has to be loaded."""

import torch

_operator = torch.ops.aliked.get_patches.default

# The types of device that the library was compiled for.
# Not a public function, but the same in PyTorch 2.11 and 2.14.
DEVICES = tuple(
    device
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key("aliked::get_patches", device.upper())
)


def get_patches(maps: torch.Tensor, centres: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a `size` x `size` window around every centre out of its map.

    maps: [B, C, H, W] of any strides and any type of up to 8 bytes; centres: [B, N, 2] integers,
    pixels, (x, y). A window of even size has one pixel more to the right and below. Returns
    [B, N, C, size, size], contiguous, zero wherever the window leaves the map. Without B in both
    inputs, without B in the result. `ValueError` for other types and shapes.
    """
    if maps.dim() == 3 and centres.dim() == 2:
        return _operator(maps[None], centres[None], size)[0]
    return _operator(maps, centres, size)


@torch.library.register_fake("aliked::get_patches")
def _shape(maps: torch.Tensor, centres: torch.Tensor, size: int) -> torch.Tensor:
    return maps.new_empty((maps.shape[0], centres.shape[1], maps.shape[1], size, size))


def _keep(ctx, inputs: tuple, output: torch.Tensor) -> None:
    maps, centres, ctx.size = inputs
    ctx.save_for_backward(centres)
    ctx.shape = maps.shape


def _backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """Add the gradient of every element, [B, N, C, size, size], to the pixel it was copied from."""
    (centres,) = ctx.saved_tensors
    batch, channels, height, width = ctx.shape
    # Patches of the pixels' own numbers say where elements came from: from 1, 0 is outside.
    numbers = torch.arange(1, height * width + 1, device=gradient.device)
    numbers = numbers.view(1, 1, height, width).expand(batch, -1, -1, -1)
    source = _operator(numbers, centres, ctx.size).transpose(1, 2).flatten(2)
    sums = gradient.new_zeros((batch, channels, height * width + 1))
    sums = sums.scatter_add(2, source.expand(-1, channels, -1), gradient.transpose(1, 2).flatten(2))
    return sums[:, :, 1:].unflatten(2, (height, width)), None, None


torch.library.register_autograd("aliked::get_patches", _backward, setup_context=_keep)
