"""Reading data sets with poses: TUM's format, MegaDepth-1500, and what is wrong with them."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from aliked.errors import InputError
from evaluation.pose import rotation_error
from evaluation.pose_datasets import (
    Choice,
    associate,
    megadepth_data,
    read_intrinsics,
    read_trajectory,
    tum_data,
)

CAMERA = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])


def write_image(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


@pytest.fixture
def sequence(tmp_path) -> Path:
    """Five images, a second apart; the camera moves 1 m per second and turns by 90 degrees."""
    lines = ["# timestamp tx ty tz qx qy qz qw"]
    for second in range(5):
        half = np.radians(90 * second) / 2
        write_image(tmp_path / f"{second}.01.png")
        lines.append(f"{second}.0 {second} 0 0 0 0 {np.sin(half)} {np.cos(half)}")
    (tmp_path / "groundtruth.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_poses_of_a_sequence_are_read_as_camera_to_world(sequence):
    data = tum_data(sequence, CAMERA, Choice(stride=1))
    assert [pair.name for pair in data.pairs][:2] == ["0.01.png - 1.01.png", "1.01.png - 2.01.png"]
    # The first camera stands in the world's origin. The second is 1 m along its x axis and turned
    # by 90 degrees about z, so that it sees the first at (0, 1, 0): x points along the world's y.
    pose = data.pairs[0].truth.relative_pose
    np.testing.assert_allclose(pose[:3, 3], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(pose[:3, :3], [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=1e-12)
    assert rotation_error(pose[:3, :3], np.eye(3)) == pytest.approx(90)


def test_images_get_the_nearest_pose_within_the_tolerance():
    stamps = np.array([1.0, 2.0, 3.0])
    wanted = np.array([0.5, 0.995, 1.4, 2.6, 3.015, 9])
    assert associate(wanted, stamps, 0.02).tolist() == [-1, 0, -1, -1, 2, -1]
    assert associate(wanted, stamps, 0.45).tolist() == [-1, 0, 0, 2, 2, -1]
    assert associate(np.array([1.0, 5]), stamps[:1], 0.1).tolist() == [0, -1]


def test_images_listed_in_rgb_txt_may_have_any_name(sequence):
    for index in range(2):
        (sequence / f"{index}.01.png").rename(sequence / f"frame{index}.png")
    (sequence / "rgb.txt").write_text("# color images\n1.0 frame1.png\n0.0 frame0.png\n")
    (pair,) = tum_data(sequence, CAMERA, Choice(stride=1)).pairs
    assert pair.name == "frame0.png - frame1.png"


def test_pairs_with_hardly_any_baseline_are_left_out(sequence):
    assert len(tum_data(sequence, CAMERA, Choice(stride=1, min_baseline=0.9)).pairs) == 4
    with pytest.raises(InputError, match=r"5 of 5 images have a pose .* --min_baseline"):
        tum_data(sequence, CAMERA, Choice(stride=1, min_baseline=1.1))
    with pytest.raises(InputError, match=r"0 of 5 images have a pose within 0.001 s"):
        tum_data(sequence, CAMERA, Choice(tolerance=0.001))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3", "line 7 of .*txt is not `timestamp tx ty tz qx qy qz qw`: '1 2 3'"),
        ("5 0 0 0 0 0 zero 1", "line 7 of .*groundtruth.txt is not"),
        ("5 0 0 nan 0 0 0 1", "line 7 of .*groundtruth.txt is not"),
        ("5 0 0 0 0 0 0 0", "line 7 of .*groundtruth.txt has a quaternion of length 0"),
    ],
)
def test_a_line_that_is_no_pose_is_named(sequence, line, message):
    with open(sequence / "groundtruth.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        read_trajectory(sequence / "groundtruth.txt")


def test_a_trajectory_without_poses_is_refused(tmp_path):
    (tmp_path / "groundtruth.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="has no line that is not a comment"):
        read_trajectory(tmp_path / "groundtruth.txt")
    with pytest.raises(InputError, match=r"cannot read .*gone.txt"):
        read_trajectory(tmp_path / "gone.txt")


def test_an_image_without_a_timestamp_is_named(sequence):
    write_image(sequence / "first.png")
    with pytest.raises(InputError, match=r"first.png is not named by its timestamp"):
        tum_data(sequence, CAMERA, Choice())


def test_intrinsics_are_four_numbers_or_a_file_with_them(tmp_path):
    expected = [[525, 0, 319.5], [0, 520, 239.5], [0, 0, 1]]
    numbers = ["525", "520", "319.5", "239.5"]
    assert read_intrinsics(numbers).tolist() == expected
    (tmp_path / "camera.txt").write_text(f"# fx fy cx cy\n{' '.join(numbers)}\n")
    assert read_intrinsics([str(tmp_path / "camera.txt")]).tolist() == expected
    with pytest.raises(InputError, match="line 1 of --intrinsics is not `fx fy cx cy`"):
        read_intrinsics(numbers[:3])
    with pytest.raises(InputError, match="focal length of -525"):
        read_intrinsics(["-525", *numbers[1:]])


COLMAP = np.array([[500.0, 0, 400], [0, 500, 300], [0, 0, 1]])  # of 800x600 pixels
TO_THE_RIGHT = np.array([[1, 0, 0, -1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize(
    "pose", [[*np.eye(3).ravel(), -1, 0, 0], TO_THE_RIGHT.ravel()], ids=["R t", "4x4"]
)
def test_megadepth_in_the_layout_of_glue_factory(tmp_path, pose):
    for index in range(2):
        write_image(tmp_path / "images" / "0015" / f"{index}.png", 800, 600)
    numbers = [*COLMAP.ravel(), *COLMAP.ravel(), *pose]
    line = " ".join(["0015/0.png", "0015/1.png", *map(str, numbers)])
    path = tmp_path / "pairs_calibrated.txt"
    path.write_text("\n".join([line] * 1500))
    data = megadepth_data(tmp_path)
    assert (len(data.pairs), len(data.images)) == (1500, 2)
    motion = data.pairs[0].truth
    np.testing.assert_allclose(motion.relative_pose[:3, 3], [-1, 0, 0])
    np.testing.assert_allclose(motion.intrinsics[1][0], [1000, 0, 799.5], atol=1e-9)
    path.write_text(f"{line}\n{line[:80]}\n")
    with pytest.raises(InputError, match=r"line 2 of .*pairs_calibrated.txt is not two names"):
        megadepth_data(tmp_path)


def write_list(folder: Path, pairs: int = 1500) -> str:
    """MegaDepth-1500 with two photographs; a line of its list."""
    for index in range(2):
        write_image(folder / "images" / "0015" / f"{index}.png", 800, 600)
    numbers = [*COLMAP.ravel(), *COLMAP.ravel(), *TO_THE_RIGHT.ravel()]
    line = " ".join(["0015/0.png", "0015/1.png", *map(str, numbers)])
    (folder / "pairs_calibrated.txt").write_text("\n".join([line] * pairs))
    return line


def test_megadepth_is_read_as_published(tmp_path):
    write_list(tmp_path)
    data = megadepth_data(tmp_path)
    assert len(data.pairs) == 1500
    assert len(data.images) == 2
    assert {pair.group for pair in data.pairs} == {"0015"}
    motion = data.pairs[0].truth
    np.testing.assert_allclose(motion.relative_pose[:3, 3], [-1, 0, 0])
    # The long side becomes 1600: twice the size. COLMAP's centre of the image is (400, 300), the
    # corner of a pixel; (799.5, 599.5) is the same place from the centre of the first pixel.
    assert data.pairs[0].first.size == (1600, 1200)
    expected = [[1000, 0, 799.5], [0, 1000, 599.5], [0, 0, 1]]
    np.testing.assert_allclose(motion.intrinsics[0], expected, atol=1e-9)


def test_what_is_missing_of_megadepth_is_named_and_where_it_is(tmp_path):
    write_list(tmp_path)
    (tmp_path / "images" / "0015" / "1.png").unlink()
    with pytest.raises(
        InputError, match=r"lacks 1 of its 2 photographs, such as images/0015/1.png; .*https"
    ):
        megadepth_data(tmp_path)
    write_list(tmp_path, pairs=1499)
    with pytest.raises(InputError, match="lists 1499 pairs, not 1500"):
        megadepth_data(tmp_path)


def test_a_list_of_pickled_objects_is_not_read(tmp_path):
    """LoFTR's layout: reading it would build whatever objects the file asks for."""
    for names in (["0015_0.1_0.3.npz"], ["scene_info/x.npz"], ["Undistorted_SfM/0015/1.jpg"]):
        folder = tmp_path / names[0].partition("/")[0]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.savez(folder / name, image_paths=np.array([None], object))
        with pytest.raises(InputError, match=r"pickled Python objects.*how to convert them"):
            megadepth_data(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda words: ["../../etc/1.png", *words[1:]], "line 1501 of .* has '../../etc/1.png'"),
        (lambda words: [words[0], *words[:1], *words[2:]], "pairs 0015/0.png with itself"),
        (lambda words: [*words[:2], "-500", *words[3:]], "line 1501 .* focal length of -500"),
        (lambda words: [*words[:10], "2", *words[11:]], "line 1501 .* intrinsics that are not"),
        (lambda words: [*words[:20], "2", *words[21:]], "the pose of line 1501 .* is no rotation"),
        (lambda words: [*words[:20], "nan", *words[21:]], "line 1501 .* is not two names"),
        (lambda words: [*words[:-1], "2"], "the pose of line 1501 .* is no rotation"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, damage, sentence):
    line = write_list(tmp_path)
    with open(tmp_path / "pairs_calibrated.txt", "a") as file:
        file.write("\n" + " ".join(damage(line.split())) + "\n")
    with pytest.raises(InputError, match=sentence):
        megadepth_data(tmp_path)


@pytest.mark.parametrize(
    ("listing", "sentence"),
    [
        ("0.0 ../frame.png\n", "line 1 of .*rgb.txt has '../frame.png'"),
        ("0.0 /etc/frame.png\n", "line 1 of .*rgb.txt has '/etc/frame.png'"),
        ("0.0\n", "line 1 of .*rgb.txt has ''"),
        ("0.0 0.01.png\n1.0 0.01.png\n", "rgb.txt lists 0.01.png twice"),
        ("nan 0.01.png\n", "line 1 of .*rgb.txt is not `timestamp file`"),
    ],
)
def test_a_list_of_images_that_is_none_is_named(sequence, listing, sentence):
    (sequence / "rgb.txt").write_text(listing)
    with pytest.raises(InputError, match=sentence):
        tum_data(sequence, CAMERA, Choice(stride=1))


def test_an_image_named_nan_has_no_timestamp(sequence):
    write_image(sequence / "nan.png")
    with pytest.raises(InputError, match=r"nan.png is not named by its timestamp"):
        tum_data(sequence, CAMERA, Choice())
