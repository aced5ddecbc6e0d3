"""Mutual nearest neighbours and mean scores, the CUDA sources run on the CPU."""

import functools

import numpy as np
import pytest
import torch

from aliked.errors import InputError
from aliked.fused import cuda_source, launches, match
from aliked.matching import match_mutual
from tests.helpers import cuda_on_host


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    @functools.cache
    def build(source):
        text = cuda_source.text(f"{source}.cu", launches.build(source))
        return cuda_on_host.build(text, tmp_path_factory.mktemp(source))

    return build


def descriptors(rows, dim, seed):
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, library):
    def compiled(file, kernel, constants, device):
        return lambda grid, block, arguments: cuda_on_host.launch(
            library(file.removesuffix(".cu")), kernel, grid, block, arguments
        )

    monkeypatch.setattr(cuda_source, "compiled", compiled)


def pairs(found):
    index = found[0].numpy()
    return np.stack([np.flatnonzero(index >= 0), index[index >= 0]], axis=1)


@pytest.mark.parametrize(("rows", "columns", "dim"), [(70, 131, 64), (64, 64, 128), (1, 5, 16)])
@pytest.mark.parametrize("min_similarity", [-1.0, 0.2, 0.75])
def test_matches_are_those_of_numpy(rows, columns, dim, min_similarity):
    a, b = descriptors(rows, dim, 0), descriptors(columns, dim, 1)
    b[: rows // 2] = torch.nn.functional.normalize(a[: rows // 2] + 0.05 * b[: rows // 2])
    found = match.nearest(a, b, min_similarity)
    expected = match_mutual(a.numpy(), b.numpy(), min_similarity)
    assert np.array_equal(pairs(found), expected)
    similarity = (a[expected[:, 0]] * b[expected[:, 1]]).sum(dim=1)
    torch.testing.assert_close(found[1][found[0] >= 0], similarity, atol=1e-6, rtol=0)
    assert (found[1][found[0] < 0] == 0).all()


def test_equal_similarities_and_what_is_no_number_are_as_in_numpy():
    a, b = torch.eye(16)[:6].contiguous(), torch.eye(16)[[3, 3, 1, 0, 5]].contiguous()
    b[4, 2] = torch.nan
    found = match.nearest(a, b, 0.5)
    assert pairs(found).tolist() == match_mutual(a.numpy(), b.numpy(), 0.5).tolist()
    assert pairs(found).tolist() == [[0, 3], [1, 2], [3, 0]]


def test_rows_of_score_0_take_no_part():
    a, b = descriptors(40, 64, 0), descriptors(50, 64, 1)
    b[:40] = a
    scores_a, scores_b = torch.ones(40), torch.ones(50)
    scores_a[30:], scores_b[:10] = 0, 0
    index = match.nearest(a, b, 0.9, scores_a, scores_b)[0]
    assert (index[:10] == -1).all() and (index[30:] == -1).all()
    assert index[10:30].tolist() == list(range(10, 30))


def test_no_descriptors_have_no_matches():
    none, some = torch.empty(0, 64), descriptors(3, 64, 0)
    for a, b in ((none, some), (some, none)):
        assert pairs(match.nearest(a, b, 0.75)).shape == match_mutual(a, b).shape == (0, 2)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(3, 24), torch.zeros(3, 24)),
        (torch.zeros(3, 32), torch.zeros(3, 16)),
        (torch.zeros(3, 16, dtype=torch.float64), torch.zeros(3, 16)),
        (torch.zeros(16), torch.zeros(3, 16)),
        (torch.zeros(3, 16), torch.zeros(3, 16, device="meta")),
    ],
)
def test_what_cannot_be_matched_is_refused(a, b):
    with pytest.raises(InputError, match="descriptors"):
        match.nearest(a, b, 0.75)


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(3, device="meta"), torch.ones(3, 1)])
def test_scores_that_are_not_those_of_the_rows_are_refused(wrong):
    a = descriptors(3, 16, 0)
    with pytest.raises(InputError, match="scores"):
        match.nearest(a, a, 0.75, scores1=wrong)


def test_rows_that_do_not_lie_where_the_kernel_reads_are_copied():
    values = torch.cat([torch.ones(1), descriptors(5, 16, 0).flatten()])
    a = values[1:].view(5, 16)
    assert a.data_ptr() % 16 and match.aligned(a).data_ptr() % 16 == 0
    assert pairs(match.nearest(a, a, 0.9)).tolist() == [[i, i] for i in range(5)]


@pytest.mark.parametrize("size", [(5, 5), (97, 101)])
def test_mean_scores_are_means_and_leave_zeros_behind(library, size):
    scores = torch.rand(2, *size)
    scores[1] *= 1e-3
    totals, means = torch.zeros(2, 2, dtype=torch.int64), torch.full((2,), torch.nan)
    sizes = {"batch": 2, "height": size[0], "width": size[1]}
    grid, block = launches.grid("mean_scores", **sizes), launches.threads("mean_scores")
    arguments = [scores, totals, means, size[0] * size[1]]
    cuda_on_host.launch(library("mean"), "mean_scores", grid, block, arguments)
    torch.testing.assert_close(means, scores.double().mean(dim=(1, 2)).float(), rtol=1e-6, atol=0)
    assert (totals == 0).all()
