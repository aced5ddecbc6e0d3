"""When do the features of two runtimes count as the same, and what does the verdict say?"""

from dataclasses import replace

import numpy as np
import pytest

from aliked.errors import InputError
from aliked.features import Features
from aliked.parity import FP16, FP32, compare_features, judge


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def reference() -> Features:
    """1000 keypoints on a grid of 10 px, in the middle of their pixels, scores from 0.1 to 0.9."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(25)), axis=-1).reshape(-1, 2)
    return Features(
        keypoints=(10 * grid + 5 + rng.uniform(0.3, 0.7, (1000, 2))).astype(np.float32),
        scores=rng.uniform(0.1, 0.9, 1000).astype(np.float32),
        descriptors=unit(rng.normal(size=(1000, 64))),
    )


def empty() -> Features:
    return Features(*(np.zeros(shape, np.float32) for shape in ((0, 2), 0, (0, 64))))


def rows(features: Features, kept) -> Features:
    return Features(features.keypoints[kept], features.scores[kept], features.descriptors[kept])


def shifted(features: Features, pixels: float, kept=slice(None)) -> Features:
    keypoints = features.keypoints.copy()
    keypoints[kept, 0] += np.float32(pixels)
    return replace(features, keypoints=keypoints)


def reasons(reference: Features, other: Features, tolerance=FP32) -> list[str]:
    return judge({"photo": compare_features(reference, other)}, tolerance).reasons


def test_the_same_features_in_another_order_agree(reference):
    order = np.random.default_rng(1).permutation(1000)
    parity = compare_features(reference, rows(reference, order))
    assert (parity.common, parity.missing, parity.extra, parity.fraction) == (1000, 0, 0, 1)
    assert parity.max_shift_px == parity.max_score_difference == 0
    assert parity.min_cosine == pytest.approx(1, abs=1e-12)  # in float64
    assert judge({"photo": parity}, FP32).passed


def test_two_images_without_keypoints_agree():
    parity = compare_features(empty(), empty())
    assert parity.fraction == 1
    assert judge({"photo": parity}, FP32).passed


@pytest.mark.parametrize("swap", [False, True])
def test_keypoints_against_none_disagree(reference, swap):
    pair = (empty(), reference) if swap else (reference, empty())
    assert reasons(*pair) == ["photo: keypoints in common 0 < 0.998"]


def test_measures_are_those_of_the_pairs(reference):
    other = rows(shifted(reference, 0.25, kept=0), slice(0, 990))
    other = replace(other, scores=other.scores.copy(), descriptors=other.descriptors.copy())
    other.scores[1] += 0.5
    other.descriptors[2] *= -1
    parity = compare_features(reference, other)
    assert (parity.reference, parity.other, parity.common, parity.missing) == (1000, 990, 990, 10)
    assert parity.fraction == 0.99
    assert parity.max_shift_px == pytest.approx(0.25, abs=1e-4)  # float32 coordinates below 400
    assert parity.median_shift_px == 0
    assert parity.max_score_difference == pytest.approx(0.5)
    assert parity.min_cosine == pytest.approx(-1)
    assert parity.mean_cosine == pytest.approx(988 / 990)


def test_a_keypoint_beyond_the_radius_is_missing_and_extra(reference):
    parity = compare_features(reference, shifted(reference, 0.6, kept=0))
    assert (parity.common, parity.missing, parity.extra) == (999, 1, 1)
    assert compare_features(reference, shifted(reference, 0.6, kept=0), radius_px=1).common == 1000


@pytest.mark.parametrize(("lost", "passes"), [(2, True), (3, False)])
def test_float32_allows_two_of_a_thousand_keypoints_to_differ(reference, lost, passes):
    found = reasons(reference, rows(reference, slice(lost, None)))
    assert found == ([] if passes else ["photo: keypoints in common 0.997 < 0.998"])


def test_one_keypoint_without_partner_is_always_allowed(reference):
    few = rows(reference, slice(0, 20))
    assert reasons(few, rows(few, slice(1, None))) == []
    assert reasons(few, rows(few, slice(2, None))) == ["photo: keypoints in common 0.9 < 0.95"]


def test_faint_keypoints_without_partner_are_not_counted(reference):
    """Rounding decides where a flat score map has its maxima; those score 0.002."""
    faint = replace(reference, scores=np.where(np.arange(1000) < 50, 0.002, reference.scores))
    assert reasons(faint, rows(faint, slice(50, None))) == []
    assert reasons(rows(faint, slice(50, None)), faint) == []
    bright = replace(reference, scores=np.where(np.arange(1000) < 50, 0.02, reference.scores))
    assert reasons(bright, rows(bright, slice(50, None))) == [
        "photo: keypoints in common 0.95 < 0.998"
    ]


def test_keypoints_moved_as_by_tf32_fail_float32_and_pass_float16(reference):
    moved = shifted(reference, 6.7e-3, kept=7)
    assert reasons(reference, moved) == ["photo: max |dxy| in px 0.0067 > 0.001"]
    assert reasons(reference, moved, FP16) == []


def test_another_descriptor_fails(reference):
    noise = np.random.default_rng(2).normal(size=(1000, 64)) * 1e-3
    other = replace(reference, descriptors=unit(reference.descriptors + noise))
    mean, worst = reasons(reference, other)
    assert mean.startswith("photo: mean descriptor cosine 0.9999")
    assert worst.startswith("photo: min descriptor cosine 0.9999")


def test_a_neighbouring_patch_is_allowed_at_pixel_edges_only(reference):
    """A keypoint within rounding of a whole coordinate may get the descriptor of the next patch."""
    at_edge = replace(reference, keypoints=reference.keypoints.copy())
    at_edge.keypoints[:2] = [[5.0001, 5.5], [15.0003, 5.5]]
    descriptors = at_edge.descriptors.copy()
    descriptors[:2] = unit(descriptors[:2] + 0.2 * np.roll(descriptors[:2], 1, axis=1))
    other = replace(shifted(at_edge, -2e-4, kept=slice(0, 2)), descriptors=descriptors)
    parity = compare_features(at_edge, other)
    assert parity.at_edge == 2
    assert 0.95 < parity.min_cosine_at_edge < 0.99
    assert judge({"photo": parity}, FP32).passed
    assert reasons(reference, replace(reference, descriptors=descriptors))  # inside their pixels


def test_a_keypoint_that_moved_into_the_next_pixel_is_at_an_edge(reference):
    at_edge = replace(reference, keypoints=reference.keypoints.copy())
    at_edge.keypoints[0] = [5.01, 5.5]
    assert compare_features(at_edge, shifted(at_edge, -0.02, kept=0)).at_edge == 1
    assert compare_features(at_edge, shifted(at_edge, 0.02, kept=0)).at_edge == 0


def test_another_descriptor_at_a_pixel_edge_fails(reference):
    at_edge = replace(reference, keypoints=np.rint(reference.keypoints))
    descriptors = at_edge.descriptors.copy()
    descriptors[0] = descriptors[1]
    (reason,) = reasons(at_edge, replace(at_edge, descriptors=descriptors))
    assert reason.startswith("photo: min descriptor cosine at pixel edges")


def test_a_pair_at_a_tie_may_shift_but_not_be_described_otherwise(reference):
    x, y = np.floor(reference.keypoints[3])
    moved = shifted(reference, 0.04, kept=3)

    def judged(other, distance):
        parity = compare_features(reference, other, ties=np.array([[x + distance, y]], np.float32))
        return parity.undecided, judge({"photo": parity}, FP32).reasons

    assert judged(moved, 1) == (1, [])
    assert judged(moved, 5) == (0, ["photo: max |dxy| in px 0.04 > 0.001"])
    descriptors = moved.descriptors.copy()
    descriptors[3] = descriptors[4]
    (reason,) = judged(replace(moved, descriptors=descriptors), 1)[1]
    assert reason.startswith("photo: min descriptor cosine at pixel edges and ties")


def test_scores_that_differ_fail(reference):
    other = replace(reference, scores=reference.scores + np.float32(0.001))
    assert reasons(reference, other) == ["photo: max |dscore| 0.001 > 0.0005"]


def test_descriptors_that_are_not_unit_length_fail(reference):
    other = replace(reference, descriptors=reference.descriptors * np.float32(1.01))
    for tolerance in (FP32, FP16):
        assert reasons(reference, other, tolerance) == [
            "photo: max |descriptor length - 1| 0.01 > 0.001"
        ]


@pytest.mark.parametrize("field", ["keypoints", "descriptors", "scores"])
def test_one_value_that_is_not_a_number_fails(reference, field):
    values = getattr(reference, field).copy()
    values[3] = np.nan
    other = replace(reference, **{field: values})
    for tolerance in (FP32, FP16):
        assert "photo: NaN or infinity in the outputs" in reasons(reference, other, tolerance)


def test_another_model_is_refused(reference):
    other = replace(reference, descriptors=np.tile(reference.descriptors, 2))
    with pytest.raises(InputError, match="descriptors have 64 and 128 values"):
        compare_features(reference, other)


def test_one_bad_image_among_good_ones_fails_by_name(reference):
    parities = {f"{i}.png": compare_features(reference, reference) for i in range(50)}
    parities["bad.png"] = compare_features(reference, rows(reference, slice(0, 500)))
    verdict = judge(parities, FP32)
    assert not verdict.passed
    assert verdict.reasons == ["bad.png: keypoints in common 0.5 < 0.998"]


def test_a_verdict_needs_images():
    assert not judge({}, FP32).passed


def test_the_verdict_can_be_read(reference):
    other = shifted(reference, 6.7e-3, kept=7)
    assert judge({"photo": compare_features(reference, other)}, FP32).text.splitlines() == [
        "images               1",
        "keypoints            1000 in the reference, 1000 in the other",
        "keypoints in common  100.000%, worst image 100.000%",
        "|dxy|                max 0.0067 px, median 0 px",
        "descriptor cosine    min 1.0000000, mean 1.0000000; "
        "min 1.00000 of the 0 at pixel edges and ties",
        "|dscore|             max 0",
        "outside the FP32 tolerance",
        "  photo: max |dxy| in px 0.0067 > 0.001",
    ]
