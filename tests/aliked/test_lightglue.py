"""LightGlue is the published matcher, in every form in which it runs here."""

import argparse
import copy
import dataclasses
import functools
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from aliked import cli
from aliked.backends import (
    Spec,
    create_pair_runtime,
    fused_lightglue,
)
from aliked.backends.onnxruntime_lightglue import (
    ColmapMatcher,
    ONNXRuntimeMatcher,
    ONNXRuntimePair,
)
from aliked.backends.tensorrt import manifest_path
from aliked.backends.tensorrt_library import RTX, tf32_is_off
from aliked.commands import export_lightglue
from aliked.errors import InputError
from aliked.export import build
from aliked.export.builder import BuildOptions, build_plan
from aliked.export.engine import read_source
from aliked.export.lightglue import (
    MatcherOptions,
    Pair,
    PairOptions,
    best,
    export_matcher,
    export_pair,
    verify_matcher,
    verify_pair,
)
from aliked.export.rtx_graph import sum_in_float32
from aliked.features import Features
from aliked.fused import pipeline, reference
from aliked.fused.weights import pack as pack_weights
from aliked.images import list_images, load_image
from aliked.lightglue import LightGlue, PairAttention, fused_attention
from aliked.matching import Matches, MutualMatcher, matcher_inputs, matches_of_rows
from aliked.model import ALIKED
from aliked.parity import (
    MATCH_FP16,
    MATCH_FP32,
    PAIR_FP16,
    PAIR_FP32,
    compare_matches,
    compare_pair,
    in_terms_of,
    judge_matches,
)
from aliked.weights import LIGHTGLUE, find_weights
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.textures import texture

SIZE = (640, 480)
GOLDENS = (
    "aliked-n16__tum__k512",
    "aliked-n16rot__tum__k1000",
    "aliked-n16rot__kitti__k1000",
    "aliked-n16__cathedral__k2000",
)
RANK = {"kpts": 3, "desc": 3, "image_size": 2}  # as COLMAP checks them
ROUNDING = 2e-5  # of logarithms and scores: sums of other orders


def small_matcher(**options):
    """Random weights, in which a keypoint is still most similar to itself."""
    torch.manual_seed(0)
    shape = {"descriptor_dim": 32, "dim": 64, "heads": 2, "layers": 2}
    matcher = LightGlue(**(shape | options)).eval().requires_grad_(False)
    matcher.input_proj.weight *= 10
    for assignment in matcher.log_assignment:
        assignment.final_proj.weight *= 2
        assignment.matchability.bias += 4
    return matcher


def features_of(count, seed, dim=32):
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(count, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    keypoints = (rng.random((count, 2)) * SIZE).astype(np.float32)
    return Features(keypoints, np.full(count, 0.5, np.float32), descriptors)


def moved(features, count, seed=9):
    """`count` of the features in another order, with noise: the second image."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(features))[:count]
    descriptors = features.descriptors[order]
    noise = rng.normal(size=descriptors.shape).astype(np.float32)
    return Features(
        features.keypoints[order] + 3, features.scores[order], descriptors + 0.02 * noise
    )


def tensors(features, rows=None, fill=0.0):
    """Keypoints, descriptors and mask, each with a batch of one, padded to `rows`."""
    count = len(features)
    padding = (0, 0, 0, (rows or count) - count)
    keypoints, descriptors = (
        F.pad(torch.from_numpy(array), padding, value=fill)[None]
        for array in (features.keypoints, features.descriptors)
    )
    return keypoints, descriptors, (torch.arange(keypoints.shape[1]) < count)[None]


def forward(matcher, features0, features1, rows=None, fill=0.0):
    (k0, d0, mask0), (k1, d1, mask1) = (
        tensors(features, rows, fill) for features in (features0, features1)
    )
    sizes = (torch.tensor([SIZE], dtype=torch.float32),) * 2
    with torch.inference_mode():
        return matcher(k0, d0, k1, d1, *sizes, *((mask0, mask1) if rows else ()))


def pairs_of(matches0):
    return [(i, j) for i, j in enumerate(matches0.tolist()) if j >= 0]


@pytest.fixture(scope="module")
def golden(shared):
    def load(name):
        path = shared / "goldens" / "lightglue" / f"lightglue__{name}.npz"
        if not path.is_file():
            pytest.skip("no reference outputs of LightGlue")
        data = np.load(path)
        sides = [
            Features(
                data[f"keypoints{i}"],
                np.ones(len(data[f"keypoints{i}"]), np.float32),
                data[f"descriptors{i}"],
            )
            for i in (0, 1)
        ]
        return data, Pair(name, *sides, data["size0"], data["size1"])

    return load


@pytest.fixture(scope="module")
def matcher(weights_dir):
    """The official matcher; its options are attributes."""
    if not (weights_dir / f"{LIGHTGLUE}.pth").is_file():
        pytest.skip("no LightGlue weights")
    return LightGlue.from_pretrained(weights_dir)


def check_golden(found, partners, scores):
    """The same partner for all but two keypoints, which may be equal scores; scores within 1e-4."""
    mine, my_scores = np.full(len(partners), -1), np.zeros(len(partners))
    mine[found.indices[:, 0]], my_scores[found.indices[:, 0]] = found.indices[:, 1], found.scores
    assert (mine != partners).sum() <= 2
    both = (mine == partners) & (partners >= 0)
    assert np.abs(my_scores - scores)[both].max() <= 1e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_the_official_matches_are_reproduced(name, golden, matcher):
    data, pair = golden(name)
    found = matcher.match(*pair[1:])
    check_golden(found, data["matches0"], data["mscores0"])


@pytest.mark.parametrize("name", GOLDENS)
def test_the_official_adaptive_matches_and_layers_are_reproduced(
    name, golden, matcher, monkeypatch
):
    data, pair = golden(name)
    monkeypatch.setattr(matcher, "depth_confidence", 0.95)
    monkeypatch.setattr(matcher, "width_confidence", 0.99)
    found = matcher.match(*pair[1:])
    check_golden(found, data["adaptive_matches0"], data["adaptive_mscores0"])
    assert found.layers == data["adaptive_stop"]


def test_half_precision_keeps_the_matches(golden, matcher, weights_dir):
    _, pair = golden(GOLDENS[0])
    reference = matcher.match(*pair[1:])
    half = LightGlue.from_pretrained(weights_dir, precision="fp16").match(*pair[1:])
    verdict = judge_matches({pair.name: compare_matches(reference, half)}, MATCH_FP16)
    assert verdict.passed, verdict.text


def test_published_tensors_give_the_published_self_attention():
    """Interleaved projections, neighbouring channels rotated, an output layer before the rest."""
    torch.manual_seed(0)
    matcher = small_matcher(layers=1).double()
    heads, dim, count = 2, 64, 5
    state = published_state(matcher, dim)
    x, keypoints = torch.randn(1, count, dim).double(), torch.rand(1, count, 2).double()

    def of(name, rows):
        return F.linear(rows, state[f"{name}.weight"], state[f"{name}.bias"])

    angles = F.linear(keypoints, state["posenc.Wr.weight"]).repeat_interleave(2, dim=-1)[:, None]

    def rotate(rows):
        a, b = rows.unflatten(-1, (-1, 2)).unbind(-1)
        return rows * angles.cos() + torch.stack((-b, a), -1).flatten(-2) * angles.sin()

    block = "transformers.0.self_attn"
    q, k, v = of(f"{block}.Wqkv", x).unflatten(-1, (heads, -1, 3)).transpose(1, 2).unbind(-1)
    logits = rotate(q) @ rotate(k).mT / (dim // heads) ** 0.5
    context = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    hidden = of(f"{block}.ffn.0", torch.cat((x, of(f"{block}.out_proj", context)), -1))
    norm = [state[f"{block}.ffn.1.{part}"] for part in ("weight", "bias")]
    expected = x + of(f"{block}.ffn.3", F.gelu(F.layer_norm(hidden, (2 * dim,), *norm)))

    matcher.load_state_dict(state, strict=True)
    found = self_attention(matcher, x, keypoints)
    # The merged weights are rounded to float32 when they are loaded.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def published_state(matcher, dim):
    """Random tensors under the published names."""
    layers = {"Wqkv": (3 * dim, dim), "out_proj": (dim, dim), "ffn.0": (2 * dim, 2 * dim)}
    layers |= {"ffn.1": (2 * dim,), "ffn.3": (dim, 2 * dim)}
    cross = {"to_qk": (dim, dim), "to_v": (dim, dim), "to_out": (dim, dim)}
    cross |= {name: shape for name, shape in layers.items() if name.startswith("ffn")}
    state = {name: t for name, t in matcher.state_dict().items() if not name.startswith("layers")}
    for block, shapes in (("self_attn", layers), ("cross_attn", cross)):
        for name, shape in shapes.items():
            weight, bias = torch.randn(shape) / 8, torch.randn(shape[:1]) / 8
            state |= {f"transformers.0.{block}.{name}.weight": weight.double()}
            state |= {f"transformers.0.{block}.{name}.bias": bias.double()}
    return state


def self_attention(matcher, x, keypoints):
    encoding = matcher.posenc(keypoints, torch.float64)
    # The second image is the first again: both see themselves alone.
    encoding = type(encoding)(*(torch.cat((rows, rows), dim=1) for rows in encoding))
    pair = PairAttention(x.shape[1], True, None, fused_attention)
    both = matcher.layers[0].self_block(torch.cat((x, x), dim=1), encoding, pair)
    return both[:, : x.shape[1]]


def test_what_it_saves_it_loads():
    matcher, other = small_matcher(), small_matcher()
    torch.nn.init.zeros_(other.input_proj.weight)
    other.load_state_dict(matcher.state_dict())
    assert torch.equal(other.input_proj.weight, matcher.input_proj.weight)


@pytest.mark.parametrize("counts", [(1, 1), (7, 7), (1, 60), (60, 7), (50, 60)])
def test_padding_changes_nothing_and_matches_nothing(counts):
    matcher = small_matcher()
    features0 = features_of(60, 1)
    features1, features0 = moved(features0, counts[1]), moved(features0, counts[0], seed=3)
    alone = matcher.match(features0, features1, SIZE, SIZE)
    for fill in (0.0, 1e4, float("nan")):
        padded = forward(matcher, features0, features1, rows=64, fill=fill)
        assert pairs_of(padded.matches0[0]) == [tuple(row) for row in alone.indices.tolist()]
        scores = padded.scores0[0].numpy()[alone.indices[:, 0]]
        np.testing.assert_allclose(scores, alone.scores, atol=ROUNDING)
        assert (padded.matches0[0, counts[0] :] == -1).all()
        assert (padded.scores0[0, counts[0] :] == 0).all()


def test_the_small_matcher_finds_what_was_moved():
    """Guards the other tests: with no matches they would compare nothing."""
    features = features_of(60, 1)
    assert len(small_matcher().match(features, moved(features, 50), SIZE, SIZE)) >= 40


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (0, 0)])
def test_no_keypoints_give_no_matches(counts):
    matcher = small_matcher()
    features = [features_of(count, seed) for seed, count in enumerate(counts)]
    found = matcher.match(*features, SIZE, SIZE)
    assert found.indices.shape == (0, 2)
    assert found.indices.dtype == np.int64
    assert found.scores.dtype == np.float32
    for rows in (None, 8):  # empty tensors, and padding alone
        output = forward(matcher, *features, rows=rows)
        assert (output.matches0 == -1).all()
        assert (output.scores0 == 0).all()


@pytest.mark.parametrize("counts", [(40, 40), (40, 30)])
def test_a_batch_gives_each_pair_what_it_gets_alone(counts):
    matcher = small_matcher()
    firsts = [features_of(40, seed) for seed in (1, 2)]
    pairs = [(first, moved(first, counts[1], seed)) for seed, first in enumerate(firsts)]
    alone = [forward(matcher, *pair) for pair in pairs]
    batch = [
        torch.cat(rows)
        for rows in zip(*((*tensors(a)[:2], *tensors(b)[:2]) for a, b in pairs), strict=True)
    ]
    sizes = torch.tensor([SIZE, SIZE], dtype=torch.float32)
    with torch.inference_mode():
        together = matcher(*batch, sizes, sizes)
    for i, output in enumerate(alone):
        assert torch.equal(together.matches0[i], output.matches0[0])
        torch.testing.assert_close(together.scores0[i], output.scores0[0], atol=ROUNDING, rtol=0)


def test_each_side_of_the_pair_gives_the_same_matches():
    matcher = small_matcher()
    features0 = features_of(50, 1)
    features1 = moved(features0, 40)
    there = matcher.match(features0, features1, SIZE, SIZE)
    back = matcher.match(features1, features0, SIZE, SIZE)
    assert sorted(map(tuple, back.indices[:, ::-1].tolist())) == [
        tuple(row) for row in there.indices.tolist()
    ]


def test_sizes_matter_by_their_longer_side():
    matcher = small_matcher()
    features0 = features_of(50, 1)
    features1 = moved(features0, 50)
    half = dataclasses.replace(features1, keypoints=features1.keypoints / 2)
    whole = matcher.match(features0, features1, SIZE, SIZE)
    scaled = matcher.match(features0, half, SIZE, (320, 240))
    np.testing.assert_array_equal(scaled.indices, whole.indices)
    np.testing.assert_allclose(scaled.scores, whole.scores, atol=ROUNDING)


def test_certain_keypoints_stop_the_network_early():
    features0 = features_of(50, 1)
    pair = (features0, moved(features0, 40), SIZE, SIZE)
    exact, early = small_matcher(), small_matcher(depth_confidence=0.5)
    for confidence in early.token_confidence:
        confidence.token[0].bias += 10  # as if all were certain
    assert exact.match(*pair).layers == 2
    assert early.match(*pair).layers == 1


def test_hopeless_keypoints_are_dropped_and_the_others_keep_their_indices():
    features0 = features_of(50, 1)
    features1 = moved(features0, 40)
    matcher = small_matcher(width_confidence=0.99)
    exact = small_matcher().match(features0, features1, SIZE, SIZE)
    for assignment in matcher.log_assignment[:-1]:  # random directions: about half have no partner
        assignment.matchability.bias.zero_()
        assignment.matchability.weight *= 100
    found = matcher.match(features0, features1, SIZE, SIZE)
    partner = dict(exact.indices.tolist())
    right = sum(partner.get(i) == j for i, j in found.indices.tolist())
    assert 0 < len(found) < len(exact)
    assert right >= 0.8 * len(found)


def test_without_any_keypoint_left_there_are_no_matches():
    features = features_of(20, 1)
    matcher = small_matcher(width_confidence=0.99)
    matcher.log_assignment[0].matchability.bias.fill_(-1000)
    found = matcher.match(features, moved(features, 20), SIZE, SIZE)
    assert (len(found), found.layers) == (0, 1)


@pytest.mark.parametrize("option", ["filter_threshold", "depth_confidence", "width_confidence"])
def test_a_share_outside_zero_to_one_is_refused(option):
    with pytest.raises(InputError, match=f"{option} is -1"):
        LightGlue(layers=1, **{option: -1})


def test_matches_always_have_a_lowest_score():
    with pytest.raises(InputError, match="filter_threshold is None; it must be between 0 and 1"):
        LightGlue(layers=1, filter_threshold=None)


def test_descriptors_of_another_length_are_refused_by_saying_which_models_fit():
    matcher = LightGlue(layers=1)
    with pytest.raises(
        InputError, match=r"64 long.*128.*aliked-n16 or aliked-n16rot or aliked-n32"
    ):
        matcher.match(features_of(5, 0, dim=64), features_of(5, 1, dim=64), SIZE, SIZE)


@pytest.mark.parametrize("size", [None, 640, (640,), (640, 0), (-640, 480), (640, np.nan), "640"])
def test_a_size_that_is_not_two_positive_numbers_is_refused(size):
    with pytest.raises(InputError, match="give \\(width, height\\) in pixels"):
        small_matcher().match(features_of(5, 0), features_of(5, 1), SIZE, size)


@pytest.mark.parametrize("array", ["keypoints", "descriptors"])
def test_features_that_are_not_numbers_are_refused(array):
    features = features_of(5, 0)
    getattr(features, array)[2, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        small_matcher().match(features_of(5, 1), features, SIZE, SIZE)


def test_weights_of_an_extractor_are_refused(weights_dir):
    with pytest.raises(InputError, match="official aliked-t16 file, not aliked_lightglue"):
        LightGlue.from_pretrained(weights_dir / "aliked-t16.pth")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("input_proj.weight"),
        lambda state: state.pop("transformers.3.cross_attn.to_v.bias"),
        lambda state: state.pop("transformers.0.self_attn.ffn.0.weight"),
        lambda state: state.update({"posenc.Wr.weight": torch.zeros(3, 2)}),
        lambda state: state.update({"input_proj.bias": torch.zeros(256, dtype=torch.int64)}),
    ],
)
def test_weights_with_a_wrong_tensor_are_one_sentence(matcher, weights_dir, tmp_path, change):
    state = torch.load(weights_dir / f"{LIGHTGLUE}.pth", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=r"wrong.pth does not hold LightGlue's weights") as refusal:
        LightGlue.from_pretrained(tmp_path / "wrong.pth")
    assert len(str(refusal.value)) < 600


def test_weights_are_looked_up_like_the_others(weights_dir, cache, monkeypatch):
    monkeypatch.setenv("ALIKED_WEIGHTS_DIR", str(weights_dir))
    if not (weights_dir / f"{LIGHTGLUE}.pth").is_file():
        pytest.skip("no LightGlue weights")
    assert find_weights(LIGHTGLUE) == weights_dir / f"{LIGHTGLUE}.pth"


def check_pairs():
    """Pairs that an exported file is judged by."""
    features = features_of(40, 1)
    return [Pair("moved", features, moved(features, 40), SIZE, (600, 400))]


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        (MatcherOptions(top_k=40), "fp32"),
        (MatcherOptions(top_k=40), "fp16"),
        (MatcherOptions(top_k=48, opset=17), "fp32"),
        (MatcherOptions(top_k=None), "fp32"),
        (MatcherOptions(top_k=None, io="colmap"), "fp16"),
    ],
)
def test_an_exported_matcher_gives_the_matches_of_pytorch(options, precision, tmp_path):
    path, matcher = tmp_path / "matcher.onnx", small_matcher()
    export_matcher(small_matcher().set_precision(precision), path, options)
    verdict = verify_matcher(path, matcher, precision, options, check_pairs())
    assert verdict.passed, verdict.text
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"NonZero", "TopK", "Loop", "If"}


@pytest.mark.parametrize(
    "options",
    [MatcherOptions(None), MatcherOptions(None, opset=17), MatcherOptions(8, io="colmap")],
)
def test_a_file_of_any_counts_takes_images_without_keypoints(options, tmp_path):
    path, matcher = tmp_path / "matcher.onnx", small_matcher()
    export_matcher(matcher, path, options)
    run = (ColmapMatcher if options.io == "colmap" else ONNXRuntimeMatcher)(path, device="cpu")
    features = features_of(7, 1)
    for counts in ((0, 7), (7, 0), (0, 0), (7, 7)):
        pair = [best(features, count) for count in counts]
        found = run.match(*pair, SIZE, SIZE)
        np.testing.assert_array_equal(found.indices, matcher.match(*pair, SIZE, SIZE).indices)


@pytest.mark.parametrize("io", ["default", "colmap"])
def test_features_of_another_precision_or_order_in_memory_are_matched(io, tmp_path):
    path, matcher = tmp_path / "matcher.onnx", small_matcher()
    export_matcher(matcher, path, MatcherOptions(None, io=io))
    runs = [(ColmapMatcher if io == "colmap" else ONNXRuntimeMatcher)(path, "cpu"), matcher]
    first = features_of(30, 1)
    pair, others = (first, moved(first, 20)), []
    for features, kind in zip(pair, (np.float64, np.float16), strict=True):
        rows = (values.astype(kind)[::-1] for values in vars(features).values())
        others.append(Features(*rows))
    for run in [*runs, MutualMatcher()]:
        found, expected = run.match(*others, SIZE, SIZE), run.match(*pair, SIZE, SIZE)
        indices = np.array((29, 19)) - found.indices[::-1]
        np.testing.assert_array_equal(indices, expected.indices)
        assert found.scores.dtype == np.float32 and len(expected) > 10


def test_exporting_leaves_the_matcher_as_it_was(tmp_path):
    matcher, pair = small_matcher(), check_pairs()[0][1:]
    before, usual = matcher.match(*pair), (matcher.attention, matcher.select)
    export_matcher(matcher, tmp_path / "matcher.onnx", MatcherOptions(None, io="colmap"))
    assert (matcher.attention, matcher.select) == usual
    np.testing.assert_array_equal(matcher.match(*pair).indices, before.indices)


def test_a_dynamic_file_takes_a_batch(tmp_path):
    matcher, path = small_matcher(), tmp_path / "matcher.onnx"
    export_matcher(matcher, path, MatcherOptions(None))
    firsts = [features_of(30, seed) for seed in (1, 2, 3)]
    pairs = [(first, moved(first, 20, seed)) for seed, first in enumerate(firsts)]
    inputs = {}
    for side, features in enumerate(zip(*pairs, strict=True)):
        rows = zip(*map(tensors, features), strict=True)
        for name, arrays in zip(("keypoints", "descriptors", "mask"), rows, strict=True):
            inputs[f"{name}{side}"] = torch.cat(arrays).numpy()
        inputs[f"size{side}"] = np.array([SIZE] * 3, np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    matches0, _ = session.run(["matches0", "scores0"], inputs)
    for found, pair in zip(matches0, pairs, strict=True):
        np.testing.assert_array_equal(found, forward(matcher, *pair).matches0[0])


def test_more_keypoints_than_the_file_takes_are_refused(tmp_path):
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher(layers=1), path, MatcherOptions(top_k=8))
    with pytest.raises(InputError, match=r"9 keypoints.*at most 8.*--top_k 9"):
        ONNXRuntimeMatcher(path, "cpu").match(features_of(5, 0), features_of(9, 1), SIZE, SIZE)


def test_a_file_of_another_contract_is_refused(tmp_path):
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher(layers=1), path, MatcherOptions(top_k=8))
    with pytest.raises(InputError, match="kpts0"):
        ColmapMatcher(path, "cpu")


def test_colmap_finds_the_inputs_and_outputs_that_it_checks(tmp_path):
    """Six inputs and two outputs in this order and of these ranks, as in onnx_matchers.cc."""
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher(layers=1), path, MatcherOptions(None, io="colmap"))
    graph = onnx.load(path).graph
    names = [f"{name}{side}" for name in RANK for side in (0, 1)]
    assert [tensor.name for tensor in graph.input] == names
    assert [len(t.type.tensor_type.shape.dim) for t in graph.input] == [
        rank for rank in RANK.values() for _ in (0, 1)
    ]
    assert [tensor.name for tensor in graph.output] == ["matches0", "mscores0"]
    assert [len(t.type.tensor_type.shape.dim) for t in graph.output] == [1, 1]
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_colmap_decides_about_the_lowest_score(tmp_path):
    path, pair = tmp_path / "matcher.onnx", (features_of(40, 1), features_of(40, 2), SIZE, SIZE)
    export_matcher(small_matcher(), path, MatcherOptions(None, io="colmap"))
    scores = ColmapMatcher(path, "cpu", min_score=0).match(*pair).scores
    assert scores.min() < 0.1  # the matcher's own threshold is not in the file
    some = ColmapMatcher(path, "cpu", min_score=np.median(scores)).match(*pair)
    assert 0 < len(some) < len(scores)


@pytest.mark.parametrize(
    ("sizes", "uint8_input"), [(((64, 64), (64, 64)), True), (((64, 64), (60, 50)), False)]
)
def test_one_file_goes_from_two_images_to_matches(sizes, uint8_input, tmp_path):
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=400).eval()  # more than the textures have: some fill-ins
    matcher = small_matcher(descriptor_dim=64, filter_threshold=0.0)
    path = tmp_path / "pair.onnx"
    options = PairOptions(*sizes, deform_conv="gather", uint8_input=uint8_input)
    export_pair(model, matcher, path, options)
    (width0, height0), (width1, height1) = sizes
    scene = texture(100, 100, 1)
    images = (scene[:height0, :width0].copy(), scene[8 : 8 + height1, 4 : 4 + width1].copy())
    verdict = verify_pair(path, model, matcher, "fp32", [("textures", *images)])
    assert verdict.passed, verdict.text
    with pytest.raises(InputError, match=f"exported for {width1}x{height1}"):
        ONNXRuntimePair(path, "cpu")(images[0], texture(48, 48, 1))


def test_a_pair_of_nets_that_do_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="aliked-t16's descriptors are 64 long"):
        export_pair(
            ALIKED("aliked-t16", top_k=10),
            small_matcher(layers=1),
            tmp_path / "pair.onnx",
            PairOptions(SIZE, SIZE),
        )


@pytest.mark.parametrize("small", [0, 1])
def test_a_pair_of_more_keypoints_than_an_image_has_pixels_is_refused(small, tmp_path):
    model, matcher = ALIKED("aliked-t16", top_k=50), small_matcher(layers=1, descriptor_dim=64)
    sizes = [(40, 40), (40, 40)]
    sizes[small] = (9, 13)
    with pytest.raises(InputError, match=r"50 keypoints .* 9x13 image can give \(45\)"):
        export_pair(model, matcher, tmp_path / "pair.onnx", PairOptions(*sizes))
    assert not list(tmp_path.iterdir())


def test_a_file_of_fixed_sizes_is_not_exported_for_a_folder_of_others(tmp_path):
    for name, width in (("a", 60), ("b", 60), ("c", 50)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), texture(40, width, 1))
    given = export_lightglue.parser().parse_args([str(tmp_path), "--graph", "pair"])
    with pytest.raises(InputError, match=r"b.png - c.png in .* have 60x40 and 50x40 pixels, but"):
        export_lightglue.load_pairs(given)
    for settled in ({"num_pairs": 1}, {"dynamic": True}, {"graph": "matcher"}):
        assert export_lightglue.load_pairs(argparse.Namespace(**vars(given) | settled))


@pytest.mark.parametrize("graph", ["matcher", "pair"])
def test_a_model_of_other_descriptors_is_refused_before_anything_is_exported(graph, tmp_path):
    words = [str(tmp_path), "--graph", graph, "--model", "aliked-t16"]
    with pytest.raises(InputError, match="64 long, but these LightGlue weights match"):
        export_lightglue.main(export_lightglue.parser().parse_args(words))


def test_a_name_too_long_for_the_manifest_is_refused_before_the_export(tmp_path):
    path = str(tmp_path / ("n" * 245 + ".onnx"))
    given = export_lightglue.parser().parse_args([str(tmp_path), "--model_output", path])
    with pytest.raises(InputError, match="is too long; give a shorter --model_output"):
        export_lightglue.output_path(given)


def test_a_wrong_file_is_rejected(tmp_path):
    path, wrong = tmp_path / "matcher.onnx", small_matcher()
    wrong.layers[1].self_block.project.weight[:64] *= 3
    export_matcher(wrong, path, MatcherOptions(40))
    verdict = verify_matcher(path, small_matcher(), "fp32", MatcherOptions(40), check_pairs())
    assert not verdict.passed


def builds(path, shapes):
    """Whether TensorRT for RTX builds the file; its inputs' smallest, usual and largest shapes."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)  # strongly typed, as all of this library's networks
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(0))]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *shapes(tensor.name, tuple(tensor.shape)))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(("top_k", "precision"), [(40, "fp16"), (None, "fp32")])
def test_tensorrt_for_rtx_builds_the_matcher(top_k, precision, tmp_path):
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher().set_precision(precision), path, MatcherOptions(top_k))

    def shapes(name, shape):
        """One to two pairs of 1 to 90 keypoints."""
        counts = ((), (), ()) if name.startswith("size") else ((1,), (40,), (90,))
        fixed = tuple(side for side in shape if side != -1)
        return [(batch, *count, *fixed) for batch, count in zip((1, 1, 2), counts, strict=True)]

    assert builds(path, shapes)


def test_an_engine_sums_products_of_halves_in_float32(tmp_path):
    """An engine holds the source and settings of its kernels, those of attention among them."""
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher().set_precision("fp16"), path, MatcherOptions(40))
    if reason := RTX.cannot_build():
        pytest.skip(reason)
    plan = build_plan(RTX, path, BuildOptions(tf32=not tf32_is_off()))
    assert b"accumulation_type=2" in plan and b"hmma_fp32_traits" in plan
    assert b"accumulation_type=0" not in plan and b"hmma_fp16_traits" not in plan


def test_summing_in_float32_changes_no_function(tmp_path):
    path = tmp_path / "matcher.onnx"
    model = export_matcher(small_matcher().set_precision("fp16"), path, MatcherOptions(40))
    inputs = matcher_inputs((features_of(40, 0), features_of(33, 0)), (SIZE, SIZE), 40)
    run = onnxruntime.InferenceSession
    before, after = (
        run(made.SerializeToString()).run(None, inputs)
        for made in (model, sum_in_float32(copy.deepcopy(model)))
    )
    assert (before[0] == after[0]).all() and (before[0] >= 0).sum() > 5
    np.testing.assert_allclose(before[1], after[1], atol=0.01)


def test_tensorrt_for_rtx_builds_a_pair_of_any_sizes(tmp_path):
    path, matcher = tmp_path / "pair.onnx", small_matcher(descriptor_dim=64)
    options = PairOptions((96, 64), (96, 64), dynamic=True)
    export_pair(ALIKED("aliked-t16", top_k=50).eval(), matcher, path, options)
    sizes = ((64, 64), (64, 96), (128, 160))
    assert builds(path, lambda name, shape: [(1, 3, *size) for size in sizes])


def test_the_engine_of_a_file_with_lightglue_is_built_elsewhere(tmp_path):
    path = tmp_path / "matcher.onnx"
    export_matcher(small_matcher(), path, MatcherOptions(8))
    with pytest.raises(InputError, match="holds LightGlue, whose engines build_lightglue_file"):
        read_source(path)


@pytest.fixture
def build_small(monkeypatch, tmp_path):
    """Builds `small_matcher` for 40 keypoints by the code of `measure_timings.py`."""
    monkeypatch.setattr(build.LightGlue, "from_pretrained", lambda *_, **__: small_matcher())

    def make(suffix):
        path = tmp_path / f"matcher{suffix}"
        build.build_lightglue_file(Spec(top_k=40), "matcher", SIZE, None, path)
        return path

    return make


@pytest.mark.parametrize("cuda_graph", ["", "-cudagraph"])
@pytest.mark.parametrize(("backend", "suffix"), [("tensorrt", ".trt"), ("tensorrt-rtx", ".rtx")])
def test_an_engine_runs_as_a_runtime_of_pairs(
    backend, suffix, cuda_graph, build_small, monkeypatch
):
    """By a stand-in for the library, which runs the ONNX file."""
    install(monkeypatch, "10.16")
    spec = Spec(top_k=40, device="cuda:0", model_path=build_small(suffix))
    engine = create_pair_runtime(f"{backend}{cuda_graph}", "matcher", spec, None, SIZE)
    assert engine.engine.cuda_graph is bool(cuda_graph)
    check_pair_runtime(engine)


@pytest.fixture
def rtx_spec(build_small, monkeypatch):
    """A `Spec` of an engine that a stand-in for TensorRT for RTX built and runs."""
    install(monkeypatch, "10.13.3.9")
    return Spec(top_k=40, device="cuda:0", model_path=build_small(".rtx"))


def open_rtx(spec, graph="matcher"):
    return create_pair_runtime("tensorrt-rtx", graph, spec, None, SIZE)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda engine: engine.write_bytes(engine.read_bytes()[:-7]), "truncated"),
        (lambda engine: manifest_path(engine).unlink(), r"\.rtx\.json is missing"),
        (lambda engine: engine.unlink(), "does not exist; build it with build_lightglue_file"),
    ],
)
def test_a_damaged_engine_of_lightglue_is_refused(damage, says, rtx_spec):
    damage(rtx_spec.model_path)
    with pytest.raises(InputError, match=says):
        open_rtx(rtx_spec)


def test_an_engine_of_lightglue_of_another_version_is_refused(rtx_spec, monkeypatch):
    install(monkeypatch, "10.13.3.9", rtx="1.5.0.114")
    with pytest.raises(InputError, match=r"built by TensorRT for RTX .* and this is 1\.5\.0\.114"):
        open_rtx(rtx_spec)


@pytest.mark.parametrize(
    ("changes", "graph", "says"),
    [
        ({}, "pair", "the graph of .* is matcher, not pair"),
        ({"top_k": 41}, "matcher", "the top_k of .* is 40, not 41"),
        ({"precision": "fp16"}, "matcher", "is float32; ask for fp32"),
        ({"model_path": None}, "matcher", "needs an engine; .* as written by build_lightglue_file"),
    ],
)
def test_an_engine_that_was_not_asked_for_is_refused(changes, graph, says, rtx_spec):
    with pytest.raises(InputError, match=says):
        open_rtx(dataclasses.replace(rtx_spec, **changes), graph)


def test_an_engine_of_lightglue_is_compiled_once_and_takes_its_k_rows(rtx_spec):
    runtime = open_rtx(rtx_spec)
    features = features_of(30, 1)
    with pytest.raises(InputError, match=r"keypoints0 is \[1, 30, 2\], but .* takes \[1, 40, 2\]"):
        runtime(matcher_inputs((features, features), (SIZE, SIZE), 30))
    assert open_rtx(rtx_spec).engine.cache.used


def test_a_file_runs_as_a_runtime_of_pairs(build_small):
    spec = Spec(top_k=40, device="cpu", model_path=build_small(".onnx"))
    with pytest.raises(InputError, match="needs a file of LightGlue"):
        missing = dataclasses.replace(spec, model_path=None)
        create_pair_runtime("onnxruntime-cpu", "matcher", missing, None, SIZE)
    check_pair_runtime(create_pair_runtime("onnxruntime-cpu", "matcher", spec, None, SIZE))


def test_pytorch_runs_as_a_runtime_of_pairs(monkeypatch):
    monkeypatch.setattr(LightGlue, "from_pretrained", lambda *_: small_matcher())
    spec = Spec(top_k=40, device="cpu")
    check_pair_runtime(create_pair_runtime("pytorch", "matcher", spec, None, SIZE))


def check_pair_runtime(runtime):
    """Both calls give the small matcher's matches, of full and of padded inputs, and again."""
    features = features_of(40, 1)
    for count in (40, 25, 40):
        pair = features, moved(features, count)
        inputs = matcher_inputs(pair, (SIZE, SIZE), 40)
        expected = small_matcher().match(*pair, SIZE, SIZE)
        batch = runtime.to_device(inputs)
        outputs = runtime.infer(batch)
        runtime.synchronize()
        there = {
            name: np.asarray(getattr(rows, "numpy", lambda r=rows: r)())
            for name, rows in outputs.items()
        }
        for found in (there, runtime(inputs)):
            matches = matches_of_rows(found["matches0"][0], found["scores0"][0])
            np.testing.assert_array_equal(matches.indices, expected.indices)
            np.testing.assert_allclose(matches.scores, expected.scores, atol=ROUNDING)


def test_a_backend_without_lightglue_is_refused_by_naming_others():
    with pytest.raises(InputError, match=r"aotinductor does not run LightGlue; .*pytorch"):
        create_pair_runtime("aotinductor", "matcher", Spec(), None, SIZE)


@pytest.mark.parametrize("together", [True, False])
def test_what_the_fused_pair_runs_on_a_gpu_gives_the_matches_of_pytorch(together):
    """Its parts on the CPU, with the kernels' plain twins; some rows are fill-ins."""
    torch.manual_seed(0)
    model = ALIKED("aliked-t16", top_k=400).eval()
    matcher = small_matcher(descriptor_dim=64, filter_threshold=0.0)
    scene = texture(90, 100, 1)
    images = [scene[:64, :80].copy(), scene[8:72, 4:84].copy()]
    extract = functools.partial(
        pipeline.extract,
        weights=pack_weights(model.fold_batch_norm(), torch.float32, torch.device("cpu")),
        selection=pipeline.Selection(model.top_k, model.scores_th, model.n_limit),
        ops=reference,
    )
    batches = torch.from_numpy(np.stack(images))
    sizes = [torch.tensor([[80.0, 64.0]])] * 2
    with torch.no_grad():
        found = fused_lightglue.find(extract, [batches] if together else batches.split(1))
        matched = fused_lightglue.match(matcher, found, sizes, masked=True)
        packed = fused_lightglue.pack(found, matched).numpy()
    rows = fused_lightglue.unpack(packed, (400, 400))
    assert rows.has_fill_ins
    features = [model.extract(image) for image in images]
    expected = matcher.match(*features, (80, 64), (80, 64))
    found = in_terms_of(
        (features[0].keypoints, features[1].keypoints),
        (rows.keypoints0, rows.keypoints1),
        matches_of_rows(rows.partners, rows.match_scores),
    )
    verdict = judge_matches({"pair": compare_matches(expected, found)}, PAIR_FP32)
    assert verdict.passed, verdict.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", PAIR_FP32), ("fp16", PAIR_FP16)])
def test_the_fused_pair_gives_the_matches_of_pytorch(precision, tolerance, weights_dir):
    """Of images of one size, of two, and of one with fewer keypoints than K."""
    spec = Spec("aliked-n16rot", 1000, precision=precision, device="cuda", weights=weights_dir)
    pair = fused_lightglue.FusedPair(spec, weights_dir)
    model = ALIKED.from_pretrained("aliked-n16rot", 1000, weights=weights_dir, device="cuda")
    matcher = LightGlue.from_pretrained(weights_dir, device="cuda")
    first, second = map(load_image, list_images("assets/sequence_640x480")[:2])
    for images in ((first, second), (first, second[:400, :600].copy()), (first, first // 16)):
        features = [model.extract(image) for image in images]
        expected = matcher.match(*features, *(image.shape[1::-1] for image in images))
        found = pair(*images)
        ours = in_terms_of(
            (features[0].keypoints, features[1].keypoints),
            (found.keypoints0, found.keypoints1),
            found.matches,
        )
        verdict = judge_matches({"pair": compare_matches(expected, ours)}, tolerance)
        assert verdict.passed or not len(expected), verdict.text


def some_matches(*pairs, score=0.5):
    return Matches(np.array(pairs, np.int64).reshape(-1, 2), np.full(len(pairs), score, np.float32))


def test_parity_counts_what_is_kept_lost_and_gained():
    parity = compare_matches(some_matches((0, 0), (1, 1), (2, 2)), some_matches((0, 0), (1, 2)))
    assert (parity.common, parity.lost, parity.gained) == (1, 2, 1)


def test_matches_of_keypoints_found_elsewhere_are_lost():
    here = np.array([[10.0, 10], [20, 20], [30, 30]])
    there = here[[1, 0, 2]] + [[0.1, 0], [0, 0.1], [5, 0]]
    found = in_terms_of((here, here), (there, here), some_matches((0, 1), (1, 0), (2, 2)))
    assert found.indices.tolist() == [[1, 1], [0, 0], [-1, 2]]


def test_matches_of_faint_keypoints_are_not_counted():
    places = np.array([[10.0, 10], [20, 20], [30, 30], [40, 40]], np.float32)
    descriptors = np.zeros((4, 8), np.float32)
    clear = Features(places, np.array([0.5, 0.4, 0.3, 0.2], np.float32), descriptors)
    faint = dataclasses.replace(clear, scores=np.array([0.5, 0.4, 3e-3, 2e-3], np.float32))
    elsewhere = places + np.array([[0, 0], [9, 0], [0, 0], [9, 0]])  # the second and fourth
    expected = some_matches((0, 0), (1, 1), (2, 2), (3, 3))
    found = dataclasses.replace(expected, scores=np.array([0.5, 0.5, 0.9, 0.5], np.float32))

    def compare(features):
        return compare_pair((features, clear), expected, (elsewhere, places), found)

    parity = compare(clear)
    assert (parity.common, parity.lost, parity.gained) == (2, 2, 2)
    assert parity.max_score_difference == pytest.approx(0.4)
    parity = compare(faint)
    assert (parity.common, parity.lost, parity.gained) == (1, 1, 0)
    assert parity.max_score_difference == 0
    nothing = dataclasses.replace(clear, scores=np.full(4, 2e-3, np.float32))
    with pytest.raises(InputError, match="prove nothing"):
        judge_matches({"flat": compare(nothing)}, PAIR_FP32)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (some_matches(), "4 matches lost"),
        (some_matches(*((i, i) for i in range(7))), "3 matches gained"),
        (some_matches(*((i, i) for i in range(4)), score=0.6), "max score difference"),
        (some_matches(*((i, i) for i in range(4)), score=np.nan), "NaN"),
    ],
)
def test_another_matcher_is_told_apart(other, reason):
    reference = some_matches(*((i, i) for i in range(4)))
    verdict = judge_matches({"pair": compare_matches(reference, other)}, MATCH_FP32)
    assert any(reason in found for found in verdict.reasons)


def test_a_check_without_any_match_proves_nothing():
    nothing, some = some_matches(), some_matches(*((i, i) for i in range(4)))
    with pytest.raises(InputError, match="prove nothing"):
        judge_matches({"pair": compare_matches(nothing, nothing)}, MATCH_FP32)
    assert not judge_matches({"pair": compare_matches(nothing, some)}, MATCH_FP32).passed


def test_a_file_that_no_pair_could_prove_wrong_is_neither_kept_nor_rejected(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export_lightglue, "load_pairs", lambda args: [])
    monkeypatch.setattr(export_lightglue.LightGlue, "from_pretrained", lambda *_, **__: None)
    nothing = {"a - b": compare_matches(some_matches(), some_matches())}
    job = export_lightglue.Job(
        None, lambda path: path.touch(), lambda path: judge_matches(nothing, MATCH_FP32)
    )
    monkeypatch.setattr(export_lightglue, "matcher_job", lambda *_: job)
    words = ["images", "--model_output", str(tmp_path / "matcher.onnx")]
    monkeypatch.setattr(sys, "argv", ["convert_lightglue_to_onnx.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(export_lightglue.main, export_lightglue.parser())
    assert end.value.code == 2
    assert "prove nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
