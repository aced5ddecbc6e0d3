"""PyTorch, eager; and what the other backends that run through PyTorch share with it."""

from collections.abc import Callable

import numpy as np
import torch

from aliked.backends import Spec
from aliked.errors import InputError
from aliked.features import Features, check_image, features_of_batch
from aliked.model import ALIKED, Output, plain_float32, to_tensor
from aliked.ties import Expected, expect
from aliked.transfer import download, upload

OUTPUTS = ("keypoints", "descriptors", "scores")
Forward = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def unavailable() -> str | None:
    """PyTorch is a requirement of this module, so it always runs."""
    return None


def choose_device(device: str) -> torch.device:
    """ "auto" is the first CUDA device or the CPU; any other name must exist on this machine."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; give auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA "
            "devices; pass --device cpu, or install a CUDA build of PyTorch and a driver"
        )
    return chosen


def load_model(spec: Spec, device: torch.device) -> ALIKED:
    """The model that `spec` describes, on `device`."""
    return ALIKED.from_pretrained(
        spec.model,
        top_k=spec.top_k,
        scores_th=spec.scores_th,
        n_limit=spec.n_limit,
        weights=spec.weights,
        device=device,
        precision=spec.precision,
    )


def named(output: Output) -> dict[str, torch.Tensor]:
    """What every backend returns of a model's output."""
    return {name: getattr(output, name) for name in OUTPUTS}


def to_features(outputs: dict[str, torch.Tensor]) -> list[Features]:
    """Each image's `Features` of a batch's `named` outputs, once the device has them."""
    return features_of_batch(*download(outputs[name] for name in OUTPUTS))


class NamedOutputs(torch.nn.Module):
    """A model as a module that returns `named` outputs, for exporters."""

    def __init__(self, model: ALIKED):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        return named(self.model(images))


class ForwardExtractor:
    """A forward pass, float [B, 3, H, W] to `named` outputs, run by PyTorch on one device."""

    def __init__(self, name: str, device: torch.device, forward: Forward):
        self.name, self.device, self.forward = name, device, forward

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`."""
        check_image(image)
        return self.extract_batch(image[None])[0]

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB to each image's `Features`, copies included."""
        return to_features(self.infer(self.to_device(images)))

    def to_device(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] RGB to float32 [B, 3, H, W] in [0, 1] on the device."""
        return to_tensor(upload(images, self.device))

    @torch.inference_mode()
    def infer(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores` on the device."""
        with plain_float32():
            return self.forward(batch)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PyTorchExtractor(ForwardExtractor):
    """The eager model on one device."""

    def __init__(self, spec: Spec):
        device = choose_device(spec.device)
        self.model = load_model(spec, device)
        super().__init__(f"pytorch-{device.type}", device, lambda batch: named(self.model(batch)))

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`; in threshold mode no fill-in is described."""
        return self.model.extract(image)

    def expect(self, image: np.ndarray) -> Expected:
        """uint8 [H, W, 3] RGB to what other runtimes are compared with."""
        return expect(self.model, image)


create = PyTorchExtractor
