"""ALIKED: keypoints and descriptors of an image (Zhao et al., arXiv 2304.03608)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aliked.backbone import (
    ConvBlock,
    DeformableConv2d,
    DeformableResBlock,
    ResBlock,
    conv1x1,
    conv3x3,
)
from aliked.configs import STRIDE, Form, Selection, get_config
from aliked.descriptors import SDDH
from aliked.detection import Detections, detect
from aliked.errors import InputError
from aliked.features import Features, check_image, drop_fill_ins
from aliked.transfer import download, upload
from aliked.weights import load_state_dict

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


class Output(NamedTuple):
    """What the network returns for a batch. Rows of score 0 are fill-ins, not keypoints."""

    keypoints: torch.Tensor  # [B, K, 2] pixels, (x, y), centre of the top-left pixel = (0, 0)
    descriptors: torch.Tensor  # [B, K, D] unit length
    scores: torch.Tensor  # [B, K] in [0, 1], score map at the refined position
    nms_scores: torch.Tensor  # [B, K] in [0, 1], score map at the maximum it was refined from
    score_dispersity: torch.Tensor  # [B, K]


def pad_to_stride(images: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Replicate the border up to a multiple of 32; also the rows and columns added before.

    The padding is split over both sides, the smaller half first, as the weights were trained.
    """
    height, width = images.shape[-2:]
    extra_y, extra_x = -height % STRIDE, -width % STRIDE
    top, left = extra_y // 2, extra_x // 2
    padding = (left, extra_x - left, top, extra_y - top)
    return F.pad(images, padding, mode="replicate"), top, left


@contextlib.contextmanager
def plain_float32() -> Iterator[None]:
    """Switch TF32 off, which PyTorch leaves on for cuDNN: it moves keypoints by up to 0.007 px."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(True, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, False):
        yield


def to_tensor(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [0, 1], on the same device."""
    return images.float().permute(0, 3, 1, 2) / 255  # TensorRT only casts uint8, so cast first


def unit_length(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] with every pixel's C channels scaled to length 1."""
    # The squares of half-precision features can leave the type's range: sum them in float32.
    norms = torch.linalg.vector_norm(maps.float(), dim=1, keepdim=True)
    return maps / norms.clamp(min=1e-6).to(maps.dtype)


class ALIKED(nn.Module):
    """One ALIKED variant with its selection rule.

    `top_k` > 0: the best `top_k` keypoints. `top_k` <= 0: those with a detection score above
    `scores_th`, at most `n_limit`; where none passes, those above the image's mean score.
    """

    def __init__(
        self,
        name: str,
        top_k: int = Selection.top_k,
        scores_th: float = Selection.scores_th,
        n_limit: int = Selection.n_limit,
    ) -> None:
        super().__init__()
        config = get_config(name)
        if top_k <= 0 and n_limit <= 0:
            raise InputError(f"n_limit is {n_limit} in threshold mode; it must be at least 1")
        self.name, self.dim, self.precision = name, config.dim, "fp32"
        self.top_k, self.scores_th, self.n_limit = top_k, scores_th, n_limit
        self.form = Form()
        c1, c2, c3, c4 = config.channels
        self.block1 = ConvBlock(3, c1)
        self.block2 = ResBlock(c1, c2)
        self.block3 = DeformableResBlock(c2, c3)
        self.block4 = DeformableResBlock(c3, c4)
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            conv1x1(channels, config.dim // 4) for channels in config.channels
        )
        self.gate = nn.SELU(inplace=True)
        self.score_head = nn.Sequential(
            conv1x1(config.dim, 8),
            self.gate,
            conv3x3(8, 4),
            self.gate,
            conv3x3(4, 4),
            self.gate,
            conv3x3(4, 1),
        )
        self.desc_head = SDDH(config.dim, config.kernel_size, config.num_positions)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        top_k: int = Selection.top_k,
        scores_th: float = Selection.scores_th,
        n_limit: int = Selection.n_limit,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> "ALIKED":
        """The variant `name` with its weights, ready for inference on `device`.

        `weights` is a file; by default the shipped one or, for an official variant,
        `$ALIKED_WEIGHTS_DIR`, the user cache and the download in turn. Raises `InputError` where
        the weights are missing or are not `name`'s.
        """
        model = cls(name, top_k, scores_th, n_limit)
        # Not strict, as a file may lack how many batches its norms have seen.
        model.load_state_dict(load_state_dict(name, weights, model.state_dict()), strict=False)
        model.eval().fold_batch_norm().requires_grad_(False)
        return model.set_precision(precision).to(device)

    def fold_batch_norm(self) -> "ALIKED":
        """Fold every batch norm into its convolution, for inference only."""
        for block in (self.block1, self.block2, self.block3, self.block4):
            block.fold_batch_norm()
        return self

    def set_precision(self, precision: str) -> "ALIKED":
        """Run in "fp32", or in "fp16": half-precision convolutions, products and feature maps.

        Inputs, outputs, coordinates, sampling, the soft-argmax and the score map stay float32.
        """
        if precision not in PRECISIONS:
            raise InputError(f"unknown precision {precision!r}; choose {' or '.join(PRECISIONS)}")
        self.precision = precision
        self.to(PRECISIONS[precision])
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.regular_conv.float()
        return self

    def aggregate(self, images: torch.Tensor) -> torch.Tensor:
        """Padded images [B, 3, H, W] to features of all four scales, [B, D, H, W]."""
        x1 = self.block1(images)
        x2 = self.block2(F.avg_pool2d(x1, 2))
        x3 = self.block3(F.avg_pool2d(x2, 4))
        x4 = self.block4(F.avg_pool2d(x3, 4))
        size = images.shape[-2:]
        levels = [self.gate(self.conv1(x1))]
        for conv, x in ((self.conv2, x2), (self.conv3, x3), (self.conv4, x4)):
            levels.append(self.upsample(self.gate(conv(x)), size))
        return torch.cat(levels, dim=1)

    def upsample(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[B, C, h, w] to [B, C, *size], bilinear, corners on corners."""
        return F.interpolate(x, size, mode="bilinear", align_corners=True)

    def dense(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RGB float [B, 3, H, W] in [0, 1] to unit-length features [B, D, H, W] and scores.

        The score map is [B, 1, H, W] in [0, 1].
        """
        height, width = images.shape[-2:]
        padded, top, left = pad_to_stride(images)
        features = self.aggregate(padded.to(self.conv1.weight.dtype))
        scores = torch.sigmoid(self.score_head(features).float())
        features, scores = (
            maps.narrow(2, top, height).narrow(3, left, width) for maps in (features, scores)
        )
        return unit_length(features), scores

    def detect(self, score_map: torch.Tensor) -> Detections:
        """Keypoints of a score map [B, 1, H, W] by this model's selection rule."""
        return detect(score_map, self.top_k, self.scores_th, self.n_limit, self.form)

    def forward(self, images: torch.Tensor) -> Output:
        """RGB float [B, 3, H, W] in [0, 1], H and W at least 5, to `Output`.

        K is `top_k` or `n_limit`, or (H - 4) * (W - 4) where that is smaller. Nothing here waits
        for the device. Rows come in descending order of `nms_scores`; in threshold mode row by
        row of the image where no more than `n_limit` pass and `form` does not say otherwise.
        """
        features, score_map = self.dense(images)
        return self.describe(features, self.detect(score_map))

    def describe(self, features: torch.Tensor, found: Detections) -> Output:
        """Describe what was found by the unit-length features [B, D, H, W] around it."""
        descriptors = self.desc_head(features, found.keypoints, self.form)
        return Output(
            found.keypoints, descriptors, found.scores, found.nms_scores, found.dispersity
        )

    def __call__(self, images: torch.Tensor | np.ndarray) -> Output | Features:
        """`forward` for a tensor; `extract` for a NumPy image."""
        if isinstance(images, np.ndarray):
            return self.extract(images)
        return super().__call__(images)

    @torch.inference_mode()
    def extract(self, image: np.ndarray) -> Features:
        """One image, uint8 [H, W, 3] RGB, to its `Features`; "fp32" is float32 without TF32.

        Raises `InputError` for another type or shape, or where H or W is below 5.
        """
        return self.features_of(*self.maps(image))

    def maps(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """`dense` of one image as `extract` takes it."""
        check_image(image)
        images = to_tensor(upload(image[None], self.conv1.weight.device))
        with plain_float32():
            return self.dense(images)

    def features_of(self, features: torch.Tensor, score_map: torch.Tensor) -> Features:
        """What `extract` gives of an image with these `maps`."""
        with plain_float32():
            found = self.detect(score_map)
            if self.top_k <= 0:  # n_limit is far above the usual count: describe no fill-ins
                found = Detections(*(rows[:, found.nms_scores[0] > 0] for rows in found))
            output = self.describe(features, found)
        # keypoints, descriptors and scores are the first three
        return drop_fill_ins(*download(rows[0] for rows in output[:3]))
