"""`demo_pair.py` as users run it."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage import data

from aliked.drawing import why_no_window

ROOT = Path(__file__).resolve().parents[2]
SHIFT = np.array([12, 5])  # px between consecutive images of `sequence`


def demo(*args, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Run the script without a display."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    return subprocess.run(
        [sys.executable, ROOT / "demo_pair.py", *map(str, args)],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sequence(tmp_path_factory) -> Path:
    """Three 160x128 views of a photograph, each moved by `SHIFT` against the one before."""
    folder = tmp_path_factory.mktemp("sequence")
    for i in range(3):
        x, y = 150 + SHIFT * i
        view = data.astronaut()[y : y + 128, x : x + 160, ::-1]
        cv2.imwrite(str(folder / f"{i}.png"), view)
    return folder


def refused(result: subprocess.CompletedProcess) -> str:
    """The one sentence of a refusal."""
    assert result.returncode == 2, result.stderr
    (sentence,) = result.stderr.splitlines()
    return sentence


def test_the_true_motion_is_found_and_drawn(sequence, tmp_path):
    result = demo(sequence, "--top_k", 200, "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("aliked-t16-homography (this project's own weights ")
    assert "there is no display: writing pictures into demo" in lines[1]
    assert lines[2].startswith("0.png - 1.png: 200 and 200 keypoints, ")
    assert lines[4].startswith("in total: 2 pairs, ")
    # A few wrong matches among at least 100 move the mean by less than a pixel.
    assert abs(float(lines[4].split()[-2]) - np.hypot(*SHIFT)) < 1
    pictures = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert pictures == ["motion.webp", "pair_0001.jpg", "pair_0002.jpg"]
    assert "demo/pair_0001.jpg" in lines[5] and "demo/motion.webp" in lines[6]


def test_threshold_mode_needs_a_threshold(sequence, tmp_path):
    assert "pass --scores_th" in refused(demo(sequence, "--top_k", 0))
    result = demo(
        sequence, "--top_k", 0, "--scores_th", 0.2, "--n_limit", 30,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "0.png - 1.png: 30 and 30 keypoints" in result.stdout
    assert "no window" not in result.stdout  # files were asked for


def test_a_similarity_that_nothing_reaches_gives_no_matches(sequence, tmp_path):
    result = demo(
        sequence, "--top_k", 50, "--min_similarity", 1.1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "in total: 2 pairs, 0 matches\n" in result.stdout


def test_bad_input_is_refused_in_one_sentence(sequence, tmp_path):
    assert "gone" in refused(demo(tmp_path / "gone"))
    assert "no image in" in refused(demo(tmp_path))
    assert "unknown model 'aliked'" in refused(demo(sequence, "--model", "aliked"))
    assert "unknown backend 'caffe'" in refused(demo(sequence, "--backend", "caffe"))
    assert "--backend onnxruntime" in refused(demo(sequence, "--model_path", "model.onnx"))
    assert "--model_path" in refused(demo(sequence, "--backend", "onnxruntime", cwd=tmp_path))
    assert not list(tmp_path.iterdir())  # no output folder either


def test_one_image_is_not_a_pair(sequence, tmp_path):
    (tmp_path / "0.png").write_bytes((sequence / "0.png").read_bytes())
    assert "has one image" in refused(demo(tmp_path))


def test_an_output_folder_that_cannot_be_made_is_refused_first(sequence, tmp_path):
    (tmp_path / "file").touch()
    result = demo(sequence, "--output", tmp_path / "file" / "out")
    assert "cannot write into" in refused(result)
    assert result.stdout == ""


def test_a_truncated_image_ends_the_run_by_name(sequence, tmp_path):
    for path in sequence.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.jpg").write_bytes(cv2.imencode(".jpg", data.coffee())[1].tobytes()[:5000])
    (tmp_path / "2.png").unlink()
    result = demo(tmp_path, "--top_k", 50, "--output", tmp_path / "out")
    assert "2.jpg is truncated" in refused(result)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pair_0001.jpg"]


def test_a_missing_window_is_explained(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert why_no_window() == "there is no display"
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "")
    assert "built without windows" in why_no_window()
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "QT")
    assert why_no_window() is None
