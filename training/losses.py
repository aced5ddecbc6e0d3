"""The four losses that keypoints and descriptors are trained with.

After ALIKE (arXiv 2112.02906) and ALIKED (arXiv 2304.03608), in their sections on training. All
take fixed-size batches with masks, so that nothing waits for the device.
"""

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `values` where `mask`; 0 where that is nowhere."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def pixel_distances(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[B, N, 2] and [B, M, 2] to [B, N, M]."""
    return torch.linalg.vector_norm(points[:, :, None] - others[:, None], dim=-1)


def reprojection_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    first_in_second: torch.Tensor,
    second_in_first: torch.Tensor,
    visible: tuple[torch.Tensor, torch.Tensor],
    radius: float,
) -> torch.Tensor:
    """Mean distance, in pixels, of keypoints that show the same point (ALIKE).

    Keypoints of both images, [B, N, 2] and [B, M, 2], also projected into the other one, and
    which are visible there, [B, N] and [B, M]. The distance of a pair is the mean of those in
    both images; pairs are mutually nearest and closer than `radius`.
    """
    with torch.no_grad():
        distance = pixel_distances(first_in_second, second) + pixel_distances(
            first, second_in_first
        )
        hidden = ~(visible[0][:, :, None] & visible[1][:, None])
        distance = (distance / 2).masked_fill(hidden, torch.inf)
        nearest, partner = distance.min(dim=2)
        back = distance.argmin(dim=1).gather(1, partner)
        paired = (back == torch.arange(back.shape[1], device=back.device)) & (nearest < radius)
    index = partner[..., None].expand(-1, -1, 2)
    there = first_in_second - second.gather(1, index)
    here = first - second_in_first.gather(1, index)
    lengths = torch.linalg.vector_norm(there, dim=-1) + torch.linalg.vector_norm(here, dim=-1)
    return masked_mean(lengths / 2, paired)


def dispersity_loss(dispersity: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Mean spread of the score around each keypoint (ALIKE's dispersity peak loss).

    `dispersity` [B, N] is the softmax-weighted mean squared distance from the keypoint, in units
    of the window's radius: small for a peak, 1 for a plateau.
    """
    return masked_mean(dispersity, kept)


def matching_log_probability(
    descriptors: torch.Tensor, others: torch.Tensor, ignored: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log q_m of ALIKED: [B, N, D] and [B, M, D] unit vectors to [B, N, M].

    The softmax of similarity / temperature over the other image's points without those that are
    `ignored`, [B, N, M].
    """
    similarity = descriptors @ others.mT
    return (similarity / temperature).masked_fill(ignored, -torch.inf).log_softmax(dim=2)


def sparse_nre_loss(log_probability: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The sparse neural reprojection error: mean -log q_m of the true match (ALIKED).

    `log_probability` [B, N, N] has the true matches on its diagonal; `visible` [B, N] says which
    points have one.
    """
    return masked_mean(-log_probability.diagonal(dim1=1, dim2=2), visible)


def reliability_loss(
    scores: torch.Tensor, others: torch.Tensor, reliability: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Scores should be high where descriptors match (ALIKE): sum of w (1 - reliability).

    All [B, N]: the scores of a point in both images, how reliably its descriptor finds the other
    one, in [0, 1], and whether both images show it. The weights w are the products of the scores,
    scaled to a sum of 1 per image. Only the scores are trained by this.
    """
    product = torch.where(visible, scores * others, 0.0)
    weights = product / product.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return (weights * (1 - reliability.detach())).sum(dim=1).mean()
