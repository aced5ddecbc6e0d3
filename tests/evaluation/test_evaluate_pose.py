"""`evaluate.py pose` and `evaluate.py sequences` as users run them, with SIFT on a few images."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import evaluate
from aliked import cli
from evaluation.scene import FILE, Scene, read_scene, write_scene

ROOT = Path(__file__).resolve().parents[2]
SCENE = ROOT / "assets" / "scene_640x480"


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one sentence that the script refuses options with, run in this process."""

    def refused(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.run(evaluate.main, evaluate.parser())
        assert end.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence

    return refused


def run(folder: Path, *args) -> dict:
    """The record of an evaluation of SIFT that succeeds."""
    output = folder / "record.jsonl"
    options = ["--systems", "sift", "--top_k", 300, "--device", "cpu", "--output", output]
    options += ["--features", folder / "features", "--worst", 1]
    command = evaluate.parser().parse_args([*map(str, [*args, *options])])
    assert not evaluate.main(command)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def views() -> Scene:
    """Three views that follow each other closely."""
    scene = read_scene(SCENE)
    chosen = next(
        [i, j, k]
        for i, j in scene.pairs
        for k in range(j + 1, len(scene.names))
        if min(scene.overlap(i, j), scene.overlap(j, k)) > 0.5
    )
    names = tuple(scene.names[index] for index in chosen)
    return replace(scene, names=names, poses=scene.poses[chosen], pairs=((0, 1), (1, 2)))


@pytest.fixture(scope="module")
def scene_record(views, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("scene")
    for name in views.names:
        (folder / name).write_bytes((SCENE / name).read_bytes())
    write_scene(views, folder / FILE)
    return run(folder, "pose", folder)


def test_poses_of_the_scene_are_found(scene_record):
    assert scene_record["status"] == "ok"
    assert len(scene_record["pairs"]) == 2
    for row in scene_record["pairs"]:
        assert 0 < row["correct"][1] <= row["matches"] <= 300
        # Over half of the first view is seen by the second: SIFT is a few degrees off at most.
        assert np.median(row["errors"]["opencv"]) < 5


def test_the_same_views_in_tum_format_are_judged_by_the_same_poses(views, scene_record, tmp_path):
    lines = []
    for index, (name, pose) in enumerate(zip(views.names, views.poses, strict=True)):
        (tmp_path / f"{index}.5.webp").write_bytes((SCENE / name).read_bytes())
        to_world = np.linalg.inv(pose)
        axis = cv2.Rodrigues(to_world[:3, :3])[0][:, 0]
        angle = np.linalg.norm(axis)
        quaternion = [*(np.sin(angle / 2) * axis / angle), np.cos(angle / 2)]
        lines.append(" ".join(map(repr, map(float, [index + 0.51, *to_world[:3, 3], *quaternion]))))
    (tmp_path / "groundtruth.txt").write_text("\n".join(lines) + "\n")
    fx, fy, cx, cy = views.intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    record = run(tmp_path, "pose", tmp_path, "--stride", 1, "--intrinsics", fx, fy, cx, cy)
    for row, same in zip(record["pairs"], scene_record["pairs"], strict=True):
        assert row["correct"] is None  # no depth
        assert row["matches"] == same["matches"]
        # By the same poses and intrinsics: within 1 px of the true epipolar lines.
        assert row["epipolar"] == same["epipolar"] > 0
        # Random numbers go by the names of the images.
        assert np.median(row["errors"]["opencv"]) < 5


def test_a_sequence_needs_no_ground_truth(tmp_path):
    for index in range(3):
        source = ROOT / "assets" / "sequence_640x480" / f"00000{index}.jpg"
        (tmp_path / source.name).write_bytes(source.read_bytes())
    record = run(tmp_path, "sequences", tmp_path)
    assert len(record["pairs"]) == 2
    for row in record["pairs"]:
        # Neighbouring frames of a plane, a third of the keypoints at least are found again.
        assert 100 <= row["inliers"] <= row["matches"] <= 300


def test_bad_input_is_refused_in_one_sentence(refused, tmp_path):
    assert "has no scene.json, no groundtruth.txt" in refused("pose", tmp_path)
    assert "megadepth1500.zip" in refused("pose", tmp_path)
    (tmp_path / "groundtruth.txt").write_text("1 2 3\n")
    assert "has no intrinsics; pass --intrinsics" in refused("pose", tmp_path)
    camera = ["--intrinsics", 500, 500, 320, 240]
    assert "line 1 of" in refused("pose", tmp_path, *camera)
    (tmp_path / "Undistorted_SfM").mkdir()
    assert "pickled Python objects, which are not read here" in refused("pose", tmp_path)
    assert "--stride is for sequences in TUM's format" in refused("pose", SCENE, "--stride", 3)
    assert "no image in" in refused("sequences", tmp_path)
