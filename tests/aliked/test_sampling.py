"""Bilinear sampling: both methods follow the definition, in every type."""

import pytest
import torch

from aliked.sampling import SAMPLERS, bilinear_sample


@pytest.mark.parametrize("method", SAMPLERS)
def test_values_are_bilinear_and_zero_outside(method):
    maps = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])  # 3 wide, 2 high
    expected = {
        (0, 0): 1,
        (2, 1): 32,
        (0.5, 0): 1.5,
        (1, 0.25): 5.5,
        (1.5, 0.5): 13.5,
        (-0.5, 0): 0.5,  # half way to the zeros around the map
        (2.75, 1): 8,
        (-1, 0): 0,
        (0, 2): 0,
        (-7, 1): 0,
        (1, 1e12): 0,
    }
    sampled = bilinear_sample(maps, torch.tensor([list(expected)]).float(), method)
    # Positions near 1 are exact to 1e-7, and the steepest slope here is 16 per pixel.
    torch.testing.assert_close(sampled[0, 0], torch.tensor([*expected.values()]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SAMPLERS)
def test_every_image_of_a_batch_is_sampled_at_its_own_positions(method):
    torch.manual_seed(0)
    maps, positions = torch.rand(3, 4, 6, 5), torch.rand(3, 20, 2) * 9 - 2
    together = bilinear_sample(maps, positions, method)
    for i in range(3):
        alone = bilinear_sample(maps[i : i + 1], positions[i : i + 1], method)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)  # rounding


@pytest.mark.parametrize("method", SAMPLERS)
def test_half_precision_maps_are_sampled_at_float32_positions(method):
    width = 2000  # half-precision positions are a whole pixel apart here
    ramp = (torch.arange(width) % 8).half().expand(1, 1, 2, width)
    position = torch.tensor([[[1801.25, 0.5]]])
    sampled = bilinear_sample(ramp, position, method)
    assert sampled.dtype == torch.float16
    # 1801 % 8 + 0.25; the float32 grid is good to 1e-4 pixel, half precision to 2e-3 at 1.25.
    assert abs(sampled.item() - 1.25) < 2e-3
