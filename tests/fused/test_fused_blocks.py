"""Blocks 1 and 2 in half precision against their twins, the CUDA source run on the CPU."""

import functools

import pytest
import torch

from aliked.fused import blocks, cuda_source, fragments, reference, trace
from tests.helpers import cuda_on_host
from tests.helpers.fused_models import random_images

TOLERANCE = 5e-3  # of the largest value: a few roundings
CHANNELS = {"t16": (8, 16, 16), "n16": (16, 32, 32)}  # c1, c2, D / 4
GUARD = 64  # numbers before and after each output, which no kernel may touch


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    @functools.cache
    def build(constants):
        text = cuda_source.text(blocks.SOURCE, constants)
        return cuda_on_host.build(text, tmp_path_factory.mktemp("blocks"))

    return build


def random_weight(*shape):
    return (torch.randn(shape) / shape[0] ** 0.5).half()


def in_halves(pack, *matrices):
    """Fragments are made of a model's own float32 weights."""
    return pack(*(matrix.float() for matrix in matrices)).half()


def guarded(shape):
    """A buffer full of NaN and the part of it that is an output."""
    buffer = torch.full((shape.numel() + 2 * GUARD,), torch.nan, dtype=torch.float16)
    return buffer, buffer[GUARD:-GUARD].view(shape)


def run(library, kernel, constants, inputs, expected, sizes):
    buffers, outputs = zip(*(guarded(want.shape) for want in expected), strict=True)
    arguments = [*inputs, *outputs, *sizes]
    cuda_on_host.launch(library(constants), kernel, *blocks.shape(kernel, outputs[0]), arguments)
    for buffer, got, want in zip(buffers, outputs, expected, strict=True):
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
        assert trace.relative(got, want) <= TOLERANCE


@pytest.mark.parametrize("model", CHANNELS)
@pytest.mark.parametrize(
    ("size", "frame"),  # batch, height, width; frame's height, width, top, left
    [((2, 21, 39), (32, 64, 5, 12)), ((1, 32, 32), (32, 32, 0, 0)), ((1, 5, 70), (32, 96, 13, 13))],
)
def test_block1_is_that_of_the_plain_operators(library, model, size, frame):
    torch.manual_seed(0)
    c, _, quarter = CHANNELS[model]
    images = random_images(*size)
    stem_weight, weight = random_weight(27, c), random_weight(9 * c, c)
    level, score = random_weight(c, quarter), random_weight(quarter, 8)
    biases = torch.randn(2, c)
    packed = in_halves(fragments.block1, stem_weight, weight, level, score)
    expected = reference.block1(
        images, stem_weight, biases[0], weight, biases[1], level, score, packed, *frame
    )
    inputs = [images, packed, *biases]
    sizes = (*images.shape[1:3], *frame)
    constants = blocks.constants(3, level)
    run(library, "block1", constants, inputs, expected, sizes)


@pytest.mark.parametrize("model", CHANNELS)
@pytest.mark.parametrize("size", [(2, 16, 32), (1, 48, 16)])
def test_block2_is_that_of_the_plain_operators(library, model, size):
    torch.manual_seed(0)
    c1, c2, quarter = CHANNELS[model]
    x = torch.randn(*size, c1).half()
    first, weight = random_weight(9 * c1, c2), random_weight(9 * c2, c2)
    shortcut, level, score = (
        random_weight(*shape) for shape in ((c1, c2), (c2, quarter), (quarter, 8))
    )
    biases = torch.randn(2, c2)
    packed = in_halves(fragments.block2, first, weight, shortcut, level, score)
    expected = reference.block2(
        x, first, biases[0], weight, biases[1], shortcut, level, score, packed
    )
    constants = blocks.constants(c1, level)
    run(library, "block2", constants, [x, packed, *biases], expected, size[1:])
