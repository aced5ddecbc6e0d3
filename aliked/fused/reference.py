"""Plain PyTorch twins of the fused operators: same names, arguments and results.

They compute in float32 and round only what they return, so a half-precision kernel may differ by
the rounding of what it keeps between its stages.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d

from aliked.configs import RADIUS
from aliked.detection import inner, soft_argmax, suppress_non_maxima
from aliked.fused.describe import KEYPOINTS
from aliked.fused.maxima import BIN_SHIFT, BINS, LOWEST_BIN, TALLY
from aliked.patches import get_patches
from aliked.pyramid import unit_length
from aliked.sampling import bilinear_sample

INDEX_MASK = 0xFFFFFFFF


def planar(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] to float32 [B, C, H, W]."""
    return x.permute(0, 3, 1, 2).float()


def channels_last(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to [B, H, W, C] of the type of `like`."""
    return x.permute(0, 2, 3, 1).to(like.dtype).contiguous()


def kernel3x3(weight: torch.Tensor) -> torch.Tensor:
    """[9 * CI, CO] to float32 [CO, CI, 3, 3]."""
    return weight.float().unflatten(0, (3, 3, -1)).permute(3, 2, 0, 1).contiguous()


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] times [C, C'] at every pixel."""
    return torch.einsum("bchw,cd->bdhw", x, weight.float())


def stem(images, weight, bias, height, width, top, left):
    """Twin of `stem.stem`."""
    x = planar(images) / 255
    padding = (left, width - left - x.shape[3], top, height - top - x.shape[2])
    x = F.conv2d(F.pad(x, padding, mode="replicate"), kernel3x3(weight), bias, padding=1)
    return channels_last(F.selu(x), weight)


def conv3x3(x, weight, bias):
    """Twin of `conv.conv3x3`."""
    return channels_last(F.selu(F.conv2d(planar(x), kernel3x3(weight), bias, padding=1)), x)


def finish_level(values, shortcut, shortcut_weight, level_weight, score_weight, pool, like):
    """What follows a block's last convolution, before its SELU: [B, C, H, W]."""
    if shortcut is not None:
        values = values + project(planar(shortcut), shortcut_weight)
    values = F.selu(values)
    level = F.selu(project(values, level_weight))
    kept = values if shortcut is None else level
    score = project(level, score_weight)
    pooled = F.avg_pool2d(values, pool) if pool > 1 else values[..., :0, :0]
    return tuple(channels_last(x, like) for x in (kept, pooled, score))


def conv3x3_level(x, weight, bias, shortcut, shortcut_weight, level_weight, score_weight, pool):
    """Twin of `conv.conv3x3_level`."""
    values = F.conv2d(planar(x), kernel3x3(weight), bias, padding=1)
    return finish_level(values, shortcut, shortcut_weight, level_weight, score_weight, pool, x)


def block1(
    images, stem_weight, stem_bias, weight, bias, level_weight, score_weight, fragments,
    height, width, top, left,
):  # fmt: skip
    """Twin of `kernels.block1`, which rounds the stem's output."""
    x = stem(images, stem_weight, stem_bias, height, width, top, left)
    return conv3x3_level(x, weight, bias, None, None, level_weight, score_weight, 2)


def block2(
    x, first_weight, first_bias, weight, bias, shortcut_weight, level_weight, score_weight,
    fragments,
):  # fmt: skip
    """Twin of `kernels.block2`, which rounds the first layer's output."""
    y = conv3x3(x, first_weight, first_bias)
    return conv3x3_level(y, weight, bias, x, shortcut_weight, level_weight, score_weight, 4)


def deform_values(x, offset_weight, offset_bias, weight, bias):
    """A deformable convolution before its SELU: float32 [B, CO, H, W]."""
    limit = max(x.shape[1:3]) / 4
    offsets = F.conv2d(planar(x), kernel3x3(offset_weight), offset_bias, padding=1)
    offsets = offsets.clamp(-limit, limit)
    return deform_conv2d(planar(x).contiguous(), offsets, kernel3x3(weight), bias, padding=1)


def deform(x, offset_weight, offset_bias, weight, bias, fragments):
    """Twin of `kernels.deform`."""
    return channels_last(F.selu(deform_values(x, offset_weight, offset_bias, weight, bias)), x)


def deform_level(
    x, offset_weight, offset_bias, weight, bias, fragments,
    shortcut, shortcut_weight, level_weight, score_weight, pool,
):  # fmt: skip
    """Twin of `kernels.deform_level`."""
    values = deform_values(x, offset_weight, offset_bias, weight, bias)
    return finish_level(values, shortcut, shortcut_weight, level_weight, score_weight, pool, x)


def upsample(level: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """[B, h, w, C] to float32 [B, C, H, W] of the size of `full`, corners aligned."""
    return F.interpolate(planar(level), full.shape[1:3], mode="bilinear", align_corners=True)


def score_head(
    s1, s2, s3, s4, first_weight, first_bias, second_weight, second_bias, last_weight, fragments,
    top, left, height, width,
):  # fmt: skip
    """Twin of `kernels.score_head`."""
    x = F.selu(planar(s1) + upsample(s2, s1) + upsample(s3, s1) + upsample(s4, s1))
    x = F.selu(F.conv2d(x, kernel3x3(first_weight), first_bias, padding=1))
    x = F.selu(F.conv2d(x, kernel3x3(second_weight), second_bias, padding=1))
    scores = torch.sigmoid(F.conv2d(x, kernel3x3(last_weight), padding=1))
    tally = torch.zeros(len(s1), TALLY, dtype=torch.int32, device=s1.device)
    return scores[:, 0, top : top + height, left : left + width].contiguous(), tally


def find_maxima(scores, tally):
    """Twin of `kernels.find_maxima`; the keys are sorted."""
    batch, height, width = scores.shape
    maps = scores[:, None]
    found = inner(suppress_non_maxima(maps))
    index = torch.arange(height * width, device=scores.device).reshape(1, 1, height, width)
    bits = found.contiguous().view(torch.int32)
    keys = (bits.long() << 32) | (INDEX_MASK - inner(index.expand(batch, -1, -1, -1)))
    keys = torch.where(found > 0, keys, 0).sort(dim=1, descending=True).values
    bins = ((bits >> BIN_SHIFT) - LOWEST_BIN).clamp(min=0)
    tally.scatter_add_(1, bins.long(), ((found > 0) & (bins > 0)).int())
    tally[:, BINS] += (found > 0).sum(dim=1)
    return keys


def select(keys, tally, means, k, threshold):
    """Twin of `kernels.select`: exactly the k best where there are more, sorted, no slack."""
    total, kept = tally[:, BINS, None], tally[:, BINS + 1 : BINS + 3]
    keys = torch.where(torch.arange(keys.shape[1], device=keys.device) < total, keys, 0)
    keys = keys.sort(dim=1, descending=True).values
    kept[:, 0] = total[:, 0].clamp(max=k)
    if means is not None:
        scores = (keys >> 32).int().view(torch.float32)
        passed = (scores > threshold) & (threshold > 0)
        passed = torch.where(passed.any(dim=1, keepdim=True), passed, scores > means[:, None])
        count = passed.sum(dim=1)
        kept.copy_(torch.stack((count.clamp(max=k), count <= k), dim=1))
    return keys[:, :k].contiguous()


def refine(chosen, tally, scores, k):
    """Twin of `kernels.refine`."""
    info = tally[:, BINS + 1 : BINS + 3]
    width = scores.shape[2]
    i = torch.arange(chosen.shape[1], device=scores.device)
    keys = torch.where(i < info[:, :1], chosen, 0)
    order = torch.where(info[:, 1:] > 0, keys & INDEX_MASK, keys)
    keys = keys.gather(1, order.argsort(dim=1, descending=True))[:, :k]
    keys = F.pad(keys, (0, k - keys.shape[1]))
    i = torch.arange(k, device=scores.device)
    fill_in = (i // (width - 2 * RADIUS) + RADIUS) * width + i % (width - 2 * RADIUS) + RADIUS
    pixel = torch.where(keys > 0, INDEX_MASK - (keys & INDEX_MASK), fill_in)
    maxima = torch.stack((pixel % width, pixel // width), dim=2)
    shift, dispersity = soft_argmax(scores[:, None], maxima)
    keypoints = maxima + shift
    nms_scores = (keys >> 32).int().view(torch.float32)
    refined = bilinear_sample(scores[:, None], keypoints)[:, 0]
    return keypoints, torch.where(nms_scores > 0, refined, 0.0), nms_scores, dispersity


def feature_map(x1, x1_weight, f2, f3, f4, top, left, height, width):
    """Unit-length features of the image [B, D, height, width], float32."""
    levels = [F.selu(project(planar(x1), x1_weight))]
    levels += [upsample(level, x1) for level in (f2, f3, f4)]
    features = torch.cat(levels, dim=1)[..., top : top + height, left : left + width]
    return unit_length(features)


def sample_offsets(
    keypoints, x1, x1_weight, f2, f3, f4, patch_weight, patch_bias, offset_weight, offset_bias,
    level_fragments, patch_fragments, top, left, height, width,
):  # fmt: skip
    """Twin of `kernels.sample_offsets`."""
    features = feature_map(x1, x1_weight, f2, f3, f4, top, left, height, width)
    patches = get_patches(features, keypoints.long(), 3).permute(0, 1, 3, 4, 2)  # channels last
    offsets = patches.flatten(2) @ patch_weight.float() + patch_bias
    offsets = F.selu(offsets) @ offset_weight.float() + offset_bias
    limit = max(height, width) / 4
    parts = -(-keypoints.shape[0] * keypoints.shape[1] // KEYPOINTS)
    zeros = torch.zeros(parts, device=keypoints.device, dtype=torch.int32)
    return offsets.clamp(-limit, limit), zeros


def sample_descriptors(
    keypoints, offsets, parts, x1, x1_weight, f2, f3, f4, project_weight, aggregate_weight,
    level_fragments, sample_fragments, top, left, height, width,
):  # fmt: skip
    """Twin of `kernels.sample_descriptors`."""
    features = feature_map(x1, x1_weight, f2, f3, f4, top, left, height, width)
    offsets = offsets.unflatten(2, (2, -1)).transpose(2, 3)  # [B, K, M, 2]
    positions = keypoints[:, :, None] + offsets
    sampled = bilinear_sample(features, positions.flatten(1, 2)).transpose(1, 2)  # [B, K * M, D]
    sampled = F.selu(sampled @ project_weight.float()).reshape(*keypoints.shape[:2], -1)
    return F.normalize(sampled @ aggregate_weight.float(), dim=2)
