"""Mutual nearest neighbours of descriptors and of keypoints."""

import numpy as np
import pytest
import torch

from aliked import matching
from aliked.errors import InputError
from aliked.features import Features
from aliked.matching import MutualMatcher, match_mutual, mutual_nearest_keypoints

CUDA = pytest.param(
    "cuda:0",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_permuted_descriptors_find_their_partners(rng):
    descriptors = unit(rng.normal(size=(200, 64)))
    order = rng.permutation(200)[:150]
    matches = match_mutual(descriptors, descriptors[order])
    assert matches.dtype == np.int64
    assert len(matches) == 150
    np.testing.assert_array_equal(order[matches[:, 1]], matches[:, 0])


def test_a_match_has_to_be_mutual():
    """Both of the first image prefer the same partner, which prefers the second of them."""
    first = unit(np.array([[1, 0.3], [1, 0.1]]))
    second = unit(np.array([[1, 0], [-1, 0]]))
    assert match_mutual(first, second).tolist() == [[1, 0]]


def test_dissimilar_pairs_are_dropped():
    first, second = unit(np.array([[1.0, 0]])), unit(np.array([[0.8, 0.6]]))  # cosine 0.8
    assert len(match_mutual(first, second, min_similarity=0.79)) == 1
    assert len(match_mutual(first, second, min_similarity=0.81)) == 0


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (0, 0)])
def test_images_without_keypoints_have_no_matches(counts):
    n, m = counts
    assert match_mutual(np.zeros((n, 64), np.float32), np.zeros((m, 64), np.float32)).shape == (
        0,
        2,
    )
    i, j, distance = mutual_nearest_keypoints(np.zeros((n, 2)), np.zeros((m, 2)), 1.0)
    assert len(i) == len(j) == len(distance) == 0


def test_the_result_does_not_depend_on_the_block_size(rng, monkeypatch):
    first, second = unit(rng.normal(size=(101, 8))), unit(rng.normal(size=(73, 8)))
    keypoints0, keypoints1 = rng.uniform(0, 30, (101, 2)), rng.uniform(0, 30, (73, 2))
    matches = match_mutual(first, second, -1)
    pairs = mutual_nearest_keypoints(keypoints0, keypoints1, 5)
    similarity = first @ second.T
    assert matches.tolist() == [
        [i, j] for i, j in enumerate(similarity.argmax(axis=1)) if similarity[:, j].argmax() == i
    ]
    monkeypatch.setattr(matching, "BLOCK", 200)  # 2 rows at a time
    monkeypatch.setattr(matching, "NEAR_BLOCK", 200)
    np.testing.assert_array_equal(match_mutual(first, second, -1), matches)
    for blocked, whole in zip(
        mutual_nearest_keypoints(keypoints0, keypoints1, 5), pairs, strict=True
    ):
        np.testing.assert_array_equal(blocked, whole)


def test_distances_far_from_the_origin_are_exact():
    """|a|^2 + |b|^2 - 2ab in float32 has steps of a pixel at these coordinates."""
    a = np.array([[4000.0, 3000.0], [4000.25, 3000.0]], np.float32)
    b = a + np.float32([0.0, 0.125])  # exact in float32
    i, j, distance = mutual_nearest_keypoints(a, b, radius=0.5)
    assert (i.tolist(), j.tolist()) == ([0, 1], [0, 1])
    np.testing.assert_array_equal(distance, [0.125, 0.125])


def test_pairs_beyond_the_radius_are_dropped():
    a, b = np.array([[10.0, 10.0], [50.0, 50.0]]), np.array([[50.0, 50.6], [10.0, 10.4]])
    i, j, distance = mutual_nearest_keypoints(a, b, radius=0.5)
    assert (i.tolist(), j.tolist()) == ([0], [1])
    np.testing.assert_allclose(distance, [0.4])


def test_keypoints_that_are_not_numbers_find_no_partner():
    a = np.array([[np.nan, 1.0], [5.0, 5.0]])
    i, j, _ = mutual_nearest_keypoints(a, a, radius=0.5)
    assert (i.tolist(), j.tolist()) == ([1], [1])


@pytest.mark.parametrize("device", ["cpu:0", CUDA])
@pytest.mark.parametrize(("n", "m", "dim"), [(200, 150, 64), (1500, 900, 128), (70, 90, 24)])
def test_tensors_are_matched_where_they_are(rng, device, n, m, dim):
    first, second = unit(rng.normal(size=(n, dim))), unit(rng.normal(size=(m, dim)))
    second[: m // 2] = unit(first[: m // 2] + 0.3 * second[: m // 2])
    first[0, 0] = np.nan
    for limit in (-1, 0.75):
        expected = match_mutual(first, second, limit)
        assert len(expected) >= m // 2 - 1
        found = match_mutual(*(torch.from_numpy(d).to(device) for d in (first, second)), limit)
        assert found.device.type == device[:-2] and found.dtype == torch.int64
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
        images = [Features(np.zeros((len(d), 2)), np.ones(len(d)), d) for d in (first, second)]
        matches = MutualMatcher(limit, device).match(*images, (9, 9), (9, 9))
        np.testing.assert_array_equal(matches.indices, expected)
        cosines = np.einsum("pd,pd->p", first[expected[:, 0]], second[expected[:, 1]])
        np.testing.assert_allclose(matches.scores, cosines, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu:0", CUDA])
@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (0, 0)])
def test_tensors_without_rows_have_no_matches(device, counts):
    found = match_mutual(*(torch.zeros(count, 64, device=device) for count in counts))
    assert found.shape == (0, 2)


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((3, 16), np.float32),
        torch.zeros(3, 32),
        torch.zeros(3, 16, dtype=torch.float64),
        torch.zeros(3, 16, dtype=torch.int32),
        torch.zeros(16),
        torch.zeros(3, 16, device="meta"),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(other):
    for pair in ((torch.zeros(3, 16), other), (other, torch.zeros(3, 16))):
        with pytest.raises(InputError, match="descriptors"):
            match_mutual(*pair)
