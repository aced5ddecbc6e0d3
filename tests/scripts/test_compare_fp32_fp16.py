"""What is lost between two runtimes: the numbers, the pictures, and the script as users run it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from skimage import data

import compare_fp32_fp16
from aliked import cli
from aliked.backends import Spec
from aliked.backends.tensorrt_library import Library
from aliked.comparison import (
    Numbers,
    compare_image,
    draw_histogram,
    match_change,
    report_text,
    write_histogram,
)
from aliked.drawing import draw_differences
from aliked.errors import InputError
from aliked.export.builder import BuildOptions
from aliked.export.engine import Request, convert
from aliked.features import Features
from aliked.files import sha256
from aliked.matching import MutualMatcher
from aliked.parity import compare_features, pair_features
from aliked.sides import Side, open_side
from tests.helpers.fake_tensorrt import VERSIONS
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.small_models import write_small_model

RED, BLUE, GREEN = 0, 2, 1  # the strongest channel of missed, extra and common keypoints


def features(*rows: tuple[float, float, float], dim: int = 4) -> Features:
    """Keypoints (x, y, score), 10 px or more apart, each with a descriptor of its own."""
    values = np.array(rows, np.float32).reshape(-1, 3)
    descriptors = np.zeros((len(values), dim), np.float32)
    descriptors[np.arange(len(values)), np.arange(len(values))] = 1
    return Features(values[:, :2], values[:, 2], descriptors)


def compare(reference: Features, other: Features, name: str = "photo"):
    return compare_image(name, reference, other, radius=0.5)


def moved(found: Features, pixels: float) -> Features:
    return replace(found, keypoints=found.keypoints + np.float32([pixels, 0]))


def rows(found: Features, kept: list[int]) -> Features:
    return Features(found.keypoints[kept], found.scores[kept], found.descriptors[kept])


def summary_of(*images, matches=()) -> dict:
    numbers = Numbers()
    for image in images:
        numbers.add_image(image)
    for change in matches:
        numbers.add_matches(change)
    return numbers.summary()


THREE = features((10.3, 10.3, 0.9), (30.3, 10.3, 0.5), (50.3, 10.3, 0.7))


def test_keypoints_are_paired_with_the_mutually_closest():
    """Two keypoints claim the same one: the closer gets it, the other has no partner."""
    reference = features((10, 10, 1), (10.4, 10, 1), (50, 10, 1))
    pairs = pair_features(reference, features((50.1, 10, 1), (10.1, 10, 1)), 0.5)
    assert pairs.reference.tolist() == [0, 2]
    assert pairs.other.tolist() == [1, 0]
    assert pairs.shift == pytest.approx([0.1, 0.1], abs=1e-5)  # float32 coordinates


def test_missed_and_extra_keypoints_are_ranked_by_score():
    image = compare(THREE, rows(THREE, [1, 0]))  # without the second best
    assert image.reference.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert (image.missed.tolist(), image.extra.tolist()) == ([1], [])
    image = compare(rows(THREE, [1, 0]), THREE)
    assert (image.missed.tolist(), image.extra.tolist()) == ([], [1])
    assert summary_of(compare(THREE, rows(THREE, [1, 0])))["total"]["missed_rank"] == 2


def test_another_order_is_no_difference():
    pairs = compare(THREE, rows(THREE, [2, 0, 1])).pairs
    assert pairs.shift.tolist() == pairs.score_difference.tolist() == [0, 0, 0]
    assert pairs.dot.tolist() == [1, 1, 1]


def test_differences_are_those_of_the_pairs():
    """One keypoint moves by 0.3 px, another scores 0.1 less, the third has a turned descriptor."""
    other = Features(THREE.keypoints.copy(), THREE.scores.copy(), THREE.descriptors.copy())
    other.keypoints[0, 0] += 0.3
    other.scores[1] -= 0.1
    other.descriptors[2] = [0, 0, 0.8, 0.6]
    total = summary_of(compare(THREE, other))["total"]
    assert (total["both"], total["missed"], total["extra"]) == (3, 0, 0)
    near = pytest.approx
    assert total["shift_px"] == {
        "median": 0,
        "p90": near(0.24),
        "p99": near(0.294),
        "max": near(0.3),
    }
    assert total["score_difference"]["max"] == near(0.1)
    assert total["dot_product"]["mean"] == near((1 + 1 + 0.8) / 3)
    assert total["dot_product"]["min"] == near(0.8)
    # |0.8 - 1| + 0.6 over the 12 elements of three descriptors
    assert total["element_difference"] == {"mean": near(0.8 / 12), "max": near(0.6)}


def test_pairs_on_two_sides_of_a_pixel_edge_are_counted():
    first = features((10.01, 10.5, 0.9), (30.5, 10.5, 0.5))
    total = summary_of(compare(first, moved(first, -0.02)))["total"]
    assert total["at_pixel_edge"] == 1


def test_both_stages_mean_the_same_by_a_pixel_edge():
    """Within rounding of a whole coordinate, or in different pixels: stage 3 and 4 agree."""
    first = features((10.0004, 10.5, 0.9), (30.0, 10.5, 0.5), (50.01, 10.5, 0.7), (70.3, 10.5, 0.8))
    other = moved(first, -0.0002)
    other.keypoints[2, 0] -= 0.02
    parity, total = compare_features(first, other), summary_of(compare(first, other))["total"]
    assert parity.at_edge == total["at_pixel_edge"] == 3
    assert parity.common == total["both"] == 4


def test_matches_are_kept_lost_and_gained_by_their_keypoints():
    """Three keypoints in both images; the other runtime misses one and mistakes one for a fourth.

    With the reference keypoint i matches keypoint i. The other lacks the first in the second image,
    and there its third descriptor looks like another keypoint.
    """
    first, second = compare(THREE, rows(THREE, [2, 1, 0])), THREE
    fourth = Features(
        np.vstack([second.keypoints, [[70.3, 10.3]]]).astype(np.float32),
        np.float32([0.9, 0.5, 0.7, 0.4]),
        np.eye(4, dtype=np.float32),
    )
    other = replace(fourth, descriptors=fourth.descriptors[[0, 1, 3, 2]])  # third and fourth swap
    second = compare(fourth, rows(other, [3, 2, 1]), "next")
    change = match_change(first, second, MutualMatcher(0.75))
    assert (change.first, change.second) == ("photo", "next")
    assert (change.reference, change.other) == (3, 2)
    assert (change.kept, change.lost, change.undetected, change.gained) == (1, 2, 1, 1)
    assert change.similarity.tolist() == [1, 1, 1]


@pytest.mark.parametrize("reference", [features(), THREE])
@pytest.mark.parametrize("other", [features(), THREE])
def test_images_without_keypoints_are_compared_too(reference, other, tmp_path):
    images = [compare(reference, other), compare(reference, other)]
    change = match_change(*images, MutualMatcher(0.75))
    numbers = summary_of(*images, matches=[change])
    expected = min(len(reference), len(other))
    assert numbers["total"]["both"] == 2 * expected
    assert (numbers["total"]["dot_product"]["mean"] is None) == (expected == 0)
    assert f"| {len(reference)} | {len(other)} | {expected} |" in report_text(
        "a title", numbers, 0.5
    )
    write_histogram(tmp_path / "h.png", draw_histogram(np.empty(0), change.similarity, "a title"))
    assert cv2.imread(str(tmp_path / "h.png")) is not None


def test_what_is_not_a_number_is_counted_and_stays_out_of_the_json():
    other = replace(THREE, descriptors=THREE.descriptors.copy())
    other.descriptors[1] = np.nan
    numbers = summary_of(compare(THREE, other))
    assert numbers["total"]["not_finite"] == 1
    assert numbers["total"]["dot_product"]["mean"] is None
    json.dumps(numbers, allow_nan=False)
    assert "NaN or infinity is in 1 keypoints" in report_text("a title", numbers, 0.5)


def test_descriptors_of_different_length_are_two_models():
    with pytest.raises(InputError, match="4 and 5 values"):
        compare(THREE, features((10, 10, 1), dim=5))


def test_the_picture_marks_each_kind_of_keypoint_in_its_colour():
    image = np.full((480, 640, 3), 100, np.uint8)
    spots = np.array([[100, 100]]), np.array([[300, 100]]), np.array([[100, 300]])
    picture = draw_differences(image, *spots, "a caption")
    assert picture.shape[0] > 480  # legend and caption
    for ((x, y),), channel in zip(spots, (GREEN, RED, BLUE), strict=True):
        around = picture[y - 10 : y + 11, x - 10 : x + 11].reshape(-1, 3).astype(int)
        strongest = around[np.ptp(around, axis=1).argmax()]
        assert np.ptp(strongest) > 60 and strongest.argmax() == channel
    elsewhere = picture[200:280, 200:400]
    assert (elsewhere == elsewhere[0, 0]).all()


def test_keypoints_that_lie_nowhere_do_not_stop_the_picture():
    """As a runtime returns them that overflowed in half precision."""
    image, none = np.full((480, 640, 3), 100, np.uint8), np.empty((0, 2), np.float32)
    astray = np.array([[np.nan, 5], [np.inf, 5], [1e30, 5], [-1e30, 5]], np.float32)
    picture = draw_differences(image, none, none, astray, "")[:480]
    assert (picture == picture[0, 0]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three 64x48 views of a photograph, each moved against the one before."""
    folder = tmp_path_factory.mktemp("views")
    for i in range(3):
        view = data.astronaut()[100 + 4 * i : 148 + 4 * i, 200 + 6 * i : 264 + 6 * i, ::-1]
        cv2.imwrite(str(folder / f"{i}.png"), view)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A small model in both precisions; 20 keypoints."""
    folder = tmp_path_factory.mktemp("models")
    return {
        precision: write_small_model(folder / f"{precision}.onnx", half=precision == "fp16")
        for precision in ("fp32", "fp16")
    }


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script: exit status, and what it printed to stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["compare_fp32_fp16.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.run(compare_fp32_fp16.main, compare_fp32_fp16.parser())
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def results(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


def test_two_files_are_compared_on_a_folder(run, folder, models, tmp_path):
    status, out, err = run(
        folder, "--reference_model_path", models["fp32"], "--other_model_path", models["fp16"],
        "--top_k", 20, "--device", "cpu", "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "comparison.json", "comparison.md", "dot_products.png",
        "keypoints_0001.png", "keypoints_0002.png", "keypoints_0003.png",
    ]  # fmt: skip
    assert (tmp_path / "out" / "comparison.md").read_text() in out
    assert out.startswith("# aliked-t16: onnxruntime-cpu fp16 (fp16.onnx) against onnxruntime-cpu")
    found = results(tmp_path / "out")
    assert found["other"]["made_from"]["sha256"] == sha256(models["fp16"])
    assert [image["image"] for image in found["images"]] == ["0.png", "1.png", "2.png"]
    assert [pair["first"] for pair in found["consecutive"]] == ["0.png", "1.png"]
    total = found["total"]
    assert total["reference"] == total["other"] == 60
    assert total["both"] + total["missed"] == total["both"] + total["extra"] == 60
    assert 0 < total["score_difference"]["max"] < 1e-3  # half precision has 11 bits
    assert "dot product is the line that matters" in out


def test_a_file_against_itself_has_no_differences(run, folder, models, tmp_path):
    path = models["fp32"]
    status, _, err = run(
        folder, "--reference_model_path", path, "--other_model_path", path, "--top_k", 20,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    total = results(tmp_path / "out")["total"]
    assert (total["both"], total["missed"], total["extra"]) == (60, 0, 0)
    assert total["shift_px"]["max"] == total["score_difference"]["max"] == 0
    assert total["matches"]["lost"] == total["matches"]["gained"] == 0 < total["matches"]["kept"]


def test_one_image_has_no_matching_to_compare(run, folder, models, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((folder / "0.png").read_bytes())
    status, out, err = run(
        tmp_path / "one", "--reference_model_path", models["fp32"], "--other_model_path",
        models["fp16"], "--top_k", 20,
    )  # fmt: skip
    assert status == 0, err
    assert "There is only one image" in out
    (output,) = (tmp_path / "output").iterdir()  # the default
    assert output.name.startswith("compare-")
    assert results(output)["consecutive"] == []


def test_by_default_half_precision_pytorch_is_compared_with_float32(run, tmp_path):
    for i in range(2):
        view = data.astronaut()[100 + 5 * i : 292 + 5 * i, 150 + 12 * i : 406 + 12 * i, ::-1]
        cv2.imwrite(str(tmp_path / f"{i}.png"), view)
    status, out, err = run(tmp_path, "--top_k", 200, "--device", "cpu", "--output", "out")
    assert status == 0, err
    assert out.startswith("# aliked-t16-homography: pytorch-cpu fp16 against pytorch-cpu fp32")
    total = results(tmp_path / "out")["total"]
    # The limits that half precision is held to: 98.5 % of keypoints, mean cosine 0.9995.
    assert total["both"] >= 0.985 * total["reference"] > 0
    assert total["dot_product"]["mean"] >= 0.9995
    assert total["element_difference"]["mean"] > 0  # it is another precision


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_is_compared_with_its_file(run, folder, models, tmp_path, monkeypatch, version):
    """Over the stand-in, whose engine is the ONNX file in ONNX Runtime: nothing differs."""
    install(monkeypatch, version)
    engine = tmp_path / "model.trt"
    assert convert(Request(models["fp16"], engine, BuildOptions(), verify=False))
    status, out, err = run(
        folder, "--reference_model_path", models["fp16"], "--other_model_path", engine,
        "--top_k", 20, "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert "tensorrt fp16 (model.trt) against onnxruntime-cpu fp16 (fp16.onnx)" in out
    total = results(tmp_path / "out")["total"]
    assert (total["both"], total["missed"], total["extra"]) == (60, 0, 0)
    assert total["element_difference"]["max"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--other onnxruntime", "give it with --other_model_path FILE.onnx"),
        ("--other caffe", "unknown backend 'caffe'"),
        ("--other pytorch:int8", "unknown precision 'int8'"),
        ("--other pytorch --other_model_path fp16.onnx", "pytorch does not run fp16.onnx"),
        ("--other_model_path gone.onnx", "gone.onnx does not exist"),
        ("--other_model_path notes.txt", "say which one runs it: --other BACKEND"),
        ("--other onnxruntime --other_model_path notes.txt", "notes.txt is not an ONNX file"),
        ("--other_model_path notes.trt", "notes.trt.json is missing"),
        ("--other onnxruntime:fp32 --other_model_path fp16.onnx", "fp16.onnx is fp16 and"),
        ("--other aotinductor --other_model_path notes.txt", "say its precision; give it: --other"),
        ("--model aliked-n16 --other_model_path fp16.onnx", "compare two runtimes of the same"),
        ("--model aliked", "unknown model 'aliked'"),
        ("--top_k 0", "pass --scores_th"),
        ("--top_k 0 --scores_th 0.2 --other_model_path fp16.onnx", "in another way; pass --top_k"),
        ("--other tensorrt", "cannot run here: there is no GPU"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    run, folder, models, tmp_path, monkeypatch, options, says
):
    monkeypatch.setattr(Library, "unavailable", lambda library: "there is no GPU")
    (tmp_path / "fp16.onnx").write_bytes(models["fp16"].read_bytes())
    for name in ("notes.txt", "notes.trt"):
        (tmp_path / name).write_text("no model")
    before = sorted(tmp_path.iterdir())
    reference = ["--reference_model_path", models["fp32"]] if "--model" not in options else []
    selection = [] if "--top_k" in options else ["--top_k", 20]
    status, out, err = run(folder, *reference, *selection, *options.split())
    assert (status, out) == (2, "")
    (sentence,) = err.splitlines()
    assert says in sentence
    assert sorted(tmp_path.iterdir()) == before  # no output folder either


@pytest.mark.parametrize("radius", ["0", "-1", "nan", "inf", "wide"])
def test_a_radius_that_pairs_nothing_is_refused(run, folder, tmp_path, radius):
    status, _, err = run(folder, f"--radius={radius}")
    assert status == 2 and f"--radius: {radius} is no number above 0" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("similarity", ["nan", "5", "-1.1"])
def test_a_similarity_that_is_no_cosine_is_refused(run, folder, similarity):
    status, _, err = run(folder, f"--min_similarity={similarity}")
    assert status == 2 and f"--min_similarity: {similarity} is no number from -1 to 1" in err


def test_pictures_of_an_older_run_do_not_stay(run, folder, models, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("keypoints_0009.png", "comparison.md", "notes.txt"):
        (tmp_path / "out" / name).write_text("old")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").write_bytes((folder / "0.png").read_bytes())
    path = models["fp32"]
    status, _, err = run(
        tmp_path / "one", "--reference_model_path", path, "--other_model_path", path,
        "--top_k", 20, "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json", "comparison.md", "dot_products.png", "keypoints_0001.png", "notes.txt",
    ]  # fmt: skip


def test_images_are_not_taken_for_pictures_of_an_older_run(run, folder, models, tmp_path):
    image = tmp_path / "keypoints_0001.png"
    image.write_bytes((folder / "0.png").read_bytes())
    status, _, err = run(tmp_path, "--top_k", 20, "--output", tmp_path)
    assert status == 2 and "give another --output" in err and image.exists()


def test_large_images_can_be_reduced(run, folder, models, tmp_path):
    status, _, err = run(
        folder, "--reference", "pytorch", "--top_k", 20, "--max_size", 32, "--device", "cpu",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    assert results(tmp_path / "out")["max_size"] == 32


def test_two_different_models_are_refused(run, folder, models, tmp_path):
    other = tmp_path / "other.onnx"
    proto = onnx.load(models["fp32"])
    onnx.helper.set_model_props(proto, {"aliked.model": '"aliked-n16"'})
    onnx.save(proto, other)
    status, _, err = run(
        folder, "--reference_model_path", models["fp32"], "--other_model_path", other
    )
    assert status == 2
    assert "fp32.onnx is aliked-t16 and" in err and "other.onnx is aliked-n16" in err


def test_a_file_with_another_threshold_is_refused(models):
    export = {"top_k": 0, "scores_th": 0.3, "n_limit": 5000}
    side = Side("other", "onnxruntime", "fp32", models["fp32"], export)
    for spec in (Spec(top_k=20), Spec(top_k=0, scores_th=0.2)):
        with pytest.raises(InputError, match=r"pass --top_k 0 --scores_th 0\.3 --n_limit 5000"):
            open_side(side, spec)


def test_folders_without_images_are_refused(run, tmp_path):
    for folder, says in ((tmp_path, "no image in"), (tmp_path / "gone", "cannot list")):
        status, _, err = run(folder)
        assert status == 2 and says in err


def test_a_damaged_image_is_named_and_passed_over(run, folder, models, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes((folder / "0.png").read_bytes())
    (images / "1.png").write_bytes((folder / "1.png").read_bytes()[:500])
    path = models["fp32"]
    status, _, err = run(
        images, "--reference_model_path", path, "--other_model_path", path, "--top_k", 20,
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert status == 0 and "1.png is truncated" in err and "1 of 2 images skipped" in err
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [image["image"] for image in numbers["images"]] == ["0.png"]
