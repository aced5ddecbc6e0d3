"""The tools around the fused kernels: what they refuse, and which records they draw."""

import json

import cv2
import pytest

from aliked.errors import InputError
from tests.helpers.textures import texture
from tools import bench_transfer, plot_fused, sanitize_fused


def record(batch: int, **rest) -> dict:
    case = {"model": "aliked-t16", "precision": "fp16", "shape": [batch, 480, 640], "us": 5.0}
    return case | {"operator": "block1", "bytes": 100, "flops": 100} | rest


CEILING = {"operator": "ceiling", "gpu": "a GPU", "bytes_per_s": 1e12, "flops_per_s": 1e14}
RECORDS = [
    CEILING,
    *(record(batch, **rest) for batch in (1, 8) for rest in ({}, {"operator": "infer"})),
]


def plot(tmp_path, records: str, *options: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(records)
    arguments = [str(path), "--output", str(tmp_path / "plot.png"), *options]
    plot_fused.main(plot_fused.parser().parse_args(arguments))


def test_a_plot_has_the_batch_that_is_asked_for(tmp_path):
    (case,) = plot_fused.cases_of(RECORDS[1:], 8)
    assert [r["shape"][0] for r in case] == [8, 8]
    plot(tmp_path, "".join(json.dumps(r) + "\n" for r in RECORDS), "--batch", "8")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_batch_without_times_is_refused_with_those_that_have(tmp_path):
    with pytest.raises(InputError, match=r"batch 7, but of \[1, 8\]"):
        plot(tmp_path, "".join(json.dumps(r) + "\n" for r in RECORDS), "--batch", "7")


@pytest.mark.parametrize("records", ["", "no JSON", "{}", json.dumps(RECORDS[1])])
def test_other_files_are_refused(tmp_path, records):
    with pytest.raises(InputError, match="bench_fused wrote"):
        plot(tmp_path, records)
    assert not (tmp_path / "plot.png").exists()


def test_a_check_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        sanitize_fused.main(sanitize_fused.parser().parse_args(["--runs", "0"]))


def test_a_call_is_timed_step_by_step(tmp_path, weights_dir, capsys):
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), texture(64, 96))
    options = ["--backend", "pytorch", "--precision", "fp32", "--top_k", "50", "--device", "cpu"]
    options += ["--batches", "1", "2", "--runs", "2", "--weights", str(weights_dir)]
    assert bench_transfer.main(bench_transfer.parser().parse_args([str(image), *options])) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "batch", "step", "p50", "p90"]
    assert [line.split()[1] for line in lines] == ["1"] * 5 + ["2"] * 5
    steps = ["network", "upload", "download", "download, arrays", "all"]
    assert [" ".join(line.split()[2:-2]) for line in lines] == steps * 2


def test_nothing_to_time_is_refused(tmp_path):
    args = bench_transfer.parser().parse_args([str(tmp_path / "image.png"), "--batches", "1", "0"])
    with pytest.raises(InputError, match="at least 1"):
        bench_transfer.main(args)
