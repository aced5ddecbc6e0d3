"""Tables and plots of evaluations, from records."""

import copy
import dataclasses
import random

import numpy as np
import pytest
from msgspec.structs import replace

import draw_report as report
from aliked.errors import InputError
from benchmark.records import load_records
from evaluation.records import load_outcomes
from evaluation.report import frontier, report_text
from evaluation.task import Score, paired_difference
from tests.helpers import timing_records
from tests.helpers.evaluation_records import FP16, FP32, SIFT, record
from tests.helpers.timing_records import ROW, measured, write_records

ERRORS = [0.5, 0.7, 1.5, 2.0, 4.0, None]
MEAN = Score("mean", lambda pair: pair["value"])


def pairs(values) -> list[dict]:
    """Pairs with these numbers."""
    return [{"value": value} for value in values]


def test_equal_systems_differ_by_nothing():
    values = pairs(np.linspace(0, 1, 50))
    change = paired_difference(MEAN, values, values, seed=0)
    assert (change.mean, change.low, change.high) == (0, 0, 0)


def test_the_same_change_of_every_pair_is_known_exactly():
    values = np.linspace(0, 1, 50)
    change = paired_difference(MEAN, pairs(values - 0.1), pairs(values), seed=0)
    assert (change.mean, change.low, change.high) == pytest.approx((-0.1, -0.1, -0.1))


def test_the_interval_is_as_wide_as_chance_makes_it():
    """Half of 400 pairs gain 1, half lose 1: the mean varies by 1 / sqrt(400) around 0."""
    change = paired_difference(MEAN, pairs([1, -1] * 200), pairs([0] * 400), seed=0)
    # 1000 resamples: the ends of the interval are known to some 10 %.
    assert (change.low, change.high) == pytest.approx((-1.96 / 20, 1.96 / 20), rel=0.15)


def test_a_score_may_summarise_pairs_in_its_own_way():
    """A ratio of sums, as of track lengths, is not the mean of ratios."""
    ratio = Score("r", lambda pair: pair["value"], lambda v: v[:, 0].sum() / v[:, 1].sum())
    own, other = pairs([(2, 1), (9, 3)]), pairs([(2, 2), (9, 9)])
    assert ratio.value(own) == 11 / 4
    assert paired_difference(ratio, own, other, seed=0).mean == 11 / 4 - 1


@pytest.fixture
def table(tmp_path):
    """Makes the report of evaluation and timing records, which lie in files."""

    def make(evaluations: list[dict], timings: list[dict] = ()) -> str:
        write_records(tmp_path / "evaluations.jsonl", evaluations)
        write_records(tmp_path / "timings.jsonl", timings)
        results = load_records([tmp_path / "timings.jsonl"]) if timings else []
        return report_text(load_outcomes([tmp_path / "evaluations.jsonl"]), results)

    return make


def cells(text: str, number: int, *start: str) -> dict[str, str]:
    """A line of the table with this number, by the names of its columns."""
    tables = [part for part in text.split("\n\n") if part.startswith("| ")]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables[number].splitlines()
    ]
    line = next(line for line in lines[2:] if line[: len(start)] == list(start))
    return dict(zip(lines[0], line, strict=True))


def test_the_answer_has_every_measure_of_every_system(table):
    text = table([record(FP32, ERRORS), record(SIFT, ERRORS)])
    line = cells(text, 0, "aliked-t16", "pytorch (CPU)", "fp32")
    assert line["matches"] == "400" and line["MMA@3"] == "75.0"  # 300 of 400
    assert line["repeatability"] == "66.7"  # 600 of (800 + 1000) / 2
    assert line["matching score"] == "33.3"  # 300 of 900
    assert [line[f"accuracy@{t}"] for t in (1, 3, 5)] == ["33.3", "66.7", "83.3"]
    assert cells(text, 0, "SIFT", "OpenCV")["MMA@3"] == "75.0"


def test_a_pair_without_a_homography_is_a_failure(table):
    """Of the AUC too: two pairs, of which one has the error 0."""
    line = cells(table([record(FP32, [0.0, None])]), 0, "aliked-t16")
    assert (line["accuracy@5"], line["AUC@5"]) == ("50.0", "50.0")


def test_a_measure_that_nobody_took_has_no_column(table):
    assert "PoseLib" not in cells(table([record(FP32, ERRORS)]), 0, "aliked-t16")


def test_a_measure_that_one_system_lacks_is_no_zero(table):
    """As where PoseLib was installed for one of the runs only."""
    both = record(FP32, ERRORS)
    for pair in both["pairs"]:
        pair["corner_error"] = pair["corner_error"] | {"poselib": 0.0}
    text = table([both, record(FP16, ERRORS)])
    assert cells(text, 0, "aliked-t16", "pytorch (CPU)")["AUC@3 PoseLib"] == "100.0"
    assert cells(text, 0, "aliked-t16", "onnxruntime-cpu")["AUC@3 PoseLib"] == "-"
    assert cells(text, 1, "aliked-t16", "onnxruntime-cpu")["AUC@3 PoseLib"] == "-"


def test_a_pose_table_without_poselib_has_no_column_of_it(table):
    pose = {
        "keypoints": [1000, 1000], "matches": 400, "inliers": 300, "epipolar": 200, "correct": None,
        "rotation": 1.0, "direction": 2.0, "errors": {"opencv": [2.0, None]},
    }  # fmt: skip
    rows = [{"name": f"{i}", "group": "all"} | pose for i in range(4)]
    text = table([record(FP32, [], task="pose", pairs=rows)])
    line = cells(text, 0, "aliked-t16", "pytorch (CPU)")
    assert "AUC@10 PoseLib" not in line and "MMA@3" not in line
    assert 0 < float(line["AUC@10"]) < 50  # half of the repeats found no pose


def test_the_area_under_the_curve_is_the_fields(table):
    """SuperGlue's and glue-factory's of errors 0.5, 1.5 and a failure, up to 3 px, by hand.

    Straight from (0, 0) to (0.5, 1/3) to (1.5, 2/3), level to 3: 1/12 + 1/2 + 1, divided by 3.
    """
    line = cells(table([record(FP32, [0.5, 1.5, None])]), 0, "aliked-t16")
    assert line["AUC@3"] == f"{100 * (1 / 12 + 1 / 2 + 1) / 3:.1f}"


def test_times_are_those_of_the_same_system_size_and_machine(table):
    right = measured(ROW, 41.5, mib=640)
    others = [
        measured(replace(ROW, width=1241, height=376, image_set="sequence_1241x376"), 1.0),
        measured(replace(ROW, model="aliked-n16"), 2.0),
        measured(replace(ROW, top_k=2000), 3.0),
        measured(replace(ROW, precision="fp16"), 4.0),
        measured(replace(ROW, batch=8), 5.0),
    ]
    text = table([record(FP32, ERRORS), record(FP16, ERRORS)], [right, *others])
    line = cells(text, 0, "aliked-t16", "pytorch (CPU)")
    assert (line["ms at 640x480"], line["MiB"]) == ("41.5", "640")
    assert cells(text, 0, "aliked-t16", "onnxruntime-cpu")["ms at 640x480"] == "not measured"


def test_times_of_another_machine_are_not_used(table):
    machine = timing_records.CONFIGURATION["machine"] | {"cpu": "Another CPU"}
    other = measured(ROW, 41.5) | {
        "configuration": timing_records.CONFIGURATION | {"machine": machine}
    }
    line = cells(table([record(FP32, ERRORS)], [other]), 0, "aliked-t16")
    assert line["ms at 640x480"] == "not measured"


def test_changes_are_against_pytorch_fp32_of_the_same_model(table):
    better = [e and e - 0.2 for e in ERRORS]
    text = table([record(FP32, ERRORS), record(FP16, better), record(SIFT, ERRORS)])
    assert "Change against PyTorch FP32 of the same model" in text
    line = cells(text, 1, "aliked-t16", "onnxruntime-cpu", "fp16")
    assert line["MMA@3"] == "0.00 [0.00, 0.00]"
    assert line["AUC@3"].startswith("+")
    table_of_changes = text.split("\n\n")[[p[:6] for p in text.split("\n\n")].index("Change") + 1]
    assert len(table_of_changes.splitlines()) == 3  # no line for the reference, none for SIFT


def test_a_matcher_is_compared_with_mutual_and_its_precision_with_itself(table):
    glue = [dataclasses.replace(system, matcher="lightglue") for system in (FP32, FP16)]
    text = table(
        [
            record(FP32, [1.0, 1.0]),
            record(FP16, [2.0, 2.0]),
            record(glue[0], [0.0, 0.0]),
            record(glue[1], [1.0, 1.0]),
        ]
    )
    assert "(of that itself: against mutual nearest neighbours)" in text
    changes = [
        cells(text, 1, "aliked-t16", "onnxruntime-cpu", "fp16"),
        cells(text, 1, "aliked-t16 + LightGlue", "pytorch (CPU)", "fp32"),
        cells(text, 1, "aliked-t16 + LightGlue", "onnxruntime-cpu", "fp16"),
    ]
    assert [line["AUC@3"][0] for line in changes] == ["-", "+", "-"]


def test_kinds_of_pairs_stand_apart(table):
    line = cells(table([record(FP32, [0.0, 0.0, None, None])]), -1, "aliked-t16")
    assert (line["light (2)"], line["blur (2)"]) == ("100.0", "0.0")


def test_a_system_that_could_not_run_says_why(table):
    missing = record(FP16, []) | {"status": "not run", "reason": "no such package"}
    del missing["pairs"]
    text = table([record(FP32, ERRORS), missing])
    assert "- onnxruntime-cpu fp16 aliked-t16, not run: no such package" in text


def test_the_order_of_records_does_not_change_a_byte(table):
    records = [record(FP32, ERRORS), record(FP16, ERRORS), record(SIFT, ERRORS)]
    text = table(records)
    random.Random(1).shuffle(records)
    assert table(records) == text


def test_other_data_or_rules_have_a_table_of_their_own(table):
    other = record(FP32, ERRORS)
    other["parameters"] = other["parameters"] | {"top_k": 500}
    assert table([record(FP32, ERRORS), other]).count("### homography: assets") == 2


def test_two_records_of_one_system_are_refused(table):
    with pytest.raises(InputError, match=r"line 2 of .* and line 1 of .* leave one"):
        table([record(FP32, ERRORS), record(FP32, ERRORS)])


def test_the_frontier_has_what_no_cheaper_system_reaches():
    points = [(3.0, 80.0), (1.0, 70.0), (2.0, 65.0), (4.0, 79.0), (1.0, 60.0)]
    assert frontier(points) == [(1.0, 70.0), (3.0, 80.0)]


def test_one_report_draws_timings_and_evaluations_between_their_own_markers(tmp_path):
    write_records(tmp_path / "t.jsonl", [measured(ROW, 41.5)])
    write_records(tmp_path / "e.jsonl", [record(FP32, ERRORS), record(SIFT, ERRORS)])
    readme = tmp_path / "README.md"
    markers = (report.BEGIN, report.END), report.EVALUATION
    readme.write_text("# Title\n" + "".join(f"{a}\nthe old table\n{b}\n" for a, b in markers))
    files = [tmp_path / "e.jsonl", tmp_path / "t.jsonl"]
    options = [*files, "--output", tmp_path / "out", "--docs", readme]
    report.main(report.parser().parse_args(list(map(str, options))))
    text = readme.read_text()
    timings, evaluations = (text.split(a)[1].split(b)[0] for a, b in markers)
    assert "compute: ms, MiB" in timings and "repeatability" not in timings
    assert "repeatability" in evaluations and "| 41.5 | 500 |" in evaluations
    assert "the old table" not in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tables.md", "evaluation.md"} <= names
    assert "homography_assets_accuracy_and_speed.png" in names


DAMAGES = {
    "no system": lambda r: r.pop("system"),
    "a system of another kind": lambda r: r["system"].update(top_k="many"),
    "a system too much": lambda r: r["system"].pop("device"),
    "another task": lambda r: r.update(task="juggling"),
    "another status": lambda r: r.update(status="fine"),
    "no pairs": lambda r: r.update(pairs=[]),
    "pairs of another kind": lambda r: r.update(pairs={"a": 1}),
    "a pair without errors": lambda r: r["pairs"][0].pop("corner_error"),
    "a negative error": lambda r: r["pairs"][0].update(corner_error={"opencv": -1.0}),
    "an error in words": lambda r: r["pairs"][0].update(corner_error={"opencv": "small"}),
    "too few thresholds": lambda r: r["pairs"][0].update(correct=[1, 2]),
    "no sizes": lambda r: r["dataset"].update(sizes={}),
    "odd sizes": lambda r: r["dataset"].update(sizes={"large": 3}),
    "no seed": lambda r: r["parameters"].pop("seed"),
    "no machine": lambda r: r["configuration"].pop("machine"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_record_that_is_none_is_named(table, damage):
    damaged = copy.deepcopy(record(FP32, ERRORS))
    DAMAGES[damage](damaged)
    with pytest.raises(InputError, match=r"line 2 of .*evaluations\.jsonl is no record"):
        table([record(SIFT, ERRORS), damaged])


def test_systems_of_other_pairs_do_not_stand_in_one_table(table):
    with pytest.raises(InputError, match="onnxruntime-cpu fp16 aliked-t16 is of other pairs"):
        table([record(FP32, ERRORS), record(FP16, ERRORS[:4])])
