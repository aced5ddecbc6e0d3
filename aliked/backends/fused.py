"""The fused GPU kernels of `aliked.fused`, one CUDA graph per image size and batch."""

import functools
import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from aliked.backends import Spec
from aliked.backends.pytorch import choose_device, named, to_features
from aliked.errors import InputError
from aliked.features import Features, check_image
from aliked.model import ALIKED, PRECISIONS
from aliked.transfer import upload

COMPILES = True
MAX_PLANS = 16  # sizes whose buffers are kept; the one unused for longest makes room


def unavailable() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; the fused kernels run on NVIDIA GPUs only"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install triton"
    return None


class Plan(NamedTuple):
    """A captured run: replaying the graph reads `images` and overwrites `outputs`."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    outputs: dict[str, torch.Tensor]


class FusedExtractor:
    """One model on one GPU. The first image of each size waits for a capture, the next do not."""

    name = "fused"

    def __init__(self, spec: Spec):
        from aliked.fused import kernels, pipeline, weights

        self.device = choose_device(spec.device)
        if self.device.type != "cuda":
            raise InputError(f"device {spec.device} was asked for; the fused kernels need cuda")
        if spec.precision not in PRECISIONS:
            choices = " or ".join(PRECISIONS)
            raise InputError(f"unknown precision {spec.precision!r}; choose {choices}")
        selection = pipeline.Selection(spec.top_k, spec.scores_th, spec.n_limit)
        model = ALIKED.from_pretrained(spec.model, *selection, weights=spec.weights)
        packed = weights.pack(model, PRECISIONS[spec.precision], self.device)
        self.run = functools.partial(
            pipeline.extract, weights=packed, selection=selection, ops=kernels
        )
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()

    def __call__(self, image: np.ndarray) -> Features:
        """uint8 [H, W, 3] RGB to `Features`."""
        check_image(image)
        return self.extract_batch(image[None])[0]

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """uint8 [B, H, W, 3] RGB to each image's `Features`, copies included."""
        upload_into = functools.partial(upload, images, self.device)
        return to_features(self._run(images, np.uint8, upload_into))

    def to_device(self, images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] RGB to the same on the device."""
        return upload(images, self.device)

    def infer(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [B, H, W, 3], wherever it is, to `keypoints`, `descriptors` and `scores`.

        All three are on the device; the next call for the same size on the same stream overwrites
        them. Leave a page-locked batch alone until `synchronize`: it may be read after the return.
        """
        return self._run(batch, torch.uint8, lambda out: out.copy_(batch, non_blocking=True))

    def _run(
        self,
        batch: np.ndarray | torch.Tensor,
        byte: type | torch.dtype,
        copy_into: Callable[[torch.Tensor], object],
    ) -> dict[str, torch.Tensor]:
        """The outputs for `batch`, of the type `byte` lest a value be NaN, after its copy."""
        if batch.dtype != byte or batch.ndim != 4 or batch.shape[3] != 3:
            raise InputError(
                f"the batch is {batch.dtype} {list(batch.shape)}; give uint8 [B, H, W, 3]"
            )
        with torch.cuda.device(self.device):
            plan = self._plan(tuple(batch.shape))
            copy_into(plan.images)
            plan.graph.replay()
        return plan.outputs

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.device)

    def _plan(self, shape: tuple) -> Plan:
        """The plan for a batch's shape on the current stream, captured when it is new."""
        key = (shape, torch.cuda.current_stream().cuda_stream)
        if key not in self.plans:
            self._make_room()
            self.plans[key] = self._capture(shape)
        self.plans.move_to_end(key)
        return self.plans[key]

    def _make_room(self) -> None:
        """Drop the plan unused for longest, once nothing on the device can still be in it."""
        if len(self.plans) >= MAX_PLANS:
            torch.cuda.synchronize()
            self.plans.popitem(last=False)

    @torch.no_grad()  # inference mode would bind every call: it alone may write to its tensors
    def _capture(self, shape: tuple) -> Plan:
        """Run once, which compiles the kernels, then capture the same run as a graph."""
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        self.run(images)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = named(self.run(images))
        return Plan(graph, images, outputs)


create = FusedExtractor
