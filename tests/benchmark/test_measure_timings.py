"""The timing script as users run it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

import demo_pair
import measure_timings
from aliked.errors import InputError
from benchmark.records import load_records
from benchmark.rows import load_image_sets
from tests.helpers.small_models import write_small_model

LIGHTGLUE = ["--matcher", "lightglue", "--model", "aliked-n16"]
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--model", "aliked-t16", "--top_k", "50", "--device", "cpu"]
QUICK += ["--repeats", "10", "--warmup", "3", "--max_seconds", "1", "--processes", "2"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Three small photographs."""
    folder = tmp_path_factory.mktemp("images") / "photographs"
    folder.mkdir()
    for path in sorted((ROOT / "assets" / "sequence_640x480").glob("*.jpg"))[:3]:
        cv2.imwrite(str(folder / f"{path.stem}.png"), cv2.imread(str(path))[200:264, 200:296])
    return folder


def script(*arguments, weights: Path | None = None, cache: Path | None = None):
    """Run the script; its result."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if weights:
        environment |= {"ALIKED_WEIGHTS_DIR": str(weights), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "measure_timings.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(photographs, weights_dir, tmp_path_factory):
    """A run of two rows that can run here and one that cannot: its output and its records."""
    folder = tmp_path_factory.mktemp("timings")
    backends = ["--backends", "pytorch", "onnxruntime", "tensorrt"]
    output = ["--output", folder / "timings.jsonl"]
    result = script(photographs, *QUICK, *backends, *output, weights=weights_dir, cache=folder)
    assert result.returncode == 0, result.stderr
    lines = (folder / "timings.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return result.stdout, {record.get("row", record)["backend"]: record for record in records}


def test_it_says_that_it_times_on_the_cpu(finished):
    output, _ = finished
    assert "timing on the CPU" in output


def test_both_runtimes_have_times_and_agree_with_the_reference(finished):
    _, records = finished
    for backend in ("pytorch", "onnxruntime"):
        record = records[backend]
        assert record["status"] == "ok"
        for clock in (record["compute_ms"], record["end_to_end_ms"]):
            assert (clock["runs"], len(clock["process_medians"])) == (2 * 10, 2)
        assert record["parity"]["passed"], record["parity"]["reasons"]
        assert [entry["image"] for entry in record["per_image"]] == [
            "000000.png",
            "000001.png",
            "000002.png",
        ]


def test_a_record_can_be_traced(finished):
    _, records = finished
    record = records["onnxruntime"]
    assert len(record["model_file"]["sha256"]) == len(record["weights_sha256"]) == 64
    configuration = record["configuration"]
    assert configuration["machine"]["cpu"] and configuration["versions"]["onnxruntime"]
    assert "measure_timings.py" in record["command"]
    assert record["build_s"] > 0 and record["first_run_s"] > 0


def test_a_backend_that_cannot_run_is_a_row_that_says_why(finished):
    output, records = finished
    assert records["tensorrt"]["status"] == "unavailable"
    assert records["tensorrt"]["reason"] in output


def test_the_table_and_the_files_are_named(finished):
    output, _ = finished
    assert "\naliked-t16, K 50, 96x64 photographs, fp32\n" in output
    assert re.search(r"^onnxruntime \(CPU\) +[12]", output, re.MULTILINE)
    written = [line.removeprefix("wrote ") for line in output.splitlines() if "wrote" in line]
    assert any(path.endswith("tables.md") for path in written)
    assert all((ROOT / path).exists() for path in written)


def test_an_interrupted_run_goes_on_where_it_was(finished, photographs, weights_dir, tmp_path):
    _, records = finished
    output = tmp_path / "timings.jsonl"
    kept = json.dumps(records["onnxruntime"])
    output.write_text(kept + "\n" + json.dumps(records["pytorch"])[:100])
    arguments = ["--backends", "pytorch", "onnxruntime", "tensorrt", "--output", output, "--resume"]
    result = script(photographs, *QUICK, *arguments, weights=weights_dir, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = output.read_text().splitlines()
    assert lines[0] == kept  # not measured again
    backends = {json.loads(line).get("row", json.loads(line))["backend"] for line in lines[1:]}
    assert backends == {"pytorch", "tensorrt"}


def test_a_file_of_another_model_is_caught(photographs, weights_dir, tmp_path):
    """A row broken on purpose: something else under the name of a model."""
    model = write_small_model(tmp_path / "wrong.onnx", height=64, width=96, top_k=50)
    output = tmp_path / "timings.jsonl"
    arguments = ["--backends", "onnxruntime", "--model_path", model, "--output", output]
    result = script(photographs, *QUICK, *arguments, weights=weights_dir, cache=tmp_path)
    assert result.returncode == 1, result.stderr
    (record,) = map(json.loads, output.read_text().splitlines())
    assert record["status"] == "failed"
    assert "another model: descriptors have 64 and 3 values" in record["reason"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is nothing to run on"),
        (["assets/sequence_640x480", "--backends", "abacus"], "unknown backend 'abacus'"),
        (["assets/sequence_640x480", "--models", "aliked-x"], "unknown model 'aliked-x'"),
        (["assets/sequence_640x480", "--top_k", "0"], "pass --scores_th as well"),
        (["assets/sequence_640x480", "--batch", "0"], "--batch: 0 .* give at least 1"),
        (["assets/sequence_640x480", "--repeats", "0"], "--repeats: 0 .* give at least 2"),
        (["assets/sequence_640x480", "--processes", "0"], "--processes: 0 .* give at least 1"),
        (["assets/sequence_640x480", "--output", "table.md"], "not the name of a .jsonl file"),
        (["assets/sequence_640x480", "--backend", "pytorch", "--model_path", "a.onnx"], "a.onnx"),
        (["assets/sequence_640x480", "--max_seconds", "nan"], "nan is no number above 0"),
        (["assets/sequence_640x480", "--max_seconds", "inf"], "inf is no number above 0"),
        (["assets/sequence_640x480", "--scores_th", "7"], "7 is no number from 0 to 1"),
        (["assets/sequence_640x480", "--scores_th", "nan"], "nan is no number from 0 to 1"),
        (["assets/sequence_640x480", "--min_similarity", "5"], "5 is no number from -1 to 1"),
        (["assets/sequence_640x480", "--seed", "-1"], "-1 is no whole number"),
        (["assets/sequence_640x480", "--seed", str(2**63)], "is no whole number"),
        (["assets/sequence_640x480", "--scores_th", "0.2"], "--scores_th .* --top_k 1000 keeps"),
        (["assets/sequence_640x480", "--n_limit", "20"], "--n_limit .* --top_k 1000 keeps"),
        (["assets/sequence_640x480", "--compile_mode", "default"], "leave it out"),
        (["assets/sequence_640x480", "--compile_mode", "quick"], "unknown compile mode 'quick'"),
        (["assets/sequence_640x480", "--compiler_cache", "a"], "leave --compiler_cache out"),
        (
            ["assets/sequence_640x480", "--backend", "pytorch-amp", "--precision", "fp32"],
            "backend pytorch-amp has no fp32; pass --precision fp16",
        ),
        (["assets/sequence_640x480", "--model_path", "none.onnx"], "cannot read none.onnx"),
        (["assets/sequence_640x480", "--model", "aliked-t16-homography", "--weights", "no"], "no"),
        (
            ["assets/sequence_640x480/000000.jpg", "--min_similarity", "0.5"],
            "--min_similarity matches an image with the next",
        ),
        (["assets/sequence_640x480", "--matcher_weights", "a"], "pass --matcher lightglue"),
        (["assets/sequence_640x480", "--matcher", "lightglue"], "64 long"),
        (["assets/sequence_640x480/000000.jpg", *LIGHTGLUE], "give two of each size"),
        (["assets/sequence_640x480", *LIGHTGLUE, "--batch", "2"], "leave --batch out"),
        (["assets/sequence_640x480", *LIGHTGLUE, "--min_similarity", "0"], "leave --min_sim"),
        (["assets/sequence_640x480", *LIGHTGLUE, "--model_path", "a.onnx"], "leave --model_path"),
        (
            ["assets/sequence_640x480", *LIGHTGLUE, "--top_k", "0", "--scores_th", "0.2"],
            "leave --top_k 0 out",
        ),
        (
            ["assets/sequence_640x480", *LIGHTGLUE, "--backends", "aotinductor"],
            "aotinductor does not run LightGlue",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "timings.jsonl")]
    with pytest.raises(InputError, match=sentence):
        measure_timings.main(measure_timings.parser().parse_args([*arguments, *output]))
    assert not (tmp_path / "timings.jsonl").exists()


def test_resuming_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for output in ([], ["--output", str(tmp_path / "none.jsonl")]):
        arguments = ["assets/sequence_640x480", "--resume", *output]
        with pytest.raises(InputError, match="--resume"):
            measure_timings.main(measure_timings.parser().parse_args(arguments))


def test_what_demo_pair_takes_is_taken(tmp_path):
    """Its options but those of videos, word for word, and a folder as the output."""
    words = "assets/sequence_640x480 --model aliked-t16-homography --backend pytorch --top_k 500 "
    words += "--device cpu --min_similarity 0.8 --precision fp32 --lines 50 "
    words += f"--max_size 320 --output {tmp_path}"
    demo = demo_pair.parser().parse_args(words.split())
    args = measure_timings.parser().parse_args(words.split())
    assert measure_timings.output_from(args) == (tmp_path / "timings.jsonl", tmp_path)
    otherwise = {"images", "more", "model", "backend", "top_k", "precision", "lines"}
    otherwise |= {"every", "frames"}
    for name in vars(demo).keys() - otherwise:
        assert getattr(args, name) == getattr(demo, name), name
    assert args.folders == [demo.images]
    grid = measure_timings.grid_from(args)
    found = (grid.models, grid.backends, grid.top_ks)
    assert found == ([demo.model], [demo.backend], [demo.top_k])
    assert grid.precisions == [demo.precision]


def test_images_of_several_sizes_are_rows_of_their_own(photographs, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photographs, folder)
    image = cv2.imread(str(folder / "000000.png"))
    cv2.imwrite(str(folder / "small.png"), image[:40])
    sets = load_image_sets([folder])
    assert [(s.name, s.width, s.height, len(s.paths)) for s in sets] == [
        ("mixed", 96, 64, 3),
        ("mixed", 96, 40, 1),
    ]
    options = ["--model", "aliked-t16-homography", "--backend", "pytorch", "--min_similarity", "0"]
    output = ["--output", tmp_path / "out"]
    result = script(folder, *QUICK[2:], *options, *output)
    assert result.returncode == 0, result.stderr
    records = load_records([tmp_path / "out" / "timings.jsonl"])
    assert [r.row.size for r in records] == ["96x40", "96x64"]
    assert [r.matches is None for r in records] == [True, False]
    assert records[0].configuration.images.keys() == {"mixed 96x40", "mixed 96x64"}
    assert (tmp_path / "out" / "tables.md").exists()
    assert not list((tmp_path / "out").glob(".*"))  # neither lock nor scratch file


def test_bad_input_is_one_sentence_and_status_2(tmp_path):
    result = script("no_such_folder", "--output", tmp_path / "timings.jsonl")
    assert result.returncode == 2
    assert "no_such_folder" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_records_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "timings.jsonl"
    output.write_text("kept\n")
    arguments = ["assets/sequence_640x480", "--output", str(output)]
    with pytest.raises(InputError, match="pass --resume"):
        measure_timings.main(measure_timings.parser().parse_args(arguments))
    assert output.read_text() == "kept\n"
