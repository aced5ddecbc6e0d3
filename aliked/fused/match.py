"""Mutual nearest neighbours of descriptors on the GPU: `match.cu`, in float32."""

import torch

from aliked.errors import InputError
from aliked.fused import cuda_source, launches
from aliked.fused.common import float_bits

SOURCE = "match.cu"
DEPTH = 16  # channels that the kernel takes at a time


def match_mutual(
    descriptors0: torch.Tensor, descriptors1: torch.Tensor, min_similarity: float = 0.75
) -> torch.Tensor:
    """`aliked.matching.match_mutual` of float32 [N, D] and [M, D] on one device: [P, 2] int64.

    The result is on that device. D is a multiple of 16. Waits for the device once, for P.
    """
    index, _ = nearest(descriptors0, descriptors1, min_similarity)
    rows = torch.nonzero(index >= 0)
    return torch.cat([rows, index[rows].long()], dim=1)


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
    for descriptors in (descriptors0, descriptors1):
        shape, dtype = list(descriptors.shape), descriptors.dtype
        if descriptors.ndim != 2 or dtype != torch.float32 or shape[1] % DEPTH or not shape[1]:
            raise InputError(
                f"the descriptors are {dtype} {shape}; give float32 [N, D], D a multiple of {DEPTH}"
            )
    if descriptors0.shape[1] != descriptors1.shape[1]:
        lengths = descriptors0.shape[1], descriptors1.shape[1]
        raise InputError("descriptors of length {} and {} cannot be compared".format(*lengths))
    if descriptors0.device != descriptors1.device:  # a kernel would read the other's as its own
        devices = descriptors0.device, descriptors1.device
        raise InputError("the descriptors are on two devices, {} and {}".format(*devices))
    a, b = descriptors0.contiguous(), descriptors1.contiguous()
    device, rows, columns = a.device, len(a), len(b)
    best = torch.zeros(rows + columns, dtype=torch.int64, device=device)
    index = torch.full((rows,), -1, dtype=torch.int32, device=device)
    similarities = torch.zeros(rows, device=device)
    if not rows or not columns:
        return index, similarities
    scores = [torch.ones(len(d), device=device) if s is None else s.contiguous()
              for d, s in ((a, scores0), (b, scores1))]  # fmt: skip
    sizes = {"rows": rows, "columns": columns}
    halves = best[:rows], best[rows:]

    def run(kernel: str, *arguments) -> None:
        launch = cuda_source.compiled(SOURCE, kernel, launches.build("match"), device)
        launch(launches.grid(kernel, **sizes), launches.threads(kernel), list(arguments))

    run("find_best", a, b, *scores, *halves, rows, columns, a.shape[1])
    run("keep_mutual", *halves, index, similarities, rows, float_bits(min_similarity))
    return index, similarities
