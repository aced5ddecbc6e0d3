"""The measures of homographies, on cases worked by hand."""

import numpy as np
import pytest

from aliked.features import Features
from aliked.matching import match_mutual
from evaluation.estimators import homography_estimators
from evaluation.homography import Homography, homography_of, inside, median_error
from evaluation.pairs import Dataset, Image, Pair, Resize, scaling
from tests.helpers.planes import moved

WIDTH, HEIGHT = 320, 240
SPACING = 13  # px between keypoints: further than any threshold


def grid() -> np.ndarray:
    """Keypoints all over an image, none closer to another than 13 px; [N, 2]."""
    x, y = np.meshgrid(np.arange(20, WIDTH - 20, SPACING), np.arange(20, HEIGHT - 20, SPACING))
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def features(keypoints: np.ndarray, names: np.ndarray | None = None) -> Features:
    """Keypoints whose descriptors tell them apart: each has the name of its place in the grid."""
    names = np.arange(len(keypoints)) if names is None else names
    descriptors = np.eye(len(grid()), dtype=np.float32)[names]
    return Features(keypoints, np.ones(len(keypoints), np.float32), descriptors)


def pair(truth: np.ndarray) -> Pair:
    """Two grey images."""
    grey = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    return Pair("pair", "group", Image("a", lambda: grey), Image("b", lambda: grey), truth)


def measure(pair: Pair, first: Features, second: Features, seed: int) -> dict:
    """What the task finds of a pair."""
    return Homography(Dataset("made up", [pair]), None, seed).measure(
        pair, first, second, match_mutual(first.descriptors, second.descriptors, -1)
    )


def scores(truth: np.ndarray, first: Features, second: Features) -> dict[str, float]:
    """Every column, of this one pair."""
    row = measure(pair(truth), first, second, seed=0)
    return {score.name: score.value([row]) for score in (*Homography.scores, *Homography.curve)}


def test_the_same_features_under_the_identity_score_100_percent():
    found = scores(np.eye(3), features(grid()), features(grid()))
    assert found.pop("matches") == len(grid())
    absent = {"AUC@3 PoseLib"} - (
        {"AUC@3 PoseLib"} if "poselib" in homography_estimators() else set()
    )
    # AUC: the estimate is right to 1e-4 px or so, of thresholds of 1 px and more.
    assert all(value == pytest.approx(1, abs=1e-3) for n, value in found.items() if n not in absent)


def test_a_known_shift_gives_the_known_error():
    """The second image's keypoints are 2 px off, all in the same direction."""
    found = scores(np.eye(3), features(grid()), features(grid() + np.float32([2, 0])))
    assert [found[f"MMA@{t}"] for t in (1, 2, 3)] == [0, 1, 1]
    assert (found["repeatability"], found["matching score"]) == (1, 1)
    # The homography moves every corner by 2 px.
    assert [found[f"accuracy@{t}"] for t in (1, 3, 5)] == [0, 1, 1]
    # SuperGlue's recall curve of one pair: straight from (0, 0) to (2 px, 1), level from there on.
    assert found["AUC@3"] == pytest.approx((1 + 1) / 3, abs=1e-3)
    assert found["AUC@5"] == pytest.approx((1 + 3) / 5, abs=1e-3)


def test_shuffled_matches_score_about_nothing_but_the_keypoints_are_repeated():
    names = np.random.default_rng(0).permutation(len(grid()))
    found = scores(np.eye(3), features(grid()), features(grid(), names))
    assert found["repeatability"] == 1
    assert found["MMA@10"] < 0.02  # one of 336 or so stays in its place by chance
    assert found["matching score"] < 0.02
    assert found["accuracy@5"] == 0 and found["AUC@5"] == 0


@pytest.mark.parametrize("empty", [(True, False), (False, True), (True, True)])
def test_an_image_without_keypoints_is_a_failure_and_not_left_out(empty):
    first, second = (features(grid()[: 0 if none else None]) for none in empty)
    found = scores(np.eye(3), first, second)
    assert all(value == 0 for name, value in found.items() if not np.isnan(value)), found


def test_three_matches_make_no_homography():
    row = measure(pair(np.eye(3)), features(grid()[:3]), features(grid()[:3]), seed=0)
    assert row["matches"] == 3 and set(row["corner_error"].values()) == {None}


def test_of_several_estimates_the_middle_one_counts():
    truth, size = np.eye(3), (WIDTH, HEIGHT)
    estimates = [None, moved(1, 0), moved(90, 0), moved(2, 0), moved(0, 3)]
    assert median_error(estimates, truth, size) == pytest.approx(3)
    assert median_error([None, None, None, *estimates[1:3]], truth, size) is None


def test_an_image_begins_and_ends_half_a_pixel_beyond_its_pixels_centres():
    """By hand, of 4x3 pixels: from -0.5 on, up to below 3.5 and 2.5."""
    points = np.array([[-0.5, -0.5], [-0.51, 0], [0, -0.51], [3.49, 2.49], [3.5, 0], [0, 2.5]])
    assert inside(points, (4, 3)).tolist() == [True, False, False, True, False, False]


def test_keypoints_that_the_other_image_does_not_show_do_not_count():
    """The second image shows the right half of the first; only those keypoints can be found."""
    truth = moved(-WIDTH / 2, 0)
    there = grid() - np.float32([WIDTH / 2, 0])
    shown = there[:, 0] >= -0.5
    second = features(there[shown], np.flatnonzero(shown))
    row = measure(pair(truth), features(grid()), second, seed=0)
    assert row["covisible"] == [shown.sum(), shown.sum()]
    assert row["repeated"] == row["recalled"] == shown.sum()


def test_one_seed_gives_one_answer():
    generator = np.random.default_rng(1)
    noisy = features(grid() + generator.normal(scale=2, size=grid().shape).astype(np.float32))
    rows = [measure(pair(np.eye(3)), features(grid()), noisy, seed=7) for _ in range(2)]
    assert rows[0] == rows[1]


def test_scaling_keeps_the_corners_of_pixels_not_their_centres():
    """By hand: 8 pixels become 4, so that old pixels 0 and 1 make new pixel 0."""
    halved = scaling((8, 4), (4, 2))
    assert halved @ (0, 0, 1) == pytest.approx([-0.25, -0.25, 1])
    assert halved @ (0.5, 0.5, 1) == pytest.approx([0, 0, 1])  # where old 0 and 1 meet
    assert halved @ (-0.5, -0.5, 1) == pytest.approx([-0.5, -0.5, 1])  # the image's corner
    assert halved @ (7.5, 3.5, 1) == pytest.approx([3.5, 1.5, 1])  # the opposite one


def test_a_resized_pair_has_the_resized_homography():
    """By hand: the second image is twice the first; at one short side they are the same image."""
    small = Image("a", lambda: np.zeros((40, 80, 3), np.uint8), Resize("short", 20))
    large = Image("b", lambda: np.zeros((80, 160, 3), np.uint8), Resize("short", 20))
    truth = scaling((80, 40), (160, 80))  # x' = 2 x + 0.5
    assert small.size == large.size == (40, 20)
    assert homography_of(Pair("", "", small, large, truth)) == pytest.approx(np.eye(3))
    # Moved by 8 px in the large image: by 2 in the resized one, a quarter of its size.
    found = homography_of(Pair("", "", small, large, moved(8, 0) @ truth))
    assert found == pytest.approx(moved(2, 0))


def test_the_resized_pixels_are_where_the_matrix_says():
    """A bright spot in an image, and its centre of mass after resizing."""
    spot = np.zeros((120, 160, 3), np.uint8)
    spot[50:56, 90:96] = 240  # centre (92.5, 52.5)
    image = Image("a", lambda: spot, Resize("short", 40))
    bright = image.load()[..., 0].astype(float)
    y, x = np.mgrid[: bright.shape[0], : bright.shape[1]]
    centre = [(bright * x).sum() / bright.sum(), (bright * y).sum() / bright.sum()]
    # Rounding to 8 bits moves the centre of mass of a few pixels by less than 0.01 px.
    assert (image.to_loaded @ (92.5, 52.5, 1))[:2] == pytest.approx(centre, abs=0.01)
