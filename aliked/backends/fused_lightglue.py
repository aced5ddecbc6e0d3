"""From two images to matches on one GPU: the fused kernels and LightGlue as one CUDA graph."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aliked.backends import Spec
from aliked.backends.fused import FusedExtractor
from aliked.backends.pytorch import Captured, capture
from aliked.backends.pytorch_lightglue import MatcherGraph, TorchPairRuntime
from aliked.configs import get_config
from aliked.errors import InputError
from aliked.features import check_image
from aliked.lightglue import LightGlue
from aliked.lightglue import Output as Matched
from aliked.matching import Arrays, PairMatches, PairRuntime, matches_of_rows
from aliked.model import Output
from aliked.transfer import choose_device, download, upload


class Found(NamedTuple):
    """What was found in two images, on the device."""

    keypoints: tuple[torch.Tensor, torch.Tensor]  # [1, K, 2] each, pixels
    descriptors: tuple[torch.Tensor, torch.Tensor]  # [1, K, D] each
    scores: tuple[torch.Tensor, torch.Tensor]  # [1, K] each, 0 for fill-ins


def find(extract: Callable[[torch.Tensor], Output], images: Sequence[torch.Tensor]) -> Found:
    """Features of two images, uint8 [1, H, W, 3], or of one batch of two."""
    if len(images) == 1:
        output = extract(images[0])
        sides = zip(*(rows.chunk(2) for rows in output[:3]), strict=True)
    else:
        sides = (extract(image)[:3] for image in images)
    return Found(*zip(*sides, strict=True))


def match(
    matcher: Callable[..., Matched], found: Found, sizes: Sequence[torch.Tensor], masked: bool
) -> Matched:
    """Matches of what was found; `sizes` [1, 2] are each image's width and height.

    `masked` leaves out fill-ins. Without, attention needs no mask and is faster, and what it gives
    is right only where there are no fill-ins.
    """
    (k0, k1), (d0, d1) = found.keypoints, found.descriptors
    masks = [scores > 0 for scores in found.scores] if masked else [None, None]
    return matcher(k0, d0, k1, d1, *sizes, *masks)


def pack(found: Found, matched: Matched) -> torch.Tensor:
    """Keypoints, scores and matches in one float32 tensor, so that one copy brings them home."""
    parts = (*found.keypoints, *found.scores, matched.scores0, matched.matches0.int())
    return torch.cat([part.flatten().view(torch.float32) for part in parts])


class Unpacked(NamedTuple):
    """The arrays of a packed result, which share its memory."""

    keypoints0: np.ndarray  # [K0, 2]
    keypoints1: np.ndarray  # [K1, 2]
    scores0: np.ndarray  # [K0]
    scores1: np.ndarray  # [K1]
    match_scores: np.ndarray  # [K0]
    partners: np.ndarray  # [K0] int32

    @property
    def has_fill_ins(self) -> bool:
        """Whether an image had fewer keypoints than rows."""
        return not (self.scores0.all() and self.scores1.all())


def unpack(packed: np.ndarray, counts: tuple[int, int]) -> Unpacked:
    """What `pack` packed of images with `counts` rows."""
    first, second = counts
    sizes = (2 * first, 2 * second, first, second, first, first)
    k0, k1, s0, s1, scores, partners = np.split(packed, np.cumsum(sizes)[:-1])
    return Unpacked(k0.reshape(-1, 2), k1.reshape(-1, 2), s0, s1, scores, partners.view(np.int32))


class Plan:
    """Captured runs for two sizes of images: replaying reads `images` and overwrites `packed`."""

    def __init__(self, pair: "FusedPair", shapes: Sequence[tuple[int, ...]]) -> None:
        device = pair.torch_device
        together = shapes[0] == shapes[1]
        batches = [(2, *shapes[0])] if together else [(1, *shape) for shape in shapes]
        self.batches = [torch.zeros(shape, dtype=torch.uint8, device=device) for shape in batches]
        self.images = self.batches[0].split(1) if together else self.batches
        self.sizes = [
            torch.tensor([[width, height]], dtype=torch.float32, device=device)
            for height, width, _ in shapes
        ]
        self.matcher = pair.matcher
        self.masked: torch.cuda.CUDAGraph | None = None
        self.graph, (self.found, self.matched, self.packed) = capture(
            functools.partial(self._run, pair.extract)
        )
        self.counts = tuple(scores.shape[1] for scores in self.found.scores)

    def _run(
        self, extract: Callable[[torch.Tensor], Output]
    ) -> tuple[Found, Matched, torch.Tensor]:
        found = find(extract, self.batches)
        matched = match(self.matcher, found, self.sizes, masked=False)
        return found, matched, pack(found, matched)

    def _run_masked(self) -> torch.Tensor:
        matched = match(self.matcher, self.found, self.sizes, masked=True)
        return self.packed.copy_(pack(self.found, matched))

    def match_masked(self) -> None:
        """Match what the last replay found once more, without its fill-ins."""
        if self.masked is None:
            self.masked, _ = capture(self._run_masked)
        self.masked.replay()


def open_matcher(precision: str, weights: str | Path | None, device: torch.device) -> LightGlue:
    """LightGlue as it is fastest in a CUDA graph: with merged kernels in half precision."""
    if precision == "fp32":
        return LightGlue.from_pretrained(weights, device)
    from aliked.fused.lightglue import FusedLightGlue  # here, as it imports triton

    return FusedLightGlue.from_pretrained(weights, device, precision)


class FusedPair:
    """One ALIKED model and LightGlue on one GPU; the first pair of each two sizes waits."""

    def __init__(self, spec: Spec, matcher_weights: str | Path | None = None) -> None:
        extractor = FusedExtractor(spec)
        self.torch_device, self.extract = extractor.torch_device, extractor.run
        self.matcher = open_matcher(spec.precision, matcher_weights, self.torch_device)
        if get_config(spec.model).dim != self.matcher.descriptor_dim:
            raise InputError(
                f"LightGlue matches descriptors of length {self.matcher.descriptor_dim}, which "
                f"{spec.model} does not give; pass --model aliked-n16rot"
            )
        if spec.top_k <= 0:
            raise InputError("a CUDA graph has a fixed number of keypoints; pass --top_k")
        self.plans: dict[tuple, Plan] = {}

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> PairMatches:
        """Two images, uint8 [H, W, 3] RGB, to their keypoints and matches, copies included."""
        rows = self.rows(image0, image1)
        matches = matches_of_rows(rows.partners, rows.match_scores)
        return PairMatches(rows.keypoints0.copy(), rows.keypoints1.copy(), matches)

    def rows(self, image0: np.ndarray, image1: np.ndarray) -> Unpacked:
        """The same, fill-ins included, in arrays that share memory.

        Where an image has fewer than K keypoints, they are matched once more without the others.
        """
        for image in (image0, image1):
            check_image(image)
        with torch.cuda.device(self.torch_device):
            plan = self.plan(image0.shape, image1.shape)
            for image, buffer in zip((image0, image1), plan.images, strict=True):
                upload(image[None], self.torch_device, out=buffer)
            plan.graph.replay()
            rows = unpack(*download([plan.packed]), plan.counts)
            if rows.has_fill_ins:
                plan.match_masked()
                rows = unpack(*download([plan.packed]), plan.counts)
        return rows

    @torch.no_grad()  # inference mode would bind every call: it alone may write to its tensors
    def plan(self, shape0: tuple[int, ...], shape1: tuple[int, ...]) -> Plan:
        """The captured runs for images of [H, W, 3] each, made when they are new."""
        key = (tuple(shape0), tuple(shape1))
        if key not in self.plans:
            self.plans[key] = Plan(self, key)
        return self.plans[key]


class FusedPairRuntime(PairRuntime):
    """`FusedPair` for images of one size; `infer` takes every row for a keypoint."""

    def __init__(self, pair: FusedPair, size: tuple[int, int]) -> None:
        self.name, self.pair, self.torch_device = "fused", pair, pair.torch_device
        self.device = str(self.torch_device)
        shape = (*size[::-1], 3)
        with torch.cuda.device(self.torch_device):
            self.plan = pair.plan(shape, shape)

    def to_device(self, inputs: Arrays) -> torch.Tensor:
        """Both images, uint8 [2, H, W, 3]."""
        return upload(np.concatenate([inputs["image0"], inputs["image1"]]), self.torch_device)

    def infer(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by name; the next call overwrites them."""
        plan = self.plan
        with torch.cuda.device(self.torch_device):
            plan.batches[0].copy_(batch)
            plan.graph.replay()
        keypoints0, keypoints1 = plan.found.keypoints
        return {"keypoints0": keypoints0, "keypoints1": keypoints1, **plan.matched._asdict()}

    def __call__(self, inputs: Arrays) -> Arrays:
        """Arrays in host memory to the outputs, copies included."""
        rows = self.pair.rows(inputs["image0"][0], inputs["image1"][0])
        return {
            "keypoints0": rows.keypoints0[None],
            "keypoints1": rows.keypoints1[None],
            "matches0": rows.partners[None],
            "scores0": rows.match_scores[None],
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize(self.torch_device)


def open_runtime(
    name: str, graph: str, spec: Spec, matcher_weights: Path | None, size: tuple[int, int]
) -> PairRuntime:
    """The fused kernels for images of `size`, (width, height)."""
    if graph == "pair":
        return FusedPairRuntime(FusedPair(spec, matcher_weights), size)
    device = choose_device(spec.device, "cuda")
    network = MatcherGraph(open_matcher(spec.precision, matcher_weights, device))
    return TorchPairRuntime(name, device, network, Captured(network))
