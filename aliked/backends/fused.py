"""The fused GPU kernels of `aliked.fused`, one CUDA graph per image size and batch."""

import contextlib
import functools
import importlib.util
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch

from aliked import gpu
from aliked.backends import Spec
from aliked.backends.cuda_memory import Twin
from aliked.backends.pytorch import capture, load_model, named
from aliked.errors import InputError
from aliked.features import (
    OUTPUTS,
    Extractor,
    Features,
    check_images,
    features_of_batch,
    room_for,
)
from aliked.model import dtype_of
from aliked.transfer import choose_device, page_locked, upload

MAX_PLANS = 16  # sizes whose buffers are kept; the one unused for longest makes room


def twin_of(tensor: torch.Tensor) -> Twin:
    """Page-locked memory of a contiguous tensor's shape and type."""
    shape, address = tuple(tensor.shape), tensor.data_ptr()
    return Twin(address, shape, tensor.nbytes, lambda: page_locked(tensor).numpy())


@dataclass(frozen=True)
class Plan:
    """A captured run: replaying the graph reads `images` and overwrites `outputs`."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    outputs: dict[str, torch.Tensor]
    stream: int  # where it runs, a CUDA stream handle

    @functools.cached_property
    def staged(self) -> Twin:
        """What sends images to the device, from the first use on."""
        return twin_of(self.images)

    @functools.cached_property
    def results(self) -> list[Twin]:
        """Page-locked memory for outputs on their way home."""
        return [twin_of(self.outputs[name]) for name in OUTPUTS]


class FusedExtractor(Extractor):
    """One model on one GPU. The first image of each size waits for a capture, the next do not.

    Not for several threads at once.
    """

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why the kernels cannot run here, or None."""
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device; the fused kernels run on NVIDIA GPUs only"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; pip install triton"
        return None

    def __init__(self, spec: Spec, name: str = "fused"):
        from aliked.fused import kernels, pipeline, weights  # here, as it imports triton

        self.name = name
        chosen = choose_device(spec.device, "cuda")
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
        self.torch_device = torch.device("cuda", index)
        self.device = str(self.torch_device)
        dtype = dtype_of(spec.precision)
        self.selection = spec.selection
        model = load_model(replace(spec, precision="fp32"), torch.device("cpu"))
        with torch.cuda.device(self.torch_device):
            packed = weights.pack(model, dtype, self.torch_device)
            self.context = gpu.Context()
        self.run = functools.partial(
            pipeline.extract, weights=packed, selection=self.selection, ops=kernels
        )
        self.plans: OrderedDict[tuple, Plan] = OrderedDict()

    def extract_batch(self, images: np.ndarray) -> list[Features]:
        """Return each image's `Features` of uint8 [B, H, W, 3] RGB, copies included."""
        check_images(images)
        with self.context:
            plan = self._plan(images)
            sent = plan.staged.send(images, plan.stream)
            plan.graph.replay()
            outputs = [output.fetch(plan.stream) for output in plan.results]
            rooms = None  # where a threshold decides, few of the rows are keypoints
            if not self.selection.by_threshold:
                rooms = [room_for(*image) for image in zip(*outputs, strict=True)]
            gpu.wait(plan.stream)
            del sent  # it could be read until now
        return features_of_batch(*outputs, rooms)

    def to_device(self, images: np.ndarray) -> torch.Tensor:
        """Return uint8 [B, H, W, 3] RGB on the device."""
        check_images(images)
        return upload(images, self.torch_device)

    def infer(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `keypoints`, `descriptors` and `scores` of uint8 [B, H, W, 3], wherever it is.

        All three are on the device; the next call for the same size on the same stream overwrites
        them. Leave a page-locked batch alone until `synchronize`: it may be read after the return.
        """
        if batch.dtype != torch.uint8:  # an array's is another, whatever it holds
            raise self._refused(batch)
        with self.context:
            plan = self._plan(batch)
            if batch.device == self.torch_device and batch.is_contiguous():
                gpu.copy_async(plan.images.data_ptr(), batch.data_ptr(), batch.nbytes, plan.stream)
            else:
                plan.images.copy_(batch, non_blocking=True)
            plan.graph.replay()
        return plan.outputs

    def _refused(self, batch: np.ndarray | torch.Tensor) -> InputError:
        return InputError(
            f"the batch is {batch.dtype} {list(batch.shape)}; give uint8 [B, H, W, 3]"
        )

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.torch_device)

    def _plan(self, batch: np.ndarray | torch.Tensor) -> Plan:
        """Return the plan for a batch's shape on the current stream, captured when it is new."""
        if batch.ndim != 4 or batch.shape[3] != 3:
            raise self._refused(batch)
        # Not public; the public way makes an object first, which takes longer than the launch.
        stream = torch._C._cuda_getCurrentRawStream(self.torch_device.index)
        key = (tuple(batch.shape), stream)
        plan = self.plans.get(key)
        if plan is None:
            self._make_room()
            plan = self.plans[key] = self._capture(*key)
        with contextlib.suppress(KeyError):  # another thread may have dropped it by now
            self.plans.move_to_end(key)
        return plan

    def _make_room(self) -> None:
        """Drop the plan unused for longest, once nothing on the device can still be in it."""
        if len(self.plans) >= MAX_PLANS:
            with gpu.CAPTURE:
                torch.cuda.synchronize()
                self.plans.popitem(last=False)

    @torch.no_grad()  # inference mode would bind every call: it alone may write to its tensors
    def _capture(self, shape: tuple, stream: int) -> Plan:
        images = torch.zeros(shape, dtype=torch.uint8, device=self.torch_device)
        graph, output = capture(functools.partial(self.run, images))
        return Plan(graph, images, named(output), stream)
