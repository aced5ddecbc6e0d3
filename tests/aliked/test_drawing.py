"""Pictures of matches: what they show where, and that they are written whole."""

import os

import cv2
import numpy as np
import pytest

from aliked.drawing import (
    GAP,
    choose_lines,
    draw_matches,
    draw_motion,
    write_animation,
    write_picture,
)
from aliked.features import Features

NO_MATCHES = np.empty((0, 2), np.int64)


def features(*keypoints: tuple[float, float]) -> Features:
    points = np.array(keypoints, np.float32).reshape(-1, 2)
    return Features(points, np.ones(len(points), np.float32), np.ones((len(points), 1), np.float32))


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def coloured(picture: np.ndarray) -> np.ndarray:
    """[H, W] bool: pixels that are not grey."""
    return np.ptp(picture.astype(int), axis=2) > 30


def test_landscape_images_are_joined_side_by_side_and_panoramas_stacked():
    none = features()
    beside = draw_matches(grey(480, 640), none, grey(480, 640), none, NO_MATCHES, "")
    above = draw_matches(grey(376, 1241), none, grey(376, 1241), none, NO_MATCHES, "")
    assert beside.shape[1] == 640 + GAP + 640 and beside.shape[0] < 540
    assert above.shape[1] == 1241 and above.shape[0] > 376 + GAP + 376


def test_a_match_is_a_line_from_keypoint_to_keypoint():
    match = np.array([[0, 0]])
    first, second = features((100, 50)), features((200, 250))
    picture = coloured(draw_matches(grey(480, 640), first, grey(480, 640), second, match, ""))
    end = np.array([200 + 640 + GAP, 250])
    assert picture[50, 100] and picture[end[1], end[0]]
    middle = ((np.array([100, 50]) + end) / 2).round().astype(int)
    assert picture[middle[1] - 1 : middle[1] + 2, middle[0]].any()
    assert not picture[300:480].any()


def test_right_matches_are_green_and_wrong_ones_red():
    points, matches = features((100, 50), (100, 250)), np.array([[0, 0], [1, 1]])
    correct = np.array([True, False])
    image = grey(480, 640)
    picture = draw_matches(image, points, image, points, matches, "", correct).astype(int)
    (right, wrong) = picture[50, 100], picture[250, 100]
    assert right[1] > right[0] + 100 and wrong[0] > wrong[1] + 100


def test_few_lines_are_drawn_spread_over_the_image_the_most_similar_first():
    """A hundred matches crowd one corner, one is in each of the others."""
    random = np.random.default_rng(0)
    crowd = random.uniform(0, 50, (100, 2))
    corners = np.array([[600.0, 10], [10, 400], [600, 400]])
    points = np.vstack([crowd, corners])
    similarity = np.r_[random.uniform(0.8, 1, 100), [0.1, 0.1, 0.1]]
    chosen = choose_lines(points, similarity, 4)
    assert chosen.tolist() == [int(similarity.argmax()), 100, 101, 102]
    assert choose_lines(points, similarity, 0).tolist() == []
    assert choose_lines(points, similarity, 103).tolist() == list(range(103))
    assert choose_lines(np.zeros((5, 2)), np.arange(5.0), 2).tolist() == [3, 4]  # all at one place


def test_right_and_wrong_lines_keep_their_shares():
    random = np.random.default_rng(0)
    points, correct = random.uniform(0, 600, (400, 2)), np.arange(400) < 300
    chosen = choose_lines(points, random.uniform(size=400), 40, correct)
    assert len(set(chosen.tolist())) == 40 and correct[chosen].sum() == 30


def test_matches_that_are_not_drawn_are_counted_in_the_caption():
    points = features(*[(20 + 12 * i, 20 + 9 * i) for i in range(40)])
    matches = np.repeat(np.arange(40)[:, None], 2, axis=1)
    image = grey(480, 640)
    few, every = (
        draw_matches(image, points, image, points, matches, "caption", lines=n) for n in (5, None)
    )
    between = slice(0, 480), slice(500, 1140)  # where lines are and hardly a keypoint
    assert 0 < coloured(few)[between].sum() < coloured(every)[between].sum() / 3
    assert (few[490:] != every[490:]).any()


def test_a_keypoint_without_partner_is_drawn_without_colour():
    picture = draw_matches(
        grey(480, 640), features((100, 50)), grey(480, 640), features(), NO_MATCHES, ""
    )
    around = picture[45:56, 95:106]
    assert not coloured(around).any()
    assert around.max() > 150  # brighter than the darkened photograph


def test_keypoints_stay_at_their_place_in_a_reduced_picture():
    """3200 px wide images are drawn at half the size each; pixel centres are whole numbers."""
    image = grey(2000, 3200)
    picture = draw_motion(
        features((1600, 1000)), image, features((1600, 1000)), np.array([[0, 0]]), ""
    )
    scale = picture.shape[1] / 3200
    y, x = np.argwhere(coloured(picture)).mean(axis=0)
    expected = (np.array([1600, 1000]) + 0.5) * scale - 0.5
    assert abs(np.array([x, y]) - expected).max() < 0.3  # dots are drawn at 1/16 px


def test_colours_tell_slow_from_fast_motion():
    before = features((100, 100), (300, 300))
    after = features((100, 100), (400, 300))  # 100 px are more than a tenth of 640
    picture = draw_motion(before, grey(480, 640), after, np.array([[0, 0], [1, 1]]), "")
    still, fast = picture[100, 100].astype(int), picture[300, 400].astype(int)
    assert still[1] > still[0] + 100  # green
    assert fast[0] > fast[1] + 100  # red


def test_small_images_are_enlarged_so_that_the_caption_fits():
    caption = "1.png - 2.png: 10 and 10 keypoints, 5 matches, mean displacement 3.0 px"
    picture = draw_matches(grey(32, 40), features(), grey(32, 40), features(), NO_MATCHES, caption)
    assert picture.shape[1] == 640
    text = picture[-28:].max(axis=(0, 2)) > 150
    assert 300 < np.flatnonzero(text).max() < 632


def test_a_caption_can_name_a_file_whose_name_is_not_utf8():
    name = os.fsdecode(b"caf\xe9.jpg")
    none = features()
    picture = draw_matches(grey(480, 640), none, grey(480, 640), none, NO_MATCHES, name)
    assert (picture[-28:] > 200).any()


def test_a_strip_that_would_have_no_row_left_is_drawn():
    one = features((7000, 3))
    picture = draw_motion(one, grey(5, 14000), one, np.array([[0, 0]]), "caption")
    assert coloured(picture).any()


def test_images_of_different_sizes_can_be_joined():
    first, second = features((10, 10)), features((700, 500))
    picture = draw_matches(
        grey(480, 640), first, grey(600, 800), second, np.array([[0, 0]]), "caption"
    )
    assert coloured(picture)[500, 640 + GAP + 700]


def test_the_images_are_left_alone():
    image = grey(480, 640)
    one = features((10, 10))
    draw_matches(image, one, image, one, np.array([[0, 0]]), "caption")
    draw_motion(one, image, one, np.array([[0, 0]]), "caption")
    assert (image == 100).all()


def test_pictures_are_written_in_rgb(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    write_picture(tmp_path / "red.png", red)
    assert cv2.imread(str(tmp_path / "red.png"))[0, 0].tolist() == [0, 0, 255]  # BGR
    assert [path.name for path in tmp_path.iterdir()] == ["red.png"]


@pytest.mark.parametrize("count", [1, 4])
def test_an_animation_holds_every_frame_and_repeats(tmp_path, count):
    frames = [np.full((60 + 10 * i, 80, 3), (50 * i, 0, 0), np.uint8) for i in range(count)]
    write_animation(tmp_path / "motion.webp", frames)
    read, animation = cv2.imreadanimation(str(tmp_path / "motion.webp"))
    assert read and len(animation.frames) == count
    height = 60 + 10 * (count - 1)
    for i, frame in enumerate(animation.frames):
        assert frame.shape[:2] == (height, 80)
        assert abs(int(frame[30, 40, 2]) - 50 * i) < 10  # BGR, compressed
    assert animation.loop_count == 0  # for ever
