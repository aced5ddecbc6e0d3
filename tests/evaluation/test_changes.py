"""Changes of an image with a known homography."""

import hashlib

import numpy as np
import pytest

from evaluation.changes import CHANGES, LEVELS, change
from tests.helpers.textures import texture

EXPECTED = "669d68095cb18c14dd63c5327358dcda537c13ebd808072302597f3eb474a968"
GEOMETRIC = ("rotation", "scale", "viewpoint")


def test_every_machine_makes_the_same_pixels():
    """The changes of a texture, as they were when the README's numbers were measured."""
    image = texture(48, 64)
    digest = hashlib.sha256(image.tobytes())
    for kind in CHANGES:
        for level in range(LEVELS):
            digest.update(change(image, kind, level, "a")[0].tobytes())
    assert digest.hexdigest() == EXPECTED


@pytest.mark.parametrize("kind", CHANGES)
def test_the_seed_decides(kind):
    image = texture(48, 64)
    first, again, other = (change(image, kind, 2, seed)[0] for seed in ("a", "a", "b"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("level", range(LEVELS))
@pytest.mark.parametrize("kind", GEOMETRIC)
def test_the_homography_says_where_pixels_went(kind, level):
    """Of a smooth image, so that a pixel's value says where it comes from."""
    y, x = np.mgrid[:120, :160]
    image = np.stack([x, 2 * y, x + y // 2], axis=-1).astype(np.uint8)
    changed, homography = change(image, kind, level, "a")
    y, x = np.mgrid[10:110:7, 10:150:7]
    points = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    back = np.linalg.inv(homography) @ points
    u, v = back[:2] / back[2]
    seen = (u > 1) & (u < 158) & (v > 1) & (v < 118)
    assert seen.sum() > 40
    found = changed[y.ravel(), x.ravel()][seen]
    # Rounding: 1/256 px of the place and 1/2 of the grey value, or one where v is cut to half.
    assert np.abs(found[:, 0] - u[seen]).max() < 0.6
    assert np.abs(found[:, 1] - 2 * v[seen]).max() < 0.6


@pytest.mark.parametrize("kind", sorted(set(CHANGES) - set(GEOMETRIC)))
def test_light_blur_and_noise_move_nothing_and_grow_with_the_level(kind):
    image = texture(96, 128)
    found = [change(image, kind, level, "a") for level in range(LEVELS)]
    assert all(np.array_equal(homography, np.eye(3)) for _, homography in found)
    differences = [np.abs(changed - image.astype(float)).mean() for changed, _ in found]
    if kind == "light":  # brighter at one level and darker at another
        assert min(differences) > 5
    else:
        assert differences == sorted(differences) and differences[0] > 1


def test_noise_has_the_standard_deviation_that_it_should():
    grey = np.full((200, 200, 3), 128, np.uint8)
    noisy, _ = change(grey, "noise", 2, "a")
    # 120000 values: the standard deviation is known to 0.2 %; rounding adds as little.
    assert (noisy - grey.astype(float)).std() == pytest.approx(26, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.3)


def test_turns_and_enlargements_grow_with_the_level():
    image = texture(48, 64)
    turns, factors = [], []
    for level in range(LEVELS):
        _, turn = change(image, "rotation", level, "a")
        turns.append(abs(np.degrees(np.arctan2(turn[1, 0], turn[0, 0]))))
        factors.append(change(image, "scale", level, "a")[1][0, 0])
    assert turns == sorted(turns) and 12 < turns[0] < 18 and turns[-1] > 100
    assert factors == sorted(factors) and 1.15 < factors[0] < 1.35 and factors[-1] > 2.5
