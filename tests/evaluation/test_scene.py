"""The synthetic scene: its geometry by hand, its pictures against its geometry."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliked.errors import InputError
from evaluation.scene import FILE, Faces, Scene, read_scene
from tests.helpers import damage
from tools import make_scene, scene_contents
from tools.scene_rendering import pyramid, render

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "scene_640x480"


def facing(*rectangles: tuple[float, float, float, float, float]) -> Faces:
    """Rectangles that face the camera: left, top, width, height, depth."""
    corners = [[x, y, z] for x, y, _, _, z in rectangles]
    widths = [[w, 0, 0] for _, _, w, _, _ in rectangles]
    heights = [[0, h, 0] for _, _, _, h, _ in rectangles]
    return Faces(*(np.array(values, float) for values in (corners, widths, heights)))


def small_scene(faces: Faces, *moves: tuple[float, float, float]) -> Scene:
    """Views of 100x80 pixels, focal length 100, from the origin and after moves to the right."""
    poses = np.tile(np.eye(4), (1 + len(moves), 1, 1))
    poses[1:, :3, 3] = -np.array(moves).reshape(-1, 3)
    intrinsics = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    return Scene(Path(), (100, 80), intrinsics, faces, ("a", "b"), poses, ())


def test_depth_is_that_of_the_nearest_rectangle():
    scene = small_scene(facing((-1, -1, 2, 2, 4), (0, -1, 1, 2, 2)))
    hits = scene.cast(0, np.array([[40, 40], [60, 40], [10, 40]]))
    assert hits.face.tolist() == [0, 1, -1]
    assert hits.depth.tolist() == [4, 2, np.inf]
    # The second ray passes (0.2, 0, 2): a fifth of the way along the near rectangle.
    np.testing.assert_allclose([hits.a[1], hits.b[1]], [0.2, 0.5], atol=1e-12)


def test_a_slanted_rectangle_is_met_where_the_ray_meets_its_plane():
    faces = Faces(np.array([[-2.0, -2, 2]]), np.array([[4.0, 0, 4]]), np.array([[0, 4.0, 0]]))
    scene = small_scene(faces)  # the plane z = 4 + x
    hits = scene.cast(0, np.array([[50, 40], [70, 40]]))
    np.testing.assert_allclose(hits.depth, [4, 5], atol=1e-12)  # x = 0.2 z gives z = 4 / 0.8


def test_a_point_moves_by_focal_length_times_baseline_over_depth():
    scene = small_scene(facing((-9, -9, 18, 18, 4)), (1, 0, 0))
    np.testing.assert_allclose(scene.project(0, 1, np.array([[50.0, 30]])), [[25, 30]], atol=1e-12)


def test_what_the_second_view_does_not_show_has_no_projection():
    """From the right, a near board hides a part of the wall that the first view shows."""
    scene = small_scene(facing((-9, -9, 18, 18, 4), (0.2, -1, 0.4, 2, 2)), (1, 0, 0))
    # The wall at x = 0, which the board hides; at 0.32, beside it; the board; outside the second.
    points = np.array([[50.0, 40], [58, 40], [65, 40], [10, 40]])
    found = scene.project(0, 1, points)
    np.testing.assert_allclose(found[1:3], [[33, 40], [15, 40]], atol=1e-12)
    assert np.isnan(found[[0, 3]]).all()


def test_a_view_overlaps_itself_fully_and_an_opposite_one_not_at_all():
    scene = small_scene(facing((-9, -9, 18, 18, 4)), (1, 0, 0), (8, 0, 0))
    assert scene.overlap(0, 0) == 1
    # 25 of 100 columns are lost, of a grid with 32 columns.
    assert scene.overlap(0, 1) == pytest.approx(0.75, abs=1 / 32)
    assert scene.overlap(0, 2) == 0


def test_a_ramp_is_rendered_exactly():
    """One texel per pixel, brightness growing evenly: averages and interpolation change nothing."""
    scene = small_scene(facing((-0.505, -0.405, 1.01, 0.81, 1)))
    ramp = np.linspace(0.1, 0.9, 101)[None, :, None] * np.ones((81, 1, 3))
    image = render(scene, 0, [pyramid(ramp)])
    # float32; at the border the ramp ends, so that the first column is brighter.
    np.testing.assert_allclose(image[:, 1:], ramp[:80, 1:100], atol=1e-6)


def test_an_edge_through_a_pixel_gives_the_mean_of_both_sides():
    """The near rectangle ends in the middle of pixel 30, which is a quarter black there."""
    dark, bright = (np.full((4, 4, 3), value, np.float32) for value in (0, 1))
    # Pixel 30 spans 29.5 to 30.5; the edge at 29.75 leaves a quarter of it to the dark one.
    scene = small_scene(facing((-9, -9, 9 + (29.75 - 50) / 100, 18, 1), (-9, -9, 18, 18, 2)))
    image = render(scene, 0, [pyramid(t) for t in (dark, bright)])
    assert image[40, 29:32, 0].tolist() == [0, 0.75, 1]


def test_a_fine_pattern_far_away_is_rendered_without_false_patterns():
    """16 texels per pixel of black and white squares come out as grey."""
    squares = (np.indices((1024, 1024)).sum(axis=0) % 2)[..., None] * np.ones(3)
    scene = small_scene(facing((-0.32, -0.32, 0.64, 0.64, 1)))
    image = render(scene, 0, [pyramid(squares)])[10:70, 20:80]
    assert np.abs(image - 0.5).max() < 0.02


def remaining_shift(scene: Scene, first: int, second: int, intrinsics: np.ndarray) -> float:
    """How far the second picture is from the first after warping it by the geometry, pixels."""
    scene = replace(scene, intrinsics=intrinsics)
    images = [
        cv2.imread(str(FOLDER / scene.names[view]), cv2.IMREAD_GRAYSCALE)
        for view in (first, second)
    ]
    height, width = images[0].shape
    points = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2)
    there = scene.project(first, second, points).reshape(height, width, 2)
    inside = np.isfinite(there[..., 0]).astype(np.uint8)
    x, y = np.moveaxis(np.nan_to_num(there).astype(np.float32), -1, 0)
    warped = cv2.remap(images[1], x, y, cv2.INTER_CUBIC)
    # What is next to the border of a shape is seen past it by one of the views.
    inside = cv2.erode(inside, np.ones((9, 9)))
    until = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-6)
    shift = np.eye(2, 3, dtype=np.float32)
    _, shift = cv2.findTransformECC(
        images[0], warped, shift, cv2.MOTION_TRANSLATION, until, inside, 5
    )
    return float(np.linalg.norm(shift[:, 2]))


def test_depth_and_poses_agree_with_the_pictures():
    scene = read_scene(FOLDER)
    first, second = next(pair for pair in scene.pairs if scene.overlap(*pair) > 0.6)
    # 0.012 pixels are measured; the limit leaves room for another WebP decoder.
    assert remaining_shift(scene, first, second, scene.intrinsics) < 0.03
    # As if the corner of the first pixel were the origin, not its centre: 0.13 pixels.
    corner = scene.intrinsics + np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    assert remaining_shift(scene, first, second, corner) > 0.08


def test_the_scene_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Floor and walls in plain grey: painting them takes most of the time."""
    pytest.importorskip("skimage", reason="scikit-image carries the photographs")
    grey = np.full((8, 8, 3), 0.5, np.float32)
    monkeypatch.setattr(scene_contents, "painted", lambda surface: grey)


def test_the_script_makes_the_committed_scene(unpainted):
    """Its first views, that is: they do not depend on how many follow."""
    faces = scene_contents.faces_of(scene_contents.contents())
    made = make_scene.plan(FOLDER, (640, 480), 6, 0, faces)
    committed = read_scene(FOLDER)
    np.testing.assert_allclose(made.intrinsics, committed.intrinsics, atol=1e-9)
    np.testing.assert_allclose(made.poses, committed.poses[:6], atol=1e-9)
    np.testing.assert_allclose(made.faces.corner, committed.faces.corner, atol=1e-9)
    assert made.pairs == tuple(pair for pair in committed.pairs if max(pair) < 6)


def test_the_script_writes_a_scene_that_can_be_read(unpainted, tmp_path):
    command = ["--output", str(tmp_path / "new"), "--views", "2", "--size", "64", "48"]
    make_scene.main(make_scene.parser().parse_args(command))
    scene = read_scene(tmp_path / "new")
    assert (len(scene.names), scene.size) == (2, (64, 48))
    assert cv2.imread(str(scene.folder / scene.names[1])).shape == (48, 64, 3)


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "scene"))


def test_a_missing_view_is_named(copy):
    (copy / "000003.webp").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its 24 views, such as 000003.webp; restore"):
        read_scene(copy)


@pytest.mark.parametrize("damage", ["{", '{"faces": []}', "[]"])
def test_a_damaged_description_is_named(copy, damage):
    (copy / FILE).write_text(damage)
    with pytest.raises(InputError, match=r"cannot read the scene in .*scene\.json"):
        read_scene(copy)


def test_pairs_of_views_that_do_not_exist_are_refused(copy):
    data = json.loads((copy / FILE).read_text())
    (copy / FILE).write_text(json.dumps(data | {"pairs": [[0, 24]]}))
    with pytest.raises(InputError, match="pairs views that it does not have"):
        read_scene(copy)


def changed(**changes):
    return lambda data: data | changes


def of_view(**changes):
    return lambda data: data | {"views": [data["views"][0] | changes, *data["views"][1:]]}


def scaled_pose(factor: float):
    def change(data):
        pose = np.array(data["views"][0]["pose"])
        pose[:3, :3] *= factor
        return of_view(pose=pose.tolist())(data)

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(size=[641, 480]), r"000000.webp has 640x480 pixels and .* says 641x480"),
        (changed(size=[640.0, "480"]), r"cannot read the scene in .*size"),
        (changed(size=[-640, 480]), r"cannot read the scene in .*size"),
        (changed(pairs=[[1, 1]]), "pairs view 1 with itself"),
        (changed(pairs=[[0, -1]]), r"cannot read the scene in .*pairs"),
        (changed(pairs=[[0, 1.5]]), r"cannot read the scene in .*pairs"),
        (changed(pairs=[[0, 1], [0, 1]]), "has a pair twice"),
        (changed(intrinsics=[[0, 0, 9], [0, 9, 9], [0, 0, 1]]), "focal length of 0"),
        (changed(intrinsics=[[9, 0, 9], [0, 9, 9], [0, 1, 1]]), "intrinsics that are not"),
        (changed(intrinsics=[[9, 0, 9], [0, 9, 9]]), r"cannot read the scene in .*intrinsics"),
        (changed(faces=[{"corner": [0, 0, 0], "edges": [[1, 0, 0], [1, 0, 0]]}]), "no rectangle"),
        (changed(faces=[{"corner": [0, 0], "edges": []}]), r"cannot read the scene in .*corner"),
        (changed(faces=None), r"cannot read the scene in .*faces"),
        (changed(lights=[]), r"cannot read the scene in .*lights"),
        (of_view(pose="eye"), r"cannot read the scene in .*pose"),
        (of_view(pose=np.diag([1.0, 1, -1, 1]).tolist()), "pose of 000000.webp .* mirrored"),
        (of_view(file="../000000.webp"), "has '../000000.webp' where an image of its own"),
        (scaled_pose(1.1), "pose of 000000.webp .* scaled"),
    ],
)
def test_a_scene_that_would_be_scored_wrongly_is_refused(copy, change, sentence):
    data = json.loads((copy / FILE).read_text())
    (copy / FILE).write_text(json.dumps(change(data)))
    with pytest.raises(InputError, match=sentence):
        read_scene(copy)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", '"1"', "null"])
def test_a_number_that_is_none_is_refused(copy, number):
    text = (copy / FILE).read_text()
    (copy / FILE).write_text(text.replace("768.0", number, 1))
    with pytest.raises(InputError, match=r"scene\.json"):
        read_scene(copy)


def test_a_scene_that_is_no_regular_file_is_refused(copy):
    (copy / FILE).unlink()
    os.mkfifo(copy / FILE)
    with pytest.raises(InputError, match="is no regular file"):
        read_scene(copy)


def test_two_views_of_one_place_have_no_direction_between_them(copy):
    data = json.loads((copy / FILE).read_text())
    data["views"][1]["pose"] = data["views"][0]["pose"]
    (copy / FILE).write_text(json.dumps(data | {"pairs": [[0, 1]]}))
    with pytest.raises(InputError, match="views 0 and 1, which have one place"):
        read_scene(copy)


DESCRIPTION = json.loads((FOLDER / FILE).read_text())


@damage.QUICKLY
@given(st.sampled_from(damage.places(DESCRIPTION)), damage.HOW, damage.JSON)
def test_a_changed_description_is_read_or_refused(place, how, value):
    with tempfile.TemporaryDirectory() as folder:
        for name in (view["file"] for view in DESCRIPTION["views"]):
            (Path(folder) / name).symlink_to(FOLDER / name)
        data = damage.changed(DESCRIPTION, place, how, value)
        (Path(folder) / FILE).write_text(json.dumps(data))
        try:
            scene = read_scene(Path(folder))
        except InputError as error:
            assert FILE in str(error) or "lacks" in str(error)
            return
    assert np.isfinite(scene.poses).all() and np.isfinite(scene.intrinsics).all()
