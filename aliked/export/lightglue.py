"""LightGlue as an ONNX file, alone or from two images on, and the proof that it still is."""

import contextlib
import copy
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import nn

from aliked.backends.onnxruntime_lightglue import (
    ColmapMatcher,
    ONNXRuntimeMatcher,
    ONNXRuntimePair,
)
from aliked.backends.pytorch_lightglue import MatcherGraph, PairGraph
from aliked.configs import STRIDE
from aliked.errors import InputError
from aliked.export.deform_conv_onnx import standard_deform_conv
from aliked.export.onnx_export import (
    OPSETS,
    check_room,
    exporting,
    in_exported_form,
    silence,
    trace,
)
from aliked.export.onnx_graph import spell_out_selu
from aliked.features import Features
from aliked.files import whole_file
from aliked.lightglue import LightGlue, Output, filter_matches
from aliked.matching import Size
from aliked.model import ALIKED
from aliked.parity import (
    MATCH_TOLERANCES,
    MatchParity,
    Verdict,
    compare_matches,
    compare_pair,
    judge_matches,
)

SYMBOLIC_EXAMPLE = (12, 9)  # keypoints of each image: unequal, so that the trace keeps both counts


@dataclass(frozen=True)
class MatcherOptions:
    """How to write the matcher alone."""

    top_k: int | None  # rows per image; None: as many as are given, with a batch as large
    opset: int = 19
    io: str = "default"  # or "colmap", whose counts are always symbolic


@dataclass(frozen=True)
class PairOptions:
    """How to write the file from two images to matches."""

    size0: tuple[int, int]  # width and height in pixels
    size1: tuple[int, int]
    opset: int = 19
    deform_conv: str = "gridsample"  # or "gather": both of standard operators
    dynamic: bool = False  # batch, heights and widths symbolic
    uint8_input: bool = False  # uint8 [B, H, W, 3] instead of float32 [B, 3, H, W]


class ColmapMatcherGraph(nn.Module):
    """COLMAP's contract: one pair, counts decided when the file runs, outputs without a batch.

    Every mutual best pair is a match: COLMAP itself drops those below its option `min_score`.
    """

    input_names = ("kpts0", "kpts1", "desc0", "desc1", "image_size0", "image_size1")
    output_names = ("matches0", "mscores0")

    def __init__(self, matcher: LightGlue):
        super().__init__()
        self.matcher = matcher

    def forward(self, k0, k1, d0, d1, size0, size1) -> tuple[torch.Tensor, ...]:
        """The outputs in the order of `output_names`."""
        return tuple(rows[0] for rows in self.matcher(k0, d0, k1, d1, size0, size1))


def attention_in_steps(q, k, v, bias) -> torch.Tensor:
    """`fused_attention` as two products and a softmax in float32, which TensorRT fuses itself."""
    logits = ((q * float(q.shape[-1]) ** -0.5) @ k.transpose(2, 3)).float()
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=3).to(v.dtype) @ v


def mutual_best_by_comparison(log_scores: torch.Tensor, threshold: float) -> Output:
    """`mutual_best` from maxima and comparisons: TensorRT knows an argmax only as a sort (TopK)."""
    best0, best1 = log_scores.amax(dim=2, keepdim=True), log_scores.amax(dim=1, keepdim=True)
    partner0 = _first(log_scores == best0, dim=2)
    partner1 = _first(log_scores == best1, dim=1)
    return filter_matches(best0.squeeze(2), partner0, partner1, threshold)


def mutual_best_of_any(log_scores: torch.Tensor, threshold: float) -> Output:
    """`mutual_best_by_comparison` of any counts: of no keypoints there would be no maximum."""
    with_one_more = F.pad(log_scores, (0, 1, 0, 1), value=-torch.inf)
    output = mutual_best_by_comparison(with_one_more, threshold)
    return Output(*(rows[:, :-1] for rows in output))


def _first(found: torch.Tensor, dim: int) -> torch.Tensor:
    """Where the first True of [B, M, N] is along `dim`, int64; the last place where none is."""
    places = torch.arange(found.shape[dim], dtype=torch.float32, device=found.device)
    last = places[-1]
    places = places[:, None] if dim == 1 else places
    return torch.where(found, places, last).amin(dim=dim).long()


@contextlib.contextmanager
def written_in_steps(
    matcher: LightGlue, threshold: float, counts_open: bool = False
) -> Iterator[None]:
    """The matcher in the operators that a file is made of, with its threshold, until the end.

    With `counts_open` the numbers of keypoints are decided when the file runs, 0 among them.
    """
    written = {
        "attention": attention_in_steps,
        "select": mutual_best_of_any if counts_open else mutual_best_by_comparison,
        "filter_threshold": threshold,
    }
    usual = {name: getattr(matcher, name) for name in written}
    try:
        vars(matcher).update(written)
        yield
    finally:
        vars(matcher).update(usual)


def export_matcher(matcher: LightGlue, path: Path, options: MatcherOptions) -> onnx.ModelProto:
    """Write the matcher to `path`, whole or not at all, checked by ONNX's full checker.

    Returns what was written. Raises `InputError` for options that cannot give a right file.
    """
    _check_opset(options.opset)
    if options.top_k is not None and options.top_k < 1:
        raise InputError(f"top_k is {options.top_k}; a file matches at least 1 keypoint an image")
    colmap = options.io == "colmap"
    matcher = copy.copy(matcher)  # as others may run it meanwhile
    graph = (ColmapMatcherGraph if colmap else MatcherGraph)(matcher).eval()
    threshold = 0.0 if colmap else matcher.filter_threshold
    with exporting, written_in_steps(matcher, threshold, colmap or options.top_k is None):
        inputs = _example_features(matcher, options)
        proto = _trace(graph, inputs, _matcher_axes(options), options.opset)
    facts = {"graph": "matcher", "filter_threshold": threshold, **asdict(options)}
    return _write(proto, path, matcher, facts)


def export_pair(
    model: ALIKED, matcher: LightGlue, path: Path, options: PairOptions
) -> onnx.ModelProto:
    """Write extractor and matcher as one file, as `export_matcher` does.

    `model` selects by `top_k`; its descriptors must be of the matcher's length.
    """
    _check_opset(options.opset)
    if model.dim != matcher.descriptor_dim:
        raise InputError(
            f"{model.name}'s descriptors are {model.dim} long, these LightGlue weights match "
            f"descriptors of length {matcher.descriptor_dim}; choose another --model"
        )
    if model.top_k <= 0:
        raise InputError("a file from images to matches has a fixed number of rows; pass --top_k")
    for size in (options.size0, options.size1):
        check_room(model.top_k, *size)
    model, matcher = in_exported_form(model, options.dynamic), copy.copy(matcher)
    sizes = None if options.dynamic else (options.size0, options.size1)
    graph = PairGraph(model, matcher, options.uint8_input, sizes).eval()
    examples = dict(zip(graph.input_names, (options.size0, options.size1), strict=True))
    inputs = {name: _example_image(size, options) for name, size in examples.items()}
    threshold = matcher.filter_threshold
    with (
        exporting,
        standard_deform_conv(options.deform_conv, options.opset),
        written_in_steps(matcher, threshold),
    ):
        proto = _trace(graph, inputs, _pair_axes(graph, options), options.opset)
    _name_rows(proto, model.top_k, options.dynamic)
    facts = {
        "graph": "pair",
        "filter_threshold": threshold,
        "model": model.name,
        "top_k": model.top_k,
        **asdict(options),
    }
    return _write(proto, path, matcher, facts)


def _check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not written; pass 17, 18 or 19")


def _example_features(matcher: LightGlue, options: MatcherOptions) -> dict[str, torch.Tensor]:
    """Random inputs by name, of the file's counts; of unequal ones where it leaves them open."""
    colmap = options.io == "colmap"
    counts = (options.top_k,) * 2 if options.top_k and not colmap else SYMBOLIC_EXAMPLE
    batch = 1 if options.top_k or colmap else 2
    by_name = {}
    for side, count in enumerate(counts):
        features = {
            "keypoints": torch.rand(batch, count, 2) * 100,
            "descriptors": torch.rand(batch, count, matcher.descriptor_dim),
            "mask": torch.ones(batch, count, dtype=torch.bool),
            "size": torch.full((batch, 2), 100.0),
        }
        by_name |= {f"{name}{side}": tensor for name, tensor in features.items()}
    if colmap:
        names = (
            f"{name}{side}" for name in ("keypoints", "descriptors", "size") for side in (0, 1)
        )
        values = [by_name[name] for name in names]
        return dict(zip(ColmapMatcherGraph.input_names, values, strict=True))
    return by_name


def _matcher_axes(options: MatcherOptions) -> dict[str, dict[int, str]]:
    """The axes of inputs and outputs that stay symbolic, and their names."""
    counts = ("num_keypoints0", "num_keypoints1")
    if options.io == "colmap":
        names = (("kpts", "desc"), counts)
        axes = {f"{name}{side}": {1: counts[side]} for side in (0, 1) for name in names[0]}
        return axes | {name: {0: counts[0]} for name in ColmapMatcherGraph.output_names}
    if options.top_k is not None:
        return {}
    axes = {}
    for side in (0, 1):
        rows = {0: "batch", 1: counts[side]}
        axes |= {f"{name}{side}": rows for name in ("keypoints", "descriptors", "mask")}
        axes[f"size{side}"] = {0: "batch"}
    return axes | {name: {0: "batch", 1: counts[0]} for name in MatcherGraph.output_names}


def _example_image(size: tuple[int, int], options: PairOptions) -> torch.Tensor:
    """A random image; of sides that need no padding where the file leaves them open."""
    width, height = size
    if options.dynamic:
        width, height = (math.ceil(side / STRIDE) * STRIDE for side in size)
    if options.uint8_input:
        return torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    return torch.rand(1, 3, height, width)


def _pair_axes(graph: PairGraph, options: PairOptions) -> dict[str, dict[int, str]]:
    """The axes of inputs and outputs that stay symbolic, and their names."""
    if not options.dynamic:
        return {}
    rows, columns = (1, 2) if options.uint8_input else (2, 3)
    axes = {
        f"image{side}": {0: "batch", rows: f"height{side}", columns: f"width{side}"}
        for side in (0, 1)
    }
    return axes | {name: {0: "batch"} for name in graph.output_names}


def _trace(
    graph: nn.Module,
    inputs: dict[str, torch.Tensor],
    axes: dict[str, dict[int, str]],
    opset: int,
) -> onnx.ModelProto:
    """The graph through TorchScript, whose exporter has the standard operators of ALIKED."""
    with torch.inference_mode(), silence(True):
        return trace(graph, {name: inputs[name] for name in graph.input_names}, axes, opset)


def _name_rows(proto: onnx.ModelProto, top_k: int, dynamic: bool) -> None:
    """Declare the outputs' axes of batch and keypoints, which the exporter leaves unknown."""
    for output in proto.graph.output:
        batch, keypoints = output.type.tensor_type.shape.dim[:2]
        keypoints.dim_value = top_k
        if dynamic:
            batch.dim_param = "batch"


def _write(proto: onnx.ModelProto, path: Path, matcher: LightGlue, facts: dict) -> onnx.ModelProto:
    """Save the file with `facts` as its metadata."""
    facts = {"precision": matcher.precision} | facts
    metadata = {f"lightglue.{name}": json.dumps(value) for name, value in facts.items()}
    onnx.helper.set_model_props(proto, metadata)
    spell_out_selu(proto)
    onnx.checker.check_model(proto, full_check=True)
    with whole_file(path) as partial:
        onnx.save(proto, partial)
    return proto


class Pair(NamedTuple):
    """Features of two images."""

    name: str
    features0: Features
    features1: Features
    size0: Size  # (width, height), pixels
    size1: Size


def with_fewer(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Each pair as it is, and with so few keypoints that a file must mask the rest."""
    for pair in pairs:
        yield pair
        half = len(pair.features1) // 2
        for count0, count1 in ((len(pair.features0), half), (half, 7), (1, half), (0, half)):
            yield pair._replace(
                name=f"{pair.name}, the best {count0} and {count1}",
                features0=best(pair.features0, count0),
                features1=best(pair.features1, count1),
            )


def best(features: Features, count: int) -> Features:
    """The first `count` keypoints, which in top-k mode are the best."""
    return Features(
        features.keypoints[:count], features.scores[:count], features.descriptors[:count]
    )


def verify_matcher(
    path: Path, reference: LightGlue, precision: str, options: MatcherOptions, pairs: Iterable[Pair]
) -> Verdict:
    """Compare the file's matches with those of `reference`, the float32 matcher, pair by pair.

    `precision` ("fp32" or "fp16") is that of the file and chooses the tolerance.
    """
    colmap = options.io == "colmap"
    other = (ColmapMatcher if colmap else ONNXRuntimeMatcher)(path, device="cpu")
    parities = {
        name: compare_matches(reference.match(*pair), other.match(*pair))
        for name, *pair in with_fewer(pairs)
    }
    return judge_matches(parities, MATCH_TOLERANCES["matcher", precision])


def verify_pair(
    path: Path,
    model: ALIKED,
    matcher: LightGlue,
    precision: str,
    pairs: Iterable[tuple[str, np.ndarray, np.ndarray]],
) -> Verdict:
    """Compare a file's matches of two images with those of the float32 `model` and `matcher`.

    `pairs` are a name and two images, uint8 [H, W, 3] RGB. The keypoints of both are paired first,
    so that a keypoint which the file finds elsewhere loses its match.
    """
    run = ONNXRuntimePair(path, device="cpu")
    parities = {
        name: _compare_pair(run, model, matcher, image0, image1) for name, image0, image1 in pairs
    }
    return judge_matches(parities, MATCH_TOLERANCES["pair", precision])


def _compare_pair(
    run: ONNXRuntimePair, model: ALIKED, matcher: LightGlue, image0: np.ndarray, image1: np.ndarray
) -> MatchParity:
    features = model.extract(image0), model.extract(image1)
    expected = matcher.match(*features, *(image.shape[1::-1] for image in (image0, image1)))
    found = run(image0, image1)
    return compare_pair(features, expected, (found.keypoints0, found.keypoints1), found.matches)
