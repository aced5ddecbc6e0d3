"""The measures of relative poses, on cases worked by hand and on exact matches of the scene."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from aliked.features import Features
from aliked.matching import match_mutual
from evaluation.estimators import pose_estimators
from evaluation.pairs import Dataset, Pair
from evaluation.pose import (
    Pose,
    agree,
    direction_error,
    epipolar_distance,
    rotation_error,
    seeds_of,
)
from evaluation.pose_datasets import scene_data
from evaluation.task import error_auc

REPEATS = 3  # of every estimation
SCENE = Path(__file__).resolve().parents[2] / "assets" / "scene_640x480"


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [pair for pair in scene_data(SCENE).pairs if pair.group == "overlap 40 % to 60 %"]


def features(keypoints: np.ndarray, names: np.ndarray) -> Features:
    """Keypoints whose descriptors tell them apart: each has a direction of its own."""
    descriptors = np.eye(names.max(initial=0) + 1, dtype=np.float32)[names]
    return Features(keypoints.astype(np.float32), np.ones(len(names), np.float32), descriptors)


def exact(pair: Pair, names: np.ndarray | None = None) -> tuple[Features, Features]:
    """Points all over the first image and exactly where the second one shows them."""
    points = np.stack(np.meshgrid(np.arange(8.0, 640, 18), np.arange(8.0, 480, 18)), -1)
    points = points.reshape(-1, 2)
    there = pair.truth.project(points)
    seen = np.isfinite(there[:, 0])
    order = np.arange(seen.sum())
    names = order if names is None else names(order)
    return features(points[seen], order), features(there[seen], names)


def measured(pair: Pair, first: Features, second: Features, seed: int = 0) -> dict:
    return Pose(Dataset("made up", [pair]), seed, REPEATS).measure(
        pair, first, second, match_mutual(first.descriptors, second.descriptors, -1)
    )


def scores(row: dict) -> dict[str, float]:
    """Every column, of this one pair."""
    return {score.name: score.value([row]) for score in Pose.scores}


def turn(axis: list[float], degrees: float) -> np.ndarray:
    return cv2.Rodrigues(np.radians(degrees) * np.array(axis) / np.linalg.norm(axis))[0]


def test_area_under_the_recall_curve_of_known_errors():
    # Straight from (0, 0) to (1, 1/3) to (3, 2/3), level to 5: 1/6 + 1 + 4/3, divided by 5.
    assert error_auc(np.array([3.0, np.inf, 1.0]), 5) == pytest.approx(0.5, abs=1e-12)
    # An error at the threshold is not below it: straight to (1, 1/2), level to 3.
    assert error_auc(np.array([1.0, 3.0]), 3) == pytest.approx((0.25 + 1) / 3, abs=1e-12)
    assert error_auc(np.zeros(4), 5) == 1
    assert error_auc(np.full(4, np.inf), 5) == 0


@pytest.mark.parametrize("degrees", [0, 1e-6, 0.5, 90, 179.9])
def test_a_known_turn_is_the_rotation_error(degrees):
    before = turn([1, 2, 3], 40)
    found = rotation_error(turn([3, -1, 2], degrees) @ before, before)
    assert found == pytest.approx(degrees, rel=1e-6, abs=1e-8)  # float64 matrices


@pytest.mark.parametrize("degrees", [0, 1e-6, 30, 90])
def test_a_known_angle_is_the_direction_error_whatever_the_length_and_sign(degrees):
    true = np.array([2.0, 0, 0])
    found = turn([0, 0, 1], degrees) @ [0.1, 0, 0]
    assert direction_error(found, true) == pytest.approx(degrees, rel=1e-6, abs=1e-8)
    assert direction_error(-found, true) == pytest.approx(degrees, rel=1e-6, abs=1e-8)


def test_distance_from_the_epipolar_line_of_a_camera_that_moves_sideways():
    """Epipolar lines are the rows of the image; the second camera has twice the focal length."""
    pose = np.eye(4)
    pose[0, 3] = 1
    cameras = np.diag([100.0, 100, 1]), np.diag([200.0, 200, 1])
    points = np.array([[10.0, 20], [10, 20]]), np.array([[-70.0, 40], [5, 43]])
    # Row 20 is row 40 of the second image; 3 px off there is 1.5 px off in the first.
    np.testing.assert_allclose(epipolar_distance(points, cameras, pose), [0, 3], atol=1e-12)


def test_exact_matches_give_the_exact_pose(pairs):
    for pair in pairs[:3]:
        row = measured(pair, *exact(pair))
        found = scores(row)
        assert row["matches"] > 100
        assert row["correct"] == [row["matches"]] * 3
        assert found["epipolar@1"] == found["MMA@3"] == 1
        for errors in row["errors"].values():
            assert len(errors) == REPEATS
            # Keypoints are float32: rounded to 3e-5 px, or 2e-6 degrees, before any geometry.
            assert np.max(errors) < 0.01
        assert agree(pair.truth, tuple(f.keypoints for f in exact(pair))).all()


def test_cameras_that_differ_are_not_mixed_up(pairs):
    """The second image is twice as large, and so are its intrinsics and keypoints."""
    motion = pairs[0].truth
    first, second = exact(pairs[0])
    double = np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]])
    points = first.keypoints, second.keypoints * 2 + 0.5
    intrinsics = motion.intrinsics[0], double @ motion.intrinsics[1]
    for name, estimate in pose_estimators().items():
        pose = estimate(*points, *intrinsics, 0)
        true = motion.relative_pose
        assert rotation_error(pose.rotation, true[:3, :3]) < 0.01, name
        assert direction_error(pose.translation, true[:3, 3]) < 0.01, name


def test_half_of_the_matches_may_be_wrong(pairs):
    def half_shuffled(names):
        wrong = names.copy()
        wrong[::2] = np.roll(names[::2], 7)
        return wrong

    row = measured(pairs[0], *exact(pairs[0], half_shuffled))
    assert 0.4 < row["inliers"] / row["matches"] < 0.8
    assert np.median(row["errors"]["opencv"]) < 0.1


def test_shuffled_matches_are_a_failure(pairs):
    shuffle = np.random.default_rng(0).permutation
    rows = [measured(pair, *exact(pair, shuffle)) for pair in pairs[:2]]
    for score in Pose.scores:
        if score.name.startswith(("AUC@5", "MMA", "epipolar")):
            assert score.value(rows) < 0.1, score.name


@pytest.mark.parametrize("count", [0, 4])
def test_a_pair_with_too_few_matches_counts_as_a_failure(pairs, count):
    few = [
        Features(f.keypoints[:count], f.scores[:count], f.descriptors[:count])
        for f in exact(pairs[0])
    ]
    row = measured(pairs[0], *few)
    assert row["matches"] == count
    assert row["errors"]["opencv"] == [None] * REPEATS
    assert row["rotation"] is row["direction"] is None
    assert scores(row)["AUC@20"] == 0
    good = measured(pairs[0], *exact(pairs[0]))
    auc = next(score for score in Pose.scores if score.name == "AUC@20")
    assert auc.value([row, good]) == pytest.approx(0.5, abs=0.01)  # not dropped


def test_every_pair_and_every_repeat_has_random_numbers_of_its_own():
    seeds = [seeds_of(name, seed, 3) for name in ("a - b", "b - c") for seed in (0, 1)]
    assert len({number for own in seeds for number in own}) == 12
    assert seeds[0] == seeds_of("a - b", 0, 3)


def test_the_same_seed_gives_the_same_row(pairs):
    first, second = exact(pairs[0])
    blurred = np.random.default_rng(0).normal(second.keypoints, 1).astype(np.float32)
    second = Features(blurred, second.scores, second.descriptors)
    same, again, other = (measured(pairs[0], first, second, seed) for seed in (7, 7, 8))
    assert same == again
    assert same != other  # what is random depends on the seed
