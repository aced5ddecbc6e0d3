"""The deformable blocks in half precision against their twins, the CUDA source run on the CPU."""

import pytest
import torch

from aliked.fused import cuda_source, deform, fragments, launches, reference
from aliked.fused.trace import relative
from tests.helpers import cuda_on_host

TOLERANCE = 5e-3  # of the largest output: a few roundings of half precision
CANARIES = 64  # numbers on both sides of an output


def halves(*shape, scale=1.0):
    return (torch.randn(shape) * scale).half()


def layer(channels, wide):
    """Weights of a deformable layer whose offsets reach a few pixels, also out of the map."""
    inner = 9 * channels
    return [
        halves(inner, 18, scale=2 * inner**-0.5),
        torch.randn(18),
        halves(inner, wide, scale=inner**-0.5),
        torch.randn(wide),
    ]


def guarded(like):
    """A copy of the shape of `like`, not yet written, and the memory around it."""
    memory = torch.full((like.numel() + 2 * CANARIES,), float("nan"), dtype=like.dtype)
    return memory[CANARIES : like.numel() + CANARIES].view(like.shape), memory


def run(tmp_path, x, wide, definitions, tile, arguments, outputs):
    """The outputs of `deform.cu`; each place among the arguments that is None takes one."""
    source = cuda_source.text(deform.SOURCE, definitions)
    library = cuda_on_host.build(source, tmp_path)
    written, memories = zip(*map(guarded, outputs), strict=True)
    left = iter(written)
    arguments = [next(left) if a is None else a for a in arguments]
    grid, block = deform.grid(x, wide, tile), (32 * tile.WARPS, 1, 1)
    cuda_on_host.launch(library, "deform", grid, block, [*arguments, *x.shape[1:3]], tile.BLOCKS)
    for memory in memories:
        assert memory[:CANARIES].isnan().all() and memory[-CANARIES:].isnan().all()
    return written


@pytest.mark.parametrize(
    ("channels", "wide", "size", "few", "clusters"),
    [
        (16, 32, (1, 5, 11), 0, False),
        (32, 64, (1, 3, 6), 128, False),
        (16, 32, (1, 3, 6), 128, True),
        (64, 128, (2, 3, 5), 128, True),
    ],
)
def test_a_deformable_layer_is_that_of_the_plain_model(
    tmp_path, monkeypatch, channels, wide, size, few, clusters
):
    monkeypatch.setitem(launches.table().numbers, "FEW_BLOCKS", few)
    x, parameters = halves(*size, channels), layer(channels, wide)
    packed = fragments.deform(parameters[0], parameters[2])
    tile = deform.choose_tile(x, wide, False, 0, clusters)
    expected = reference.deform(x, *parameters, packed)
    arguments = [x, packed, parameters[1], parameters[3], None]
    definitions = deform.constants(x, wide, tile)
    (got,) = run(tmp_path, x, wide, definitions, tile, arguments, [expected])
    assert relative(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("channels", "below", "quarter", "size", "pool", "few", "clusters"),
    [
        (32, 16, 16, (2, 4, 8), 4, 0, False),
        (64, 32, 32, (1, 8, 12), 4, 0, False),
        (64, 32, 32, (1, 4, 8), 4, 128, True),
        (64, 32, 16, (1, 3, 5), 1, 128, True),
        (128, 64, 32, (2, 3, 4), 1, 128, False),
        (128, 64, 32, (2, 5, 3), 1, 128, True),
        (128, 64, 32, (1, 4, 5), 1, 0, False),
    ],
)
def test_a_level_is_that_of_the_plain_model(
    tmp_path, monkeypatch, channels, below, quarter, size, pool, few, clusters
):
    monkeypatch.setitem(launches.table().numbers, "FEW_BLOCKS", few)
    x, parameters, shortcut = (
        halves(*size, channels),
        layer(channels, channels),
        halves(*size, below),
    )
    others = [
        halves(below, channels, scale=below**-0.5),
        halves(channels, quarter, scale=channels**-0.5),
        halves(quarter, 8, scale=quarter**-0.5),
    ]
    packed = fragments.deform(parameters[0], parameters[2], others[0], others[1])
    tile = deform.choose_tile(x, channels, True, pool, clusters)
    expected = reference.deform_level(x, *parameters, packed, shortcut, *others, pool)
    arguments = [x, packed, parameters[1], parameters[3], None, shortcut, others[2], None, None]
    definitions = deform.constants(x, channels, tile, shortcut, quarter, pool)
    got = run(tmp_path, x, channels, definitions, tile, arguments, expected)
    for mine, twin in zip(got, expected, strict=True):
        assert relative(mine, twin) <= TOLERANCE
