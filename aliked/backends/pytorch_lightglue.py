"""LightGlue alone, and two images to matches, in PyTorch: eager, compiled, as a CUDA graph."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from aliked.backends import Spec
from aliked.backends.pytorch import Captured, compiled, load_model
from aliked.lightglue import LightGlue, Output
from aliked.matching import TENSORS, Arrays, PairRuntime
from aliked.model import ALIKED, plain_float32, to_tensor
from aliked.transfer import choose_device, download

Sizes = tuple[tuple[int, int], tuple[int, int]]  # (width, height) of two images, pixels


class MatcherGraph(nn.Module):
    """The default contract: features of two images, padded to K rows, and masks, to `Output`.

    `keypoints` [B, K, 2] in pixels, `descriptors` [B, K, 128], `mask` bool [B, K], True for
    keypoints, `size` [B, 2], width and height in pixels; each with 0 and 1 behind its name.
    """

    input_names, output_names = TENSORS["matcher"]

    def __init__(self, matcher: LightGlue):
        super().__init__()
        self.matcher = matcher

    def forward(self, k0, d0, mask0, size0, k1, d1, mask1, size1) -> Output:
        """The outputs in the order of `output_names`."""
        return self.matcher(k0, d0, k1, d1, size0, size1, mask0, mask1)


class PairGraph(nn.Module):
    """Two images to the keypoints of each and their matches.

    `image0` and `image1` are float32 [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3] with
    `uint8_input`. Fill-ins have the score 0 and match nothing.
    """

    input_names, output_names = TENSORS["pair"]

    def __init__(
        self, model: ALIKED, matcher: LightGlue, uint8_input: bool, sizes: Sizes | None
    ) -> None:
        """`sizes` are each image's (width, height) where fixed; of one size both are a batch."""
        super().__init__()
        self.model, self.matcher, self.uint8_input = model, matcher, uint8_input
        self.together = sizes is not None and sizes[0] == sizes[1]
        for side in (0, 1):
            size = sizes and torch.tensor([sizes[side]], dtype=torch.float32)
            self.register_buffer(f"size{side}", size, persistent=False)

    def forward(self, image0: torch.Tensor, image1: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs in the order of `output_names`."""
        images = (image0, image1)
        if self.uint8_input:
            images = tuple(to_tensor(image) for image in images)
        sizes = (self.size0, self.size1)
        if self.size0 is None:
            sizes = (_size_of(image) for image in images)
        if self.together:
            output = self.model(torch.cat(images))
            outputs = zip(*(rows.chunk(2) for rows in output), strict=True)
        else:
            outputs = (self.model(image) for image in images)
        (k0, d0, _, best0, _), (k1, d1, _, best1, _) = outputs
        return k0, k1, *self.matcher(k0, d0, k1, d1, *sizes, best0 > 0, best1 > 0)


def _size_of(images: torch.Tensor) -> torch.Tensor:
    """Width and height of [B, 3, H, W], float32 [1, 2], from the shape."""
    height, width = images.shape[-2:]
    sides = [torch.as_tensor(side, dtype=torch.float32) for side in (width, height)]
    return torch.stack(sides)[None]


Forward = Callable[..., tuple[torch.Tensor, ...]]


FORMS: dict[str, Callable[[nn.Module, Spec], Forward]] = {
    "pytorch": lambda network, spec: network,
    "pytorch-compile": lambda network, spec: compiled(network, spec.compile_mode),
    "pytorch-cudagraph": lambda network, spec: Captured(network),
}


class TorchPairRuntime(PairRuntime):
    """A network that PyTorch runs on one device."""

    def __init__(
        self, name: str, device: torch.device, network: nn.Module, forward: Forward
    ) -> None:
        """`forward` is what runs the network: itself, or in one of `FORMS`."""
        self.name, self.device, self.torch_device = name, str(device), device
        self.network, self.forward = network, forward

    def to_device(self, inputs: Arrays) -> list[torch.Tensor | None]:
        """The inputs in the network's order; masks that hide nothing are left out."""
        arrays = [inputs[name] for name in self.network.input_names]
        whole = all(rows.all() for rows in arrays if rows.dtype == bool)
        return [
            None if whole and rows.dtype == bool else torch.from_numpy(rows).to(self.torch_device)
            for rows in arrays
        ]

    @torch.no_grad()
    def infer(self, batch: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The outputs by name; the next call may overwrite them."""
        with plain_float32():
            outputs = self.forward(*batch)
        return dict(zip(self.network.output_names, outputs, strict=True))

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""
        outputs = self.infer(self.to_device(inputs))
        return dict(zip(outputs, download(outputs.values()), strict=True))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)


def open_runtime(
    name: str, graph: str, spec: Spec, matcher_weights: Path | None, size: tuple[int, int]
) -> TorchPairRuntime:
    """The backend `name`, one of `FORMS`, for images of `size`, (width, height)."""
    device = choose_device(spec.device)
    matcher = LightGlue.from_pretrained(matcher_weights, device, spec.precision)
    if graph == "matcher":
        network = MatcherGraph(matcher)
    else:
        network = PairGraph(load_model(spec, device), matcher, True, (size, size)).to(device)
    return TorchPairRuntime(name, device, network, FORMS[name](network, spec))
