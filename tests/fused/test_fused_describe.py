"""The descriptor kernels against their twins, their CUDA source run on the CPU."""

import pytest
import torch

from aliked.configs import CONFIGS
from aliked.fused import cuda_source, describe, fragments, launches, reference
from tests.helpers import cuda_on_host

TOLERANCE = 5e-3  # of the largest value: roundings to half precision
COUNT = 41  # keypoints of an image: neither a multiple of 8 nor of 32


@pytest.fixture(scope="module", params=["aliked-t16", "aliked-n16", "aliked-n32"])
def model(request, tmp_path_factory):
    config = CONFIGS[request.param]
    definitions = (
        ("C1", config.channels[0]),
        ("QUARTER", config.dim // 4),
        ("POSITIONS", config.num_positions),
    )
    source = cuda_source.text(describe.SOURCE, definitions)
    return config, cuda_on_host.build(source, tmp_path_factory.mktemp("describe"))


def maps(config, batch, height, width):
    """Random x1, its projection and f2..f4 of a padded frame."""
    torch.manual_seed(0)
    quarter = config.dim // 4

    def random(scale, channels):
        return torch.randn(batch, height // scale, width // scale, channels).half()

    weight = torch.randn(config.channels[0], quarter).half() / 2
    return random(1, config.channels[0]), weight, *(random(s, quarter) for s in (2, 8, 32))


def keypoints(batch, height, width):
    """Some near every border, the last row and column included."""
    points = torch.rand(batch, COUNT, 2) * torch.tensor([width - 1, height - 1])
    points[:, 0], points[:, 1] = 0, torch.tensor([width - 1, height - 1])
    return points


def matrix(rows, columns):
    return (torch.randn(rows, columns) / rows**0.5).half()


def poisoned(like):
    """A tensor of NaN (or -1) in the middle of a larger one, and the larger one."""
    around = torch.full((like.numel() + 64,), -1 if like.dtype == torch.int32 else torch.nan)
    around = around.to(like.dtype)
    return around[32:-32].view(like.shape), around


def check(got, around, want):
    """Every element is written, and nothing beside them."""
    edges = torch.cat([around[:32], around[-32:]])
    assert (edges.isnan() if edges.is_floating_point() else edges == -1).all()
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


FRAMES = [(1, 32, 64, (0, 0, 32, 64)), (2, 64, 96, (5, 11, 54, 75))]


@pytest.mark.parametrize(("batch", "height", "width", "frame"), FRAMES)
def test_sample_positions_are_those_of_the_twin(model, batch, height, width, frame):
    config, library = model
    x1, level_weight, *levels = maps(config, batch, height, width)
    values = 2 * config.num_positions
    patch, offset = matrix(9 * config.dim, values) * 8, matrix(values, values) * 8
    biases = torch.randn(2, values)
    points = keypoints(batch, *frame[2:])
    weights = (patch, biases[0], offset, biases[1])
    packed = fragments.first_level(level_weight), fragments.offsets(patch, offset)
    want, zeros = reference.sample_offsets(
        points, x1, level_weight, *levels, *weights, *packed, *frame
    )
    (got, around), (parts, beside) = poisoned(want), poisoned(zeros)
    arguments = [points, *describe.map_arguments(x1, *levels), *packed, *biases, got, parts]
    cuda_on_host.launch(
        library,
        "sample_offsets",
        launches.grid("sample_offsets", rows=batch * COUNT),
        launches.threads("sample_offsets"),
        [*arguments, batch * COUNT, COUNT, *frame],
    )
    check(got, around, want)
    check(parts, beside, zeros)


@pytest.mark.parametrize(("batch", "height", "width", "frame"), FRAMES)
def test_descriptors_are_those_of_the_twin(model, batch, height, width, frame):
    config, library = model
    x1, level_weight, *levels = maps(config, batch, height, width)
    dim, positions = config.dim, config.num_positions
    project, aggregate = matrix(dim, dim) * 4, matrix(positions * dim, dim)
    points = keypoints(batch, *frame[2:])
    offsets = torch.randn(batch, COUNT, 2 * positions) * 6  # many leave the image
    packed = fragments.first_level(level_weight), fragments.samples(project, aggregate)
    parts = torch.zeros(-(-batch * COUNT // describe.KEYPOINTS), dtype=torch.int32)
    shares = positions // describe.SHARE
    want = reference.sample_descriptors(
        points, offsets, parts, x1, level_weight, *levels, project, aggregate, *packed, *frame
    )
    got, around = poisoned(want)
    sums, beside = poisoned(torch.empty(len(parts), shares, describe.KEYPOINTS, dim))
    maps_and_weights = [*describe.map_arguments(x1, *levels), *packed]
    cuda_on_host.launch(
        library,
        "sample_descriptors",
        launches.grid("sample_descriptors", (("POSITIONS", positions),), rows=batch * COUNT),
        launches.threads("sample_descriptors"),
        [points, offsets, *maps_and_weights, sums, parts, got, batch * COUNT, COUNT, *frame],
    )
    check(got, around, want)
    assert beside[:32].isnan().all() and beside[-32:].isnan().all()
    assert (parts == 0).all()
