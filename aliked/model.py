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
from aliked.errors import InputError, shown
from aliked.features import MIN_SIDE, Features, check_image, check_memory, drop_fill_ins
from aliked.files import sha256
from aliked.patches import is_traced
from aliked.pyramid import Frame, Maps, Pyramid, unit_length
from aliked.transfer import choose_device, download, upload
from aliked.weights import find_weights, load_state_dict

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # by precision


def dtype_of(precision: str) -> torch.dtype:
    """The type that "fp32" or "fp16" computes in; `InputError` for another precision."""
    if not isinstance(precision, str) or precision not in DTYPES:
        raise InputError(f"unknown precision {shown(precision)}; choose {' or '.join(DTYPES)}")
    return DTYPES[precision]


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


LOWEST, HIGHEST = -0.5, 1.5  # of float images: resizing overshoots [0, 1] by less


def checked_batch(images: torch.Tensor) -> torch.Tensor:
    """RGB [B, 3, H, W], uint8 or float of any precision, as float32 in [0, 1].

    `InputError` for anything else. Values are looked at on the CPU only: elsewhere that would wait
    for the device.
    """
    wanted = "float RGB [B, 3, H, W] in [0, 1] or uint8, or one NumPy image, uint8 [H, W, 3]"
    if not isinstance(images, torch.Tensor):
        raise InputError(
            f"the images are a {type(images).__name__}; give a tensor, {wanted}, as load_image "
            "reads it"
        )
    fits = images.ndim == 4 and images.shape[1] == 3 and images.layout == torch.strided
    if not fits or not (images.is_floating_point() or images.dtype == torch.uint8):
        kind = str(images.dtype).removeprefix("torch.")
        raise InputError(f"the images are {kind} {list(images.shape)}; give {wanted}")
    batch, _, height, width = images.shape
    if not batch or min(height, width) < MIN_SIDE:
        raise InputError(
            f"the batch has {batch} images of {width}x{height} pixels; give at least one, with "
            f"both sides at least {MIN_SIDE}"
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if images.device.type == "cpu":
        low, high = (end.item() for end in images.detach().aminmax())
        if not (low >= LOWEST and high <= HIGHEST):  # so that NaN is refused, too
            raise InputError(
                f"the images have values from {low:g} to {high:g}; give floats in [0, 1], or uint8"
            )
    return images.float()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Leave `torch.autocast`, whose half-precision coordinates are whole numbers beyond 2048."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def interpolation_matrix(length: int, new_length: int, like: torch.Tensor) -> torch.Tensor:
    """Weights [new_length, length] of linear interpolation that keeps both ends, as `like`."""
    position = torch.arange(new_length, device=like.device).float()
    position = position * (length - 1) / (new_length - 1)
    distance = (position[:, None] - torch.arange(length, device=like.device)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)


class ALIKED(nn.Module):
    """One ALIKED variant with its selection rule. Its weights are random: see `from_pretrained`.

    `top_k` > 0: the best `top_k` keypoints. `top_k` <= 0: those with a detection score above
    `scores_th`, at most `n_limit`. Where none passes, there is none; with `strict` False, as in the
    official code, those above the image's mean score, more than a low threshold gives.
    """

    def __init__(
        self,
        name: str,
        top_k: int = Selection.top_k,
        scores_th: float = Selection.scores_th,
        n_limit: int = Selection.n_limit,
        strict: bool = Selection.strict,
    ) -> None:
        super().__init__()
        config = get_config(name)
        Selection(top_k, scores_th, n_limit, strict).check()
        self.name, self.dim, self.precision = name, config.dim, "fp32"
        self.top_k, self.scores_th, self.n_limit = top_k, scores_th, n_limit
        self.strict = strict
        self.form, self.weights_sha256 = Form(), None
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
        strict: bool = Selection.strict,
    ) -> "ALIKED":
        """The variant `name` with its weights, ready for inference on `device`.

        `weights` is a file; by default the shipped one or, for an official variant,
        `$ALIKED_WEIGHTS_DIR`, the user cache and the download in turn. Raises `InputError` where
        the weights are missing or are not `name`'s.
        """
        device = choose_device(device)
        model = cls(name, top_k, scores_th, n_limit, strict)
        # Not strict, as a file may lack how many batches its norms have seen.
        model.load_state_dict(load_state_dict(name, weights, model.state_dict()), strict=False)
        model.weights_sha256 = sha256(find_weights(name, weights))
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
        self.to(dtype_of(precision))
        self.precision = precision
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.regular_conv.float()
        return self

    def levels(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Padded images [B, 3, H, W] to features of the four scales, [B, D / 4, h, w] each."""
        x1 = self.block1(images)
        x2 = self.block2(F.avg_pool2d(x1, 2))
        x3 = self.block3(F.avg_pool2d(x2, 4))
        x4 = self.block4(F.avg_pool2d(x3, 4))
        convs = (self.conv1, self.conv2, self.conv3, self.conv4)
        return tuple(self.gate(conv(x)) for conv, x in zip(convs, (x1, x2, x3, x4), strict=True))

    def score(self, levels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Features of the four scales to float32 scores [B, 1, H, W] of the frame, in [0, 1].

        The head's first convolution, 1x1, runs before the levels are resized, which is the same and
        leaves 8 channels to resize.
        """
        first, *rest = self.score_head
        weights = first.weight.chunk(len(levels), dim=1)
        total, *others = (F.conv2d(x, weight) for x, weight in zip(levels, weights, strict=True))
        for hidden in others:
            total = total + self.upsample(hidden, total.shape[-2:])
        for layer in rest:
            total = layer(total)
        return torch.sigmoid(total.float())

    def upsample(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[B, C, h, w] to [B, C, *size], bilinear, corners on corners."""
        if not self.form.dynamic:
            return F.interpolate(x, size, mode="bilinear", align_corners=True)
        # TensorRT does not build a Resize to symbolic sizes that must agree with others.
        rows, columns = (
            interpolation_matrix(*sides, x) for sides in zip(x.shape[-2:], size, strict=True)
        )
        return rows @ (x @ columns.T)

    def encode(self, images: torch.Tensor) -> tuple[Pyramid, torch.Tensor]:
        """RGB float [B, 3, H, W] in [0, 1] to features and scores [B, 1, H, W] in [0, 1]."""
        height, width = images.shape[-2:]
        padded, top, left = pad_to_stride(images)
        levels = self.levels(padded.to(self.conv1.weight.dtype))
        scores = self.score(levels).narrow(2, top, height).narrow(3, left, width)
        return Pyramid(levels, Frame(top, left, height, width)), scores

    def dense(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` with the features at every pixel, [B, D, H, W] of unit length."""
        (levels, (top, left, height, width)), scores = self.encode(images)
        full = [levels[0], *(self.upsample(x, levels[0].shape[-2:]) for x in levels[1:])]
        features = torch.cat(full, dim=1).narrow(2, top, height).narrow(3, left, width)
        return unit_length(features), scores

    def detect(self, score_map: torch.Tensor) -> Detections:
        """Keypoints of a score map [B, 1, H, W] by this model's selection rule."""
        with without_autocast(score_map.device):
            selection = self.top_k, self.scores_th, self.n_limit
            return detect(score_map, *selection, self.form, self.strict)

    def forward(self, images: torch.Tensor) -> Output:
        """RGB float [B, 3, H, W] in [0, 1], H and W at least 5, to `Output`.

        K is `top_k` or `n_limit`, or (H - 4) * (W - 4) where that is smaller. Nothing here waits
        for the device. Rows come in descending order of `nms_scores`; in threshold mode row by
        row of the image where no more than `n_limit` pass and `form` is not `exported`.
        """
        features, score_map = self.encode(images)
        return self.describe(features, self.detect(score_map))

    def describe(self, features: Maps, found: Detections) -> Output:
        """Describe what was found by the features around it, those of `encode` or `dense`."""
        descriptors = self.desc_head(features, found.keypoints, self.form)
        return Output(
            found.keypoints, descriptors, found.scores, found.nms_scores, found.dispersity
        )

    def __call__(self, images: torch.Tensor | np.ndarray) -> Output | Features:
        """`forward` for a tensor, float or uint8 [B, 3, H, W]; `extract` for a NumPy image.

        Raises `InputError` for another type or shape and, on the CPU, for floats far outside
        [0, 1]; nothing is checked where the model is traced, exported or compiled.
        """
        if isinstance(images, np.ndarray):
            return self.extract(images)
        if not is_traced():
            images = self._on_device(checked_batch(images))
        return super().__call__(images)

    def _on_device(self, images: torch.Tensor) -> torch.Tensor:
        """`images`, once it is sure that they are where the model is."""
        device = self.conv1.weight.device
        if images.device != device:
            raise InputError(
                f"the images are on {images.device} and the model on {device}; move one of them"
            )
        return images

    @torch.inference_mode()
    def extract(self, image: np.ndarray) -> Features:
        """One image, uint8 [H, W, 3] RGB, to its `Features`; "fp32" is float32 without TF32.

        Raises `InputError` for another type or shape, or where H or W is below 5.
        """
        return self.features_of(*self.maps(image))

    def maps(self, image: np.ndarray) -> tuple[Pyramid, torch.Tensor]:
        """`encode` of one image as `extract` takes it."""
        check_image(image)
        device = self.conv1.weight.device
        if device.type == "cpu":
            check_memory(*image.shape[:2])
        images = to_tensor(upload(image[None], device))
        with plain_float32():
            return self.encode(images)

    def features_of(self, features: Maps, score_map: torch.Tensor) -> Features:
        """What `extract` gives of an image with these `maps`."""
        with plain_float32():
            found = self.detect(score_map)
            if self.top_k <= 0:  # n_limit is far above the usual count: describe no fill-ins
                found = Detections(*(rows[:, found.nms_scores[0] > 0] for rows in found))
            output = self.describe(features, found)
        # keypoints, descriptors and scores are the first three
        return drop_fill_ins(*download(rows[0] for rows in output[:3]))
