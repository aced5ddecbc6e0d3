"""Random models and images for the fused operators, and the calls that they lead to."""

from dataclasses import astuple

import torch

from aliked.fused import pipeline, reference, trace, weights
from aliked.model import ALIKED


def random_model(name, selection):
    torch.manual_seed(0)
    return ALIKED(name, *astuple(selection)).eval().fold_batch_norm().requires_grad_(False)


def random_images(batch, height, width):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // 4 + 1, width // 4 + 1, generator=generator)
    fine = torch.rand(batch, 3, height, width, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width)) + fine
    return (images * 127).byte().permute(0, 2, 3, 1).contiguous()


def record(name, selection, images, dtype):
    """Every operator call of one image, with the twins' results."""
    packed = weights.pack(random_model(name, selection), dtype, images.device)
    recorder = trace.Recorder(reference)
    pipeline.extract(images, packed, selection, recorder)
    return recorder.calls
