"""`demo_pair.py` as users run it."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage import data

from aliked import cli
from aliked.commands import match
from aliked.drawing import why_no_window
from aliked.weights import LIGHTGLUE

ROOT = Path(__file__).resolve().parents[2]
LIGHTGLUE_OPTIONS = ("--model", "aliked-n16", "--matcher", "lightglue")
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--matcher", "lightglue"], "64 long, but these LightGlue weights match descriptors of"),
        ([*LIGHTGLUE_OPTIONS, "--min_similarity", "0.5"], "has a score of its own"),
        (["--matcher_weights", "gone.pth"], "pass --matcher lightglue as well"),
        ([*LIGHTGLUE_OPTIONS, "--matcher_weights", "gone.pth"], "gone.pth"),
    ],
)
def test_a_matcher_that_does_not_fit_is_refused_before_anything_is_done(
    options, words, sequence, run, tmp_path
):
    status, _, error = run(sequence, "--top_k", 50, "--output", tmp_path / "out", *options)
    assert status == 2 and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lightglue_matches_the_sequence_too(sequence, run, tmp_path, weights_dir):
    if not (weights_dir / f"{LIGHTGLUE}.pth").is_file():
        pytest.skip("no LightGlue weights")
    status, out, _ = run(
        *(sequence, "--model", "aliked-n16", "--weights", weights_dir, "--top_k", 200),
        *("--matcher", "lightglue", "--matcher_weights", weights_dir, "--output", tmp_path / "out"),
    )
    assert status == 0
    mean = float(out.rpartition("mean displacement ")[2].split()[0])
    assert mean == pytest.approx(np.hypot(*SHIFT), abs=0.3)
    assert "matched by LightGlue" in out


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script in this process, which has PyTorch: status, stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["demo_pair.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.run(match.main, match.parser())
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(run):
    """The one sentence that the script refuses options with, before it prints anything else."""

    def refused(*args) -> str:
        status, _, err = run(*args)
        assert status == 2, err
        (sentence,) = err.splitlines()
        return sentence

    return refused


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


def test_the_frames_of_a_video_are_matched(sequence, run, refused, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"mp4v"), 10, (160, 128))
    for index in (0, 1, 1, 2, 2):
        writer.write(cv2.imread(str(sequence / f"{index}.png")))
    writer.release()
    options = ("--top_k", 200, "--device", "cpu", "--output", tmp_path / "out")
    status, out, err = run(clip, "--every", 2, *options)
    assert status == 0, err
    assert "clip.mp4/000000 - clip.mp4/000002: 200 and 200 keypoints" in out
    assert abs(float(out.partition("in total: 2 pairs, ")[2].split()[4]) - np.hypot(*SHIFT)) < 2
    assert len(list((tmp_path / "out").glob("pair_*.jpg"))) == 2
    assert "has one frame; give a video with" in refused_after(run, clip, "--frames", 1, *options)
    assert "camera 0 has no end; pass --frames N" in refused("0", *options)
    assert "--every needs a video" in refused(sequence, "--every", 2, *options)


def refused_after(run, *args) -> str:
    """What is said last where a run ends with status 2."""
    status, _, err = run(*args)
    assert status == 2
    return err.splitlines()[-1]


def test_threshold_mode_needs_a_threshold(sequence, run, refused):
    assert "pass --scores_th" in refused(sequence, "--top_k", 0)
    options = ["--top_k", 0, "--scores_th", 0.2, "--n_limit", 30, "--output", "out"]
    status, out, err = run(sequence, *options)
    assert status == 0, err
    assert "0.png - 1.png: 30 and 30 keypoints" in out
    assert "no window" not in out  # files were asked for


def test_a_similarity_that_nothing_reaches_gives_no_matches(sequence, run):
    status, out, err = run(sequence, "--top_k", 50, "--min_similarity", 1, "--output", "out")
    assert status == 0, err
    assert "in total: 2 pairs, 0 matches\n" in out


@pytest.mark.parametrize(("lines", "drawn"), [("7", 7), ("0", 0), ("all", None)])
def test_as_many_lines_are_drawn_as_asked_for(sequence, run, monkeypatch, lines, drawn):
    counts = []

    def draw(*args, lines):
        counts.append(lines)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(match, "draw_matches", draw)
    status, _, err = run(sequence, "--top_k", 50, "--lines", lines, "--output", "out")
    assert (status, counts) == (0, [drawn, drawn]), err


@pytest.mark.parametrize(
    "option",
    ["--min_similarity=nan", "--min_similarity=5", "--lines=-1", "--lines=few", "--max_size=0"],
)
def test_numbers_out_of_range_are_refused(sequence, run, option):
    status, out, err = run(sequence, option)
    name, _, value = option.partition("=")
    assert (status, out) == (2, "") and f"{name}: {value} is no" in err


def test_pictures_of_an_older_run_do_not_stay(sequence, run, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("pair_0007.jpg", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    status, _, err = run(sequence, "--top_k", 50, "--output", "out")
    assert status == 0, err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["motion.webp", "notes.txt", "pair_0001.jpg", "pair_0002.jpg"]


def test_images_are_not_taken_for_pictures_of_an_older_run(sequence, run, refused, tmp_path):
    names = ("pair_0001.jpg", "pair_0002.jpg")
    for name in names:
        (tmp_path / name).write_bytes((sequence / "0.png").read_bytes())
    for images in ([tmp_path], [tmp_path / name for name in names]):
        words = refused(*images, "--output", tmp_path)
        assert "would be removed as an older run's" in words and "another --output" in words
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names]
    images = [sequence / "0.png", sequence / "1.png"]
    status, _, err = run(*images, "--top_k", 50, "--output", tmp_path)
    assert status == 0, err  # nothing of what is removed is read


def test_large_images_are_reduced(sequence, run, tmp_path):
    status, _, err = run(sequence, "--top_k", 50, "--max_size", 80, "--output", "out")
    assert status == 0, err
    # 80x64 pixels each, enlarged until the text fits.
    height, width = cv2.imread(str(tmp_path / "out" / "pair_0001.jpg")).shape[:2]
    assert width == 640 and abs(height - 28 - 64 * 640 / (2 * 80 + 6)) < 2


def test_bad_input_is_refused_in_one_sentence(sequence, refused, tmp_path):
    assert "gone" in refused(tmp_path / "gone")
    assert "no image in" in refused(tmp_path)
    assert "unknown model 'aliked'" in refused(sequence, "--model", "aliked")
    assert "unknown backend 'caffe'" in refused(sequence, "--backend", "caffe")
    assert "--backend onnxruntime" in refused(sequence, "--model_path", "model.onnx")
    assert "--model_path" in refused(sequence, "--backend", "onnxruntime")
    own = refused(sequence, "--backend", "onnxruntime", "--precision", "fp16")
    assert "runs a file, whose precision is its own" in own
    only = refused(sequence, "--backend", "pytorch-amp", "--precision", "fp32")
    assert "has fp16 only" in only
    here = refused(sequence, "--backend", "onnxruntime-cpu", "--device", "cuda")
    assert "runs on the CPU only; leave --device cuda out" in here
    assert not list(tmp_path.iterdir())  # no output folder either


def test_bad_input_of_the_script_is_one_sentence_and_status_2(tmp_path):
    result = demo(tmp_path / "gone", cwd=tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1


def test_a_backend_with_one_precision_runs_in_it(sequence, run):
    for options in ([], ["--precision", "fp16"]):
        arguments = ["--backend", "pytorch-amp", *options, "--top_k", 50, "--device", "cpu"]
        status, out, err = run(sequence, *arguments, "--output", "out")
        assert status == 0, err
        assert "0.png - 1.png: 50 and 50 keypoints" in out


def test_one_image_is_not_a_pair(sequence, refused, tmp_path):
    (tmp_path / "0.png").write_bytes((sequence / "0.png").read_bytes())
    assert "has one image" in refused(tmp_path)


def test_two_images_take_the_place_of_a_folder(sequence, run, refused):
    first, second = sequence / "2.png", sequence / "0.png"
    status, out, err = run(first, second, "--top_k", 50, "--device", "cpu", "--output", "out")
    assert status == 0, err
    assert "2.png - 0.png: 50 and 50 keypoints" in out and "in total: 1 pair, " in out
    assert "is one image; give another one as well" in refused(first)
    assert "is a video or a camera; leave" in refused(0, first, "--frames", 1)
    assert "is a folder; give it alone" in refused(sequence, first)
    status, _, err = run(first, sequence / "gone.png", "--output", "out")
    assert status == 2 and "only one of these images can be read; give two" in err


def test_an_output_folder_that_cannot_be_made_is_refused_first(
    sequence, run, tmp_path, monkeypatch
):
    """Before the model is loaded, which takes seconds."""

    def load(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(match, "create_extractor", load)
    (tmp_path / "file").touch()
    status, out, err = run(sequence, "--output", tmp_path / "file" / "out")
    assert (status, out) == (2, "") and "cannot write into" in err


def test_a_truncated_image_is_named_and_passed_over(sequence, run, tmp_path):
    for path in sequence.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.jpg").write_bytes(cv2.imencode(".jpg", data.coffee())[1].tobytes()[:5000])
    (tmp_path / "2.png").unlink()
    status, out, err = run(tmp_path, "--top_k", 50, "--output", tmp_path / "out")
    assert status == 0 and "in total: 1 pair, " in out
    assert "2.jpg is truncated" in err and "1 of 3 images skipped" in err
    (tmp_path / "1.png").write_bytes(b"")
    status, _, err = run(tmp_path, "--top_k", 50, "--output", tmp_path / "out")
    assert status == 2 and "has one readable image" in err
    (tmp_path / "0.png").write_bytes(b"")
    status, _, err = run(tmp_path, "--top_k", 50, "--output", tmp_path / "out")
    assert status == 2 and "no image could be read, of 3" in err


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
