"""From two images to matches on one GPU: the fused kernels and LightGlue as one CUDA graph."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aliked.backends import Spec
from aliked.backends.fused import FusedExtractor
from aliked.configs import get_config
from aliked.errors import InputError
from aliked.features import check_image
from aliked.lightglue import LightGlue
from aliked.lightglue import Output as Matched
from aliked.matching import PairMatches, matches_of_rows
from aliked.model import Output
from aliked.transfer import download, upload

WARMUP_RUNS = 3  # compilers and libraries choose and allocate in the first ones


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
        device = pair.device
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
        self.graph, (self.found, self.packed) = capture(functools.partial(self._run, pair.extract))
        self.counts = tuple(scores.shape[1] for scores in self.found.scores)

    def _run(self, extract: Callable[[torch.Tensor], Output]) -> tuple[Found, torch.Tensor]:
        found = find(extract, self.batches)
        return found, pack(found, match(self.matcher, found, self.sizes, masked=False))

    def _run_masked(self) -> torch.Tensor:
        matched = match(self.matcher, self.found, self.sizes, masked=True)
        return self.packed.copy_(pack(self.found, matched))

    def match_masked(self) -> None:
        """Match what the last replay found once more, without its fill-ins."""
        if self.masked is None:
            self.masked, _ = capture(self._run_masked)
        self.masked.replay()


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run on a side stream, which compiles and allocates, then record the same run as a graph.

    Returns the graph and what `run` returned, whose tensors each replay overwrites.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARMUP_RUNS):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may allocate
        result = run()
    return graph, result


class FusedPair:
    """One ALIKED model and LightGlue on one GPU; the first pair of each two sizes waits.

    `compile_mode` is that of `torch.compile` for the matcher, without CUDA graphs of its own, or
    None for PyTorch's own kernels.
    """

    def __init__(
        self,
        spec: Spec,
        matcher_weights: str | Path | None = None,
        compile_mode: str | None = "max-autotune-no-cudagraphs",
    ) -> None:
        extractor = FusedExtractor(spec)
        self.device, self.extract = extractor.torch_device, extractor.run
        self.matcher = LightGlue.from_pretrained(matcher_weights, self.device, spec.precision)
        if get_config(spec.model).dim != self.matcher.descriptor_dim:
            raise InputError(
                f"LightGlue matches descriptors of length {self.matcher.descriptor_dim}, which "
                f"{spec.model} does not give; pass --model aliked-n16rot"
            )
        if spec.top_k <= 0:
            raise InputError("a CUDA graph has a fixed number of keypoints; pass --top_k")
        if compile_mode is not None:
            self.matcher = torch.compile(
                self.matcher, fullgraph=True, dynamic=False, mode=compile_mode
            )
        self.plans: dict[tuple, Plan] = {}

    def __call__(self, image0: np.ndarray, image1: np.ndarray) -> PairMatches:
        """Two images, uint8 [H, W, 3] RGB, to their keypoints and matches, copies included.

        Where an image has fewer than K keypoints, they are matched once more without the others.
        """
        for image in (image0, image1):
            check_image(image)
        with torch.cuda.device(self.device):
            plan = self.plan(image0.shape, image1.shape)
            for image, buffer in zip((image0, image1), plan.images, strict=True):
                upload(image[None], self.device, out=buffer)
            plan.graph.replay()
            rows = unpack(*download([plan.packed]), plan.counts)
            if rows.has_fill_ins:
                plan.match_masked()
                rows = unpack(*download([plan.packed]), plan.counts)
        matches = matches_of_rows(rows.partners, rows.match_scores)
        return PairMatches(rows.keypoints0.copy(), rows.keypoints1.copy(), matches)

    @torch.no_grad()  # inference mode would bind every call: it alone may write to its tensors
    def plan(self, shape0: tuple[int, ...], shape1: tuple[int, ...]) -> Plan:
        """The captured runs for images of [H, W, 3] each, made when they are new."""
        key = (tuple(shape0), tuple(shape1))
        if key not in self.plans:
            self.plans[key] = Plan(self, key)
        return self.plans[key]
