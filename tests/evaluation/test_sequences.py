"""Sequences without ground truth: tracks by hand, inliers of known motions."""

import numpy as np
import pytest

from aliked.errors import InputError
from aliked.features import Features
from aliked.matching import match_mutual
from evaluation.pairs import Image, Pair
from evaluation.sequences import Sequences, track_starts, with_tracks
from tests.helpers.textures import texture

CAMERA = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
PAIR = Pair("pair", "group", Image("a", None), Image("b", None), None)


def links(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, int).reshape(-1, 2)


def test_tracks_start_where_a_keypoint_is_first_seen_and_end_where_it_is_lost():
    """Of four images: keypoint 0 is seen in all, 1 in two, 5 in the last two."""
    found = track_starts([links((0, 3), (1, 4)), links((3, 2)), links((2, 0), (5, 1))])
    # Tracks of 4 and 2 images start with the first image, none with the second, one of 2 after.
    assert found == [(2, 6), (0, 0), (1, 2)]


def test_images_without_links_have_no_tracks():
    assert track_starts([links(), links((1, 1)), links()]) == [(0, 0), (1, 2), (0, 0)]
    assert track_starts([links()]) == [(0, 0)]


def measure(
    pair: Pair,
    first: Features,
    second: Features,
    intrinsics: np.ndarray | None,
    seed: int,
    repeats: int,
) -> dict:
    """What the task finds of a pair."""
    return Sequences([], intrinsics, seed, repeats).measure(
        pair, first, second, match_mutual(first.descriptors, second.descriptors, -1)
    )


def score(rows: list[dict], name: str) -> float:
    return next(score for score in Sequences.scores if score.name == name).value(rows)


def test_track_length_is_the_mean_over_tracks_and_sequences_are_apart():
    """Tracks of 3 and 2 images in one sequence; the other's begin anew."""
    rows = [
        {"group": "a", "links": links((0, 0), (1, 1))},
        {"group": "a", "links": links((0, 0))},
        {"group": "b", "links": links((0, 0))},
    ]
    rows = with_tracks(rows)
    assert [row["tracks"] for row in rows] == [[2, 5], [0, 0], [1, 2]]
    assert score(rows, "track length") == pytest.approx(7 / 3)
    assert not any("links" in row for row in rows)


def views(outliers: int) -> tuple[Features, Features]:
    """200 points in space, seen by two cameras; of the first some are matched to wrong places."""
    random = np.random.default_rng(0)
    points = random.uniform([-3, -2, 4], [3, 2, 10], (200, 3))
    seen = [(points + move) @ CAMERA.T for move in ([0, 0, 0], [0.5, 0.1, -0.3])]
    first, second = ((p[:, :2] / p[:, 2:]).astype(np.float32) for p in seen)
    second[:outliers] = random.uniform([0, 0], [640, 480], (outliers, 2))
    names = np.eye(200, dtype=np.float32)
    return Features(first, np.ones(200), names), Features(second, np.ones(200), names)


@pytest.mark.parametrize("intrinsics", [None, CAMERA])
def test_the_inlier_ratio_is_that_of_the_matches_that_move_as_one(intrinsics):
    assert measure(PAIR, *views(0), intrinsics, seed=0, repeats=1)["inliers"] == 200
    row = measure(PAIR, *views(100), intrinsics, seed=0, repeats=3)
    # A wrong match is within 1 px of a line across 480 px about once in 200 times.
    assert 100 <= row["inliers"] <= 105
    assert 100 <= len(row["links"]) <= 105
    assert row["matches"] == 200


@pytest.mark.parametrize("count", [0, 7])
def test_a_pair_with_too_few_matches_counts_as_a_failure(count):
    few = [Features(f.keypoints[:count], f.scores[:count], f.descriptors[:count]) for f in views(0)]
    row = measure(PAIR, *few, None, seed=0, repeats=2)
    assert (row["matches"], row["inliers"]) == (count, 0)
    rows = with_tracks([row | {"group": "a"}])
    assert score(rows, "inlier ratio") == score(rows, "track length") == 0


def test_a_folder_that_is_no_sequence_is_refused(tmp_path):
    import cv2

    for name in ("a/1.png", "b/1.png", "b/2.png", "c/b/1.png", "c/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), texture(32, 48))
    with pytest.raises(InputError, match="a has one image"):
        Sequences([tmp_path / "a"], None, 0, 1)
    with pytest.raises(InputError, match=r"one name \(b, b\)"):
        Sequences([tmp_path / "b", tmp_path / "c" / "b"], None, 0, 1)
    task = Sequences([tmp_path / "b"], None, 0, 1)
    assert [image.name for image in task.dataset.images] == ["b/1.png", "b/2.png"]
