"""Mutual nearest neighbours of descriptors on the GPU: `match.cu`, in float32."""

import torch

from aliked.errors import InputError
from aliked.features import check_tensors
from aliked.fused import cuda_source, launches
from aliked.fused.cuda_source import float_bits

SOURCE = "match.cu"
DEPTH = 16  # channels that the kernel takes at a time


def takes(descriptors: torch.Tensor) -> bool:
    """Whether the kernel takes descriptors [N, D] of this type and length."""
    length = descriptors.shape[1]
    return descriptors.dtype == torch.float32 and length > 0 and length % DEPTH == 0


def nearest(
    descriptors0: torch.Tensor,
    descriptors1: torch.Tensor,
    min_similarity: float,
    scores0: torch.Tensor | None = None,
    scores1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of the first its match in the second, int32 [N], -1 where it has none.

    Also the similarities [N], 0 where there is none. Rows whose score, float32 [N] or [M], is 0
    take no part: they fill up outputs of a fixed size. Nothing waits for the device.
    """
    check_tensors(descriptors0, descriptors1)
    if not takes(descriptors0):
        raise InputError(
            f"the descriptors are {descriptors0.dtype} {list(descriptors0.shape)}; give float32 "
            f"[N, D], D a multiple of {DEPTH}"
        )
    a, b = aligned(descriptors0), aligned(descriptors1)
    device, rows, columns = a.device, len(a), len(b)
    if not rows or not columns:
        index = torch.full((rows,), -1, dtype=torch.int32, device=device)
        return index, torch.zeros(rows, device=device)
    scores = [scores_of(*pair) for pair in ((a, scores0), (b, scores1))]
    best = torch.zeros(rows + columns, dtype=torch.int64, device=device)
    index = torch.empty(rows, dtype=torch.int32, device=device)
    similarities = torch.empty(rows, device=device)
    sizes = {"rows": rows, "columns": columns}
    halves = best[:rows], best[rows:]

    def run(kernel: str, *arguments) -> None:
        launch = cuda_source.compiled(SOURCE, kernel, launches.build("match"), device)
        launch(launches.grid(kernel, **sizes), launches.threads(kernel), list(arguments))

    with torch.cuda.device_of(a):
        run("find_best", a, b, *scores, *halves, rows, columns, a.shape[1])
        run("keep_mutual", *halves, index, similarities, rows, float_bits(min_similarity))
    return index, similarities


def aligned(descriptors: torch.Tensor) -> torch.Tensor:
    """The same rows without gaps from a multiple of 16 bytes on, as the kernel reads them."""
    descriptors = descriptors.contiguous()
    return descriptors if descriptors.data_ptr() % 16 == 0 else descriptors.clone()


def scores_of(descriptors: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    """What the kernel takes for the scores of descriptors [N, D]: all take part without any."""
    wanted = torch.ones(len(descriptors), device=descriptors.device) if scores is None else scores
    shape, dtype, device = wanted.shape, wanted.dtype, wanted.device
    if (shape, dtype, device) != (descriptors.shape[:1], torch.float32, descriptors.device):
        raise InputError(
            f"the scores are {dtype} {list(shape)} on {device}; give float32 [N] beside the "
            "descriptors"
        )
    return wanted.contiguous()
