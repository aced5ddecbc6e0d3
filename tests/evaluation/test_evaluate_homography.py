"""`evaluate.py homography` as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from aliked.errors import InputError
from aliked.files import only_writer
from tests.helpers.planes import write_scene

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Two scenes of textures that are moved by whole pixels, and one without any texture."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scene(folder / "v_one", [(3, 4), (9, -7)])
    write_scene(folder / "i_two", [(0, 0)], seed=1)
    return folder


def script(*arguments, cwd: Path = ROOT):
    """Run the script; its result."""
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def tables(folder: Path) -> str:
    """What the run printed into files."""
    return (folder / "evaluation.md").read_text()


@pytest.fixture(scope="module")
def finished(scenes, weights_dir, tmp_path_factory):
    """A run over a model and a baseline: its folder, its options and its output."""
    folder = tmp_path_factory.mktemp("run")
    systems = ["--systems", "pytorch:fp32", "sift", "--models", "aliked-t16", "--device", "cpu"]
    options = ["homography", scenes, *systems, "--weights", weights_dir, "--top_k", 200]
    options += ["--features", folder / "features"]
    result = script(*options, "--output", folder / "records.jsonl")
    assert result.returncode == 0, result.stderr
    return folder, options, result.stdout


def records_of(folder: Path) -> list[dict]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def run(*arguments) -> None:
    """The script's `main`, in this process."""
    evaluate.main(evaluate.parser().parse_args(list(map(str, arguments))))


def test_moved_textures_are_found_again(finished):
    """Whole-pixel shifts of the same texture: nearly every match is right, by any system."""
    folder, _, _ = finished
    for record in records_of(folder):
        assert [pair["name"] for pair in record["pairs"]] == ["i_two 1-2", "v_one 1-2", "v_one 1-3"]
        for pair in record["pairs"]:
            assert pair["correct"][2] > 0.9 * pair["matches"] > 50
            assert pair["corner_error"]["opencv"] < 0.5


def test_a_record_can_be_traced(finished):
    folder, _, _ = finished
    model, baseline = records_of(folder)
    assert len(model["weights_sha256"]) == 64 and baseline["weights_sha256"] is None
    assert model["configuration"]["versions"]["torch"] and model["configuration"]["machine"]["cpu"]
    assert "evaluate.py homography" in model["command"]


def test_the_tables_the_plot_and_the_worst_pairs_are_files(finished):
    folder, _, output = finished
    assert "| aliked-t16 | pytorch (CPU) | fp32 |" in output and "| SIFT | OpenCV |" in output
    written = folder / "records"
    assert tables(written) in output
    page = (written / "worst.html").read_text()
    pictures = sorted((written / "worst").glob("*.jpg"))
    assert len(pictures) == 2 * 3 and all(f"worst/{path.name}" in page for path in pictures)


def test_the_same_run_gives_the_same_tables_without_extracting_anything(finished, tmp_path):
    folder, options, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.h5")}
    run(*options, "--output", tmp_path / "again.jsonl")
    assert tables(tmp_path / "again") == tables(folder / "records")
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "features").rglob("*.h5")}


def test_a_run_goes_on_with_the_systems_that_are_missing(finished, tmp_path):
    folder, options, _ = finished
    first, second = (folder / "records.jsonl").read_text().splitlines()
    output = tmp_path / "records.jsonl"
    output.write_text(first + "\n" + second[:100])
    run(*options, "--output", output, "--resume")
    lines = output.read_text().splitlines()
    assert lines[0] == first
    assert json.loads(lines[1])["pairs"] == json.loads(second)["pairs"]
    assert tables(tmp_path / "records") == tables(folder / "records")


def test_records_of_another_run_are_not_mixed_in(finished, tmp_path):
    folder, options, _ = finished
    output = tmp_path / "records.jsonl"
    output.write_text((folder / "records.jsonl").read_text())
    with pytest.raises(InputError, match=r"line 1 of .* another parameters"):
        run(*options, "--output", output, "--resume", "--seed", 1)
    assert output.read_text() == (folder / "records.jsonl").read_text()


def test_two_runs_do_not_write_to_one_file(finished, tmp_path):
    _, options, _ = finished
    output = tmp_path / "records.jsonl"
    with only_writer(output), pytest.raises(InputError, match="another run is writing"):
        run(*options, "--output", output)
    assert not output.exists()


def test_records_are_not_overwritten(finished):
    folder, options, _ = finished
    with pytest.raises(InputError, match="pass --resume"):
        run(*options, "--output", folder / "records.jsonl")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_folder"], "there is no folder no_such_folder"),
        (["assets", "--systems", "abacus"], "unknown system 'abacus'"),
        (["assets", "--models", "aliked-x"], "unknown model 'aliked-x'"),
        (["assets", "--top_k", "0"], "pass --scores_th as well"),
        (["assets", "--output", "table.md"], "not the name of a .jsonl file"),
        (
            ["assets", "--setting", "1024", "--top_k", "300"],
            "--setting 1024 decides --top_k itself",
        ),
        (["assets", "--setting", "1024", "--top_k", "1000"], "decides --top_k itself"),
        (["assets", "--setting", "1024", "--short_side", "200"], "decides --short_side itself"),
        (["assets", "--setting", "5000", "--scores_th", "0.2"], "decides --scores_th itself"),
        (["assets", "--setting", "5000", "--n_limit", "5000"], "decides --n_limit itself"),
        (["assets", "--n_limit", "20"], "--n_limit selects keypoints by score, and --top_k 1000"),
        (["assets", "--top_k", "9", "--scores_th", "0.2"], "--scores_th selects keypoints by"),
    ],
)
def test_bad_input_is_refused(arguments, sentence, scenes, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [str(scenes) if word == "assets" else word for word in arguments]
    usual = ["--systems", "sift"] if "--systems" not in arguments else []
    with pytest.raises(InputError, match=sentence):
        run("homography", *arguments, *usual)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--short_side", "2"], "give at least 32"),
        (["--seed", str(2**63)], "--seed: 9223372036854775808 is no whole number"),
        (["--seed", "-1"], "--seed: -1 is no whole number"),
        (["--worst", "-1"], "--worst: -1 is no whole number"),
        (["--scores_th", "nan"], "--scores_th: nan is no number from 0 to 1"),
        (["--scores_th", "7"], "--scores_th: 7 is no number from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        run("homography", "assets", *arguments)


@pytest.mark.parametrize("damage", ["{", '{"schema": 1}', "[]", '{"task": "homography"}'])
def test_a_damaged_file_of_records_is_named_and_left_as_it_was(finished, tmp_path, damage):
    folder, options, _ = finished
    first, second = (folder / "records.jsonl").read_text().splitlines()
    output = tmp_path / "records.jsonl"
    text = f"{first}\n{damage}\n{second}\n"
    output.write_text(text)
    with pytest.raises(InputError, match=r"line 2 of .*records\.jsonl"):
        run(*options, "--output", output, "--resume")
    assert output.read_text() == text


def test_pictures_of_an_older_run_do_not_stay(finished, tmp_path):
    folder, options, _ = finished
    output = tmp_path / "records.jsonl"
    output.write_text((folder / "records.jsonl").read_text())
    run(*options, "--output", output, "--resume", "--worst", 2)
    assert len(list((tmp_path / "records" / "worst").glob("*.jpg"))) == 2 * 2
    run(*options, "--output", output, "--resume", "--worst", 1)
    assert len(list((tmp_path / "records" / "worst").glob("*.jpg"))) == 2 * 1
    run(*options, "--output", output, "--resume", "--worst", 0)
    assert not (tmp_path / "records" / "worst").exists()
    assert not (tmp_path / "records" / "worst.html").exists()


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    result = script("homography", "no_such_folder", cwd=tmp_path)
    assert result.returncode == 2
    assert "no_such_folder" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_the_settings_of_the_field_choose_keypoints_and_size(scenes, tmp_path):
    """Images of 160x120, resized to a short side of 480."""
    files = ["--output", tmp_path / "r.jsonl", "--features", tmp_path / "features"]
    run("homography", scenes, "--setting", 1024, "--systems", "sift", "--worst", 0, *files)
    record = json.loads((tmp_path / "r.jsonl").read_text())
    assert record["dataset"]["sizes"] == {"640x480": 5}
    assert record["system"]["top_k"] == 1024
    # Moved by (3, 4) px before, (12, 16) after: right only if the homography was resized as well.
    assert record["pairs"][1]["corner_error"]["opencv"] < 2
