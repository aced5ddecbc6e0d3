"""LightGlue: matches between the keypoints of two images (Lindenberger et al., arXiv 2306.13643).

The keypoints of both images are one sequence, [B, M + N, D], the first image's M rows in front:
linear layers and norms see the whole, attention sees each image by itself (self) or the other one
(cross). So images of different counts need no padding, and images of equal counts share each call.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aliked.errors import InputError, first_line, shown
from aliked.features import Features
from aliked.matching import LIGHTGLUE_DIM, NO_MATCHES, Matcher, Matches, Size, check_matchable
from aliked.model import dtype_of
from aliked.transfer import choose_device
from aliked.weights import LIGHTGLUE, find_weights, load_state_dict

PADDED = -3e4  # added to the logits of rows that are no keypoints: exp is 0, and float16 holds it

# [B, H, N, d], [B, H, M, d] twice and what is added to the logits, to [B, H, N, d].
Attention = Callable[..., torch.Tensor]


class Output(NamedTuple):
    """What the network returns for a batch of pairs."""

    matches0: torch.Tensor  # [B, M] int64: each keypoint's partner in the second image, or -1
    scores0: torch.Tensor  # [B, M] float32: of each mutual best pair, 0 elsewhere


class PairAttention(NamedTuple):
    """Attention of a sequence [B, M + N, ...] that holds the keypoints of two images."""

    first: int  # M
    equal: bool  # M == N: both images can share a call
    bias: torch.Tensor | None  # [B, 1, 1, M + N], added to the logits of each key
    attention: Attention

    def within(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Self-attention of each image; [B, M + N, H, d] three times to [B, M + N, H * d]."""
        if self.equal:
            return self._both(q, k, v, self.bias)
        here, there = slice(None, self.first), slice(self.first, None)
        return self._one_by_one(q, k, v, ((here, here), (there, there)))

    def across(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Attention to the other image; q [B, M + N, H, d], kv [B, M + N, 2, H, d]."""
        if self.equal:
            return self.across_swapped(q, kv.roll(self.first, 1))
        here, there = slice(None, self.first), slice(self.first, None)
        return self._one_by_one(q, *kv.unbind(2), ((here, there), (there, here)))

    def across_swapped(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """`across` of images with equal counts, which have changed places in `kv` already."""
        bias = None if self.bias is None else self.bias.roll(self.first, 3)
        return self._both(q, *kv.unbind(2), bias)

    def _both(self, q, k, v, bias) -> torch.Tensor:
        """One call for both images of every pair, as a batch of 2 B."""
        stacked = (rows.unflatten(1, (2, self.first)).flatten(0, 1) for rows in (q, k, v))
        bias = None if bias is None else bias.reshape(-1, 1, 1, self.first)
        return self._attend(*stacked, bias).unflatten(0, (-1, 2)).flatten(1, 2)

    def _one_by_one(self, q, k, v, sides) -> torch.Tensor:
        """A call for each image: its rows as queries, and whose keys they look at."""
        bias = self.bias
        parts = [
            self._attend(q[:, a], k[:, b], v[:, b], None if bias is None else bias[..., b])
            for a, b in sides
        ]
        return torch.cat(parts, dim=1)

    def _attend(self, q, k, v, bias) -> torch.Tensor:
        """[B, N, H, d], [B, M, H, d] twice to [B, N, H * d]."""
        q, k, v = (rows.transpose(1, 2) for rows in (q, k, v))
        rows = self.attention(q, k, v, bias).transpose(1, 2)
        batch, count, heads, dim = rows.shape
        # By plain numbers: a file else gets -1, which cannot be worked out where there are no rows.
        return rows.reshape(batch, count, int(heads) * int(dim))


class Prepared(NamedTuple):
    """An image's features as the network takes them, on its device."""

    keypoints: torch.Tensor  # [1, N, 2], normalised
    descriptors: torch.Tensor  # [1, N, 128]

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.keypoints.nbytes + self.descriptors.nbytes


class Encoding(NamedTuple):
    """Rotary encoding of positions (section 3.1): angles that differences of positions turn by."""

    cos: torch.Tensor  # [B, M + N, 1, 1, d / 2]
    sin: torch.Tensor

    def rotate(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, M + N, 2, H, d] with element i turned with element i + d / 2."""
        a, b = rows.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), dim=-1)


class PositionEncoding(nn.Module):
    """Learned frequencies of the rotary encoding, always in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.Wr = nn.Linear(2, head_dim // 2, bias=False)

    def forward(self, keypoints: torch.Tensor, dtype: torch.dtype) -> Encoding:
        """Normalised keypoints [B, M + N, 2] to their `Encoding` in `dtype`."""
        angles = self.Wr(keypoints)[:, :, None, None]
        return Encoding(angles.cos().to(dtype), angles.sin().to(dtype))


class Block(nn.Module):
    """What self- and cross-attention have in common: projections, and an update of the rows."""

    def __init__(self, dim: int, heads: int, projections: int) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (projections, heads, dim // heads)
        self.project = nn.Linear(dim, projections * dim)
        self.ffn = nn.Sequential(
            nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        """[B, M + N, D] to [B, M + N, projections, H, d]."""
        return self.project(x).unflatten(2, self.parts)

    def update(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The rows [B, M + N, D] after what attention gathered for them, the same shape."""
        return x + self.ffn(torch.cat((x, context), dim=2))


class SelfBlock(Block):
    """Self-attention of each image's keypoints, by appearance and relative position."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, projections=3)  # queries, keys, values

    def forward(self, x: torch.Tensor, encoding: Encoding, pair: PairAttention) -> torch.Tensor:
        """[B, M + N, D] to the same shape."""
        qkv = self.projected(x)
        q, k = encoding.rotate(qkv[:, :, :2]).unbind(2)
        return self.update(x, pair.within(q, k, qkv[:, :, 2]))


class CrossBlock(Block):
    """Attention to the other image's keypoints; queries and keys are one projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, projections=2)  # queries that are keys too, values

    def forward(self, x: torch.Tensor, pair: PairAttention) -> torch.Tensor:
        """[B, M + N, D] to the same shape."""
        kv = self.projected(x)
        return self.update(x, pair.across(kv[:, :, 0], kv))


class Layer(nn.Module):
    """Self-attention, then cross-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_block, self.cross_block = SelfBlock(dim, heads), CrossBlock(dim, heads)

    def forward(self, x: torch.Tensor, encoding: Encoding, pair: PairAttention) -> torch.Tensor:
        """[B, M + N, D] to the same shape."""
        return self.cross_block(self.self_block(x, encoding, pair), pair)


class Assignment(nn.Module):
    """Similarity and matchability of the keypoints to assignment scores (section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.25
        self.matchability = nn.Linear(dim, 1)
        self.final_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, pair: PairAttention) -> torch.Tensor:
        """[B, M + N, D] to the logarithms of the scores, float32 [B, M, N]."""
        projected = self.final_proj(x) * self.scale
        similarity = (
            projected[:, : pair.first] @ projected[:, pair.first :].transpose(1, 2)
        ).float()
        certainty = F.logsigmoid(self.matchability(x).float())  # [B, M + N, 1]
        certainty = certainty[:, : pair.first] + certainty[:, pair.first :].transpose(1, 2)
        if pair.bias is not None:
            bias = pair.bias[:, 0].float()  # [B, 1, M + N]
            bias = bias[..., : pair.first].transpose(1, 2) + bias[..., pair.first :]
            similarity, certainty = similarity + bias, certainty + bias
        return similarity.log_softmax(2) + similarity.log_softmax(1) + certainty

    def matchable(self, x: torch.Tensor) -> torch.Tensor:
        """[B, M + N, D] to the probability that each keypoint has a partner, [B, M + N]."""
        return self.matchability(x).float().sigmoid().squeeze(2)


class TokenConfidence(nn.Module):
    """Whether a keypoint's prediction would stay the same in later layers (section 3.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Sequential(nn.Linear(dim, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, M + N, D] to confidences in [0, 1], [B, M + N]."""
        return self.token(x.float()).squeeze(2)


def fused_attention(q, k, v, bias) -> torch.Tensor:
    """PyTorch's scaled dot-product attention; see `Attention` for the shapes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def normalize_keypoints(keypoints: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Pixels [B, N, 2] to [-1, 1] along the longer side, given sizes [B, 2] (width, height)."""
    size = size[:, None]
    return (keypoints - size / 2) / (size.amax(dim=2, keepdim=True) / 2)


def mutual_best(log_scores: torch.Tensor, threshold: float) -> Output:
    """The pairs of [B, M, N] that are the best of both their row and column."""
    best0, best1 = log_scores.max(dim=2), log_scores.max(dim=1)
    return filter_matches(best0.values, best0.indices, best1.indices, threshold)


def filter_matches(
    best: torch.Tensor, partner0: torch.Tensor, partner1: torch.Tensor, threshold: float
) -> Output:
    """`Output` of each row's best logarithm and its column [B, M], and each column's row [B, N]."""
    rows = torch.arange(partner0.shape[1], device=partner0.device)
    mutual = partner1.gather(1, partner0) == rows
    scores = torch.where(mutual, best.exp(), 0.0)
    return Output(torch.where(scores > threshold, partner0, -1), scores)


class LightGlue(nn.Module, Matcher):
    """LightGlue with nine layers for descriptors of length 128.

    Its weights are random: see `from_pretrained`.

    `filter_threshold` is the lowest score of a match. `depth_confidence` and `width_confidence`, of
    `match` alone, trade exactness for time (the paper's are 0.95 and 0.99): stop once this share of
    the keypoints is certain of its partner, and drop keypoints that with this certainty have none.
    None, the default, runs every layer on every keypoint.
    """

    def __init__(
        self,
        filter_threshold: float = 0.1,
        depth_confidence: float | None = None,
        width_confidence: float | None = None,
        descriptor_dim: int = LIGHTGLUE_DIM,
        dim: int = 256,
        heads: int = 4,
        layers: int = 9,
    ) -> None:
        super().__init__()
        _check_share("filter_threshold", filter_threshold)
        for name, value in (
            ("depth_confidence", depth_confidence),
            ("width_confidence", width_confidence),
        ):
            if value is not None:
                _check_share(name, value)
        self.filter_threshold, self.precision = filter_threshold, "fp32"
        self.depth_confidence, self.width_confidence = depth_confidence, width_confidence
        self.attention: Attention = fused_attention
        self.select: Callable[[torch.Tensor, float], Output] = mutual_best
        self.input_proj = nn.Linear(descriptor_dim, dim)
        self.posenc = PositionEncoding(dim // heads)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.log_assignment = nn.ModuleList(Assignment(dim) for _ in range(layers))
        self.token_confidence = nn.ModuleList(TokenConfidence(dim) for _ in range(layers - 1))
        self.register_load_state_dict_pre_hook(_take_published_names)

    @classmethod
    def from_pretrained(
        cls,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        **options: float | None,
    ) -> "LightGlue":
        """The matcher with its published weights for ALIKED, ready for inference on `device`.

        `weights` is the file or a folder that holds it; by default `$ALIKED_WEIGHTS_DIR`, the user
        cache and the download in turn. `options` are those of the class. Raises `InputError` where
        the weights are missing or others.
        """
        device = choose_device(device)
        with torch.device("meta"):  # random weights would only be thrown away
            model = cls(**options)
        state = load_state_dict(LIGHTGLUE, weights)
        try:
            if not all(rows.is_floating_point() for rows in state.values()):
                raise TypeError("they are no floats")
            model.load_state_dict({k: rows.float() for k, rows in state.items()}, assign=True)
        except (RuntimeError, KeyError, IndexError, TypeError) as error:
            # `_take_published_names` finds what is not there, PyTorch what has another shape.
            raise InputError(
                f"{find_weights(LIGHTGLUE, weights)} does not hold LightGlue's weights "
                f"({first_line(error)}); give {LIGHTGLUE}.pth"
            ) from error
        return model.eval().requires_grad_(False).set_precision(precision).to(device)

    def set_precision(self, precision: str) -> "LightGlue":
        """Run in "fp32", or in "fp16": half-precision rows, projections and products.

        Positions, sums, every softmax and the scores stay float32.
        """
        for part in (self.input_proj, self.layers, self.log_assignment):
            part.to(dtype_of(precision))
        self.precision = precision
        return self

    @property
    def descriptor_dim(self) -> int:
        """Length of the descriptors that it matches."""
        return self.input_proj.in_features

    def forward(
        self,
        keypoints0: torch.Tensor,
        descriptors0: torch.Tensor,
        keypoints1: torch.Tensor,
        descriptors1: torch.Tensor,
        size0: torch.Tensor,
        size1: torch.Tensor,
        mask0: torch.Tensor | None = None,
        mask1: torch.Tensor | None = None,
    ) -> Output:
        """Keypoints [B, M, 2] in pixels, descriptors [B, M, 128] and the second image's N, matched.

        Sizes are [B, 2], width and height in pixels. Masks, bool [B, M] and [B, N], both or none,
        are True for keypoints; other rows, whatever they hold, match nothing and change nothing.
        All layers run; nothing here waits for the device, and no shape depends on the data.
        """
        if 0 in (keypoints0.shape[1], keypoints1.shape[1]):
            return _no_partners(keypoints0)
        dtype, bias = self.input_proj.weight.dtype, None
        descriptors, mask = torch.cat((descriptors0, descriptors1), dim=1), None
        if mask0 is not None:
            mask = torch.cat((mask0, mask1), dim=1)
            descriptors = torch.where(mask[:, :, None], descriptors, 0.0)  # 0 * NaN would be NaN
            bias = torch.where(mask, 0.0, PADDED).to(dtype)[:, None, None]
        first, equal = keypoints0.shape[1], keypoints0.shape[1] == keypoints1.shape[1]
        pair = PairAttention(first, equal, bias, self.attention)
        encoding = self.encode(keypoints0, keypoints1, size0, size1, mask)
        x = self.input_proj(descriptors.to(dtype))
        for layer in self.layers:
            x = self.run_layer(layer, x, encoding, pair)
        return self.assign(x, pair)

    def encode(
        self,
        keypoints0: torch.Tensor,
        keypoints1: torch.Tensor,
        size0: torch.Tensor,
        size1: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> Encoding:
        """The encoding of the keypoints of both images, in pixels."""
        keypoints = torch.cat(
            (normalize_keypoints(keypoints0, size0), normalize_keypoints(keypoints1, size1)), dim=1
        )
        if mask is not None:
            keypoints = torch.where(mask[:, :, None], keypoints, 0.0)
        return self.posenc(keypoints, self.input_proj.weight.dtype)

    def run_layer(
        self, layer: Layer, x: torch.Tensor, encoding: Encoding, pair: PairAttention
    ) -> torch.Tensor:
        """Rows [B, M + N, D] to the same shape."""
        return layer(x, encoding, pair)

    def assign(self, x: torch.Tensor, pair: PairAttention) -> Output:
        """Rows [B, M + N, D] after all layers to `Output`."""
        return self.select(self.log_assignment[-1](x, pair), self.filter_threshold)

    def embed(
        self, keypoints: torch.Tensor, descriptors: torch.Tensor
    ) -> tuple[torch.Tensor, Encoding]:
        """Normalised keypoints and descriptors to rows [B, M + N, D] and their encoding."""
        dtype = self.input_proj.weight.dtype
        return self.input_proj(descriptors.to(dtype)), self.posenc(keypoints, dtype)

    @torch.inference_mode()
    def prepare(self, features: Features, size: Size) -> Prepared:
        """What `match` needs of an image, on the model's device; size is (width, height), pixels.

        Raises `InputError` for descriptors of another length, for a size that is not two positive
        numbers, and for features that are not finite.
        """
        check_matchable(features, size, self.descriptor_dim)
        device = self.input_proj.weight.device
        keypoints, descriptors, size = (
            torch.tensor(np.ascontiguousarray(rows, np.float32), device=device)[None]
            for rows in (features.keypoints, features.descriptors, size)
        )
        return Prepared(normalize_keypoints(keypoints, size), descriptors)

    @torch.inference_mode()
    def match_prepared(self, first: Prepared, second: Prepared) -> Matches:
        """Matches of what `prepare` made of two images, adaptively where that is switched on."""
        if 0 in (first.keypoints.shape[1], second.keypoints.shape[1]):
            return NO_MATCHES
        rows = (torch.cat(sides, dim=1) for sides in zip(first, second, strict=True))
        return self._match_adaptively(*rows, first.keypoints.shape[1])

    def _match_adaptively(
        self, keypoints: torch.Tensor, descriptors: torch.Tensor, first: int
    ) -> Matches:
        """Matches of one pair, whose first image has the first `first` rows."""
        x, encoding = self.embed(keypoints, descriptors)
        total, kept = x.shape[1], torch.arange(x.shape[1], device=x.device)
        m = first  # of the first image's keypoints, those that are left
        for number, layer in enumerate(self.layers):
            pair = PairAttention(m, 2 * m == len(kept), None, self.attention)
            x = layer(x, encoding, pair)
            if number == len(self.layers) - 1:
                break
            uncertain = self._uncertain(x, number)
            if self._stops(uncertain, total):
                break
            if self.width_confidence is not None:
                stays = uncertain | (
                    self.log_assignment[number].matchable(x)[0] > 1 - self.width_confidence
                )
                x, kept = x[:, stays], kept[stays]
                encoding = Encoding(encoding.cos[:, stays], encoding.sin[:, stays])
                m = int(stays[:m].sum())
                if m in (0, len(kept)):
                    return replace(NO_MATCHES, layers=number + 1)
        output = self.select(self.log_assignment[number](x, pair), self.filter_threshold)
        matches0, scores0 = (rows[0] for rows in output)
        matched = matches0 >= 0
        i, j = kept[:m][matched], kept[m:][matches0[matched]] - first
        indices = torch.stack((i, j), dim=1)
        return Matches(indices.cpu().numpy(), scores0[matched].cpu().numpy(), number + 1)

    def _stops(self, uncertain: torch.Tensor, total: int) -> bool:
        """Whether few enough of `total` keypoints are uncertain; dropped ones are certain."""
        if self.depth_confidence is None:
            return False
        return bool(1 - uncertain.sum() / total > self.depth_confidence)

    def _uncertain(self, x: torch.Tensor, number: int) -> torch.Tensor:
        """[M + N] bool: whose confidence after layer `number` is below the paper's threshold."""
        if self.depth_confidence is None:
            return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        threshold = 0.8 + 0.1 * math.exp(-4 * number / len(self.layers))
        return self.token_confidence[number](x)[0] < threshold


def _check_share(name: str, value: float) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise InputError(f"{name} is {shown(value)}; it must be between 0 and 1")


def _no_partners(keypoints: torch.Tensor) -> Output:
    """The `Output` of keypoints [B, M, 2] that have no other image's to match."""
    matches0 = torch.full(keypoints.shape[:2], -1, device=keypoints.device)
    return Output(matches0, torch.zeros(keypoints.shape[:2], device=keypoints.device))


def _take_published_names(model: LightGlue, state: dict[str, torch.Tensor], *_) -> None:
    """Replace the published tensors of every layer in `state` by those of this module.

    The published `Wqkv` has its rows in the order head, channel, projection, and its neighbouring
    channels rotate together; here channel i rotates with i + d / 2. What attention gathers goes
    through a linear layer and, with nothing in between, through the first of `ffn`: here they are
    one, which saves a tenth of the products.
    """
    for number, layer in enumerate(model.layers):
        theirs, ours = f"transformers.{number}", f"layers.{number}"
        if f"{theirs}.self_attn.Wqkv.weight" not in state:
            return
        heads = layer.self_block.heads
        for part in ("weight", "bias"):
            qkv = state.pop(f"{theirs}.self_attn.Wqkv.{part}")
            state[f"{ours}.self_block.project.{part}"] = _sort_projections(qkv, heads)
            state[f"{ours}.cross_block.project.{part}"] = torch.cat(
                [state.pop(f"{theirs}.cross_attn.{name}.{part}") for name in ("to_qk", "to_v")]
            )
        _merge_output(state, f"{theirs}.self_attn", "out_proj", f"{ours}.self_block")
        _merge_output(state, f"{theirs}.cross_attn", "to_out", f"{ours}.cross_block")


def _sort_projections(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order head, channel, projection to projection, head, channel.

    Of queries and keys the even channels, then the odd ones: their scalar products stay the same.
    """
    q, k, v = qkv.unflatten(0, (heads, -1, 3)).unbind(2)
    q, k = (torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1) for rows in (q, k))
    return torch.stack((q, k, v)).flatten(0, 2)


def _merge_output(state: dict[str, torch.Tensor], theirs: str, output: str, ours: str) -> None:
    """Move a block's `ffn` to its name here, with the layer `output` in its first."""
    weight, bias = (state.pop(f"{theirs}.{output}.{part}").double() for part in ("weight", "bias"))
    first = state.pop(f"{theirs}.ffn.0.weight").double()
    of_rows, of_context = first.chunk(2, dim=1)
    added = state.pop(f"{theirs}.ffn.0.bias").double() + of_context @ bias
    state[f"{ours}.ffn.0.weight"] = torch.cat((of_rows, of_context @ weight), dim=1).float()
    state[f"{ours}.ffn.0.bias"] = added.float()
    for name in [name for name in state if name.startswith(f"{theirs}.ffn.")]:
        state[name.replace(theirs, ours)] = state.pop(name)
