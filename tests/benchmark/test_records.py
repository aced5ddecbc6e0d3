"""Files of records: what is read of them, whatever is in them, and what resuming keeps."""

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json as strict_json
from msgspec.structs import replace

from aliked.errors import InputError
from aliked.files import only_writer
from benchmark.records import (
    AnyRecord,
    append_record,
    load_records,
    make_record,
    read_lines,
    resume,
)
from benchmark.report import report_text
from tests.helpers.damage import HOW, JSON, QUICKLY, changed, places
from tests.helpers.timing_records import CONFIGURATION, ROW, measured, outcome, write_records


@pytest.fixture
def recorded(tmp_path) -> Path:
    """Three rows: two measured, one failed."""
    path = tmp_path / "records.jsonl"
    append_record(path, measured(ROW, 3.0))
    append_record(
        path, outcome(replace(ROW, model="aliked-n16"), status="failed", reason="it broke")
    )
    append_record(path, measured(replace(ROW, model="aliked-n32"), 4.0))
    return path


MODELS = ("aliked-t16", "aliked-n16", "aliked-n32", "aliked-n16rot")
ROWS = [replace(ROW, model=model) for model in MODELS]


def test_a_resumed_run_tries_again_what_failed(recorded):
    done = resume(recorded, ROWS, CONFIGURATION)
    assert done == {ROWS[0], ROWS[2]}
    assert [r.row.model for r in load_records([recorded])] == ["aliked-t16", "aliked-n32"]


def test_a_line_that_an_interruption_cut_short_is_measured_again(recorded):
    text = recorded.read_text()
    recorded.write_text(text[: -len(text.splitlines()[-1]) // 2])
    assert resume(recorded, ROWS, CONFIGURATION) == {ROWS[0]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limits", {"repeats": 50, "warmup": 200, "max_seconds": 10.0}),
        ("machine", {"cpu": "Another CPU"}),
        ("versions", {"python": "3.11.7", "torch": "2.11.0", "cuda": None}),
        ("images", {"sequence_640x480": "00" * 32}),
    ],
)
def test_records_of_another_configuration_are_refused_and_left_alone(recorded, name, value):
    before = recorded.read_bytes()
    with pytest.raises(InputError, match=f"another {name}"):
        resume(recorded, ROWS, CONFIGURATION | {name: value})
    assert recorded.read_bytes() == before


def test_what_an_earlier_version_began_goes_on_where_the_new_options_have_their_defaults(recorded):
    recorded.write_text(recorded.read_text().replace(', "processes": 1', ""))
    assert resume(recorded, ROWS, CONFIGURATION) == {ROWS[0], ROWS[2]}


def test_records_of_rows_that_are_not_asked_for_are_refused(recorded):
    with pytest.raises(InputError, match=r"does not ask for .*aliked-n32"):
        resume(recorded, ROWS[:2], CONFIGURATION)


@pytest.mark.parametrize("line", ["not JSON", "{}", "[1, 2]", json.dumps({"schema": 0})])
def test_a_line_that_is_no_record_is_named(recorded, line):
    with open(recorded, "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"line 4 of .*records.jsonl"):
        load_records([recorded])


def test_a_last_record_without_its_end_is_read_and_written_behind(recorded):
    recorded.write_bytes(recorded.read_bytes().rstrip())
    assert len(load_records([recorded])) == 3
    append_record(recorded, measured(ROWS[3], 5.0))
    assert [r.row.model for r in load_records([recorded])][-2:] == ["aliked-n16rot", "aliked-n32"]


def test_records_of_other_weights_are_refused_and_left_alone(recorded):
    before = recorded.read_bytes()
    same = {"aliked-t16": "cd" * 32}
    assert resume(recorded, ROWS, CONFIGURATION, same)
    recorded.write_bytes(before)
    with pytest.raises(InputError, match="other weights of aliked-t16"):
        resume(recorded, ROWS, CONFIGURATION, {"aliked-t16": "ef" * 32})
    assert recorded.read_bytes() == before


def test_resuming_a_file_with_a_damaged_line_names_it_and_changes_nothing(recorded):
    lines = recorded.read_text().splitlines()
    recorded.write_text("\n".join([lines[0], lines[1][:-30], *lines[2:]]) + "\n")
    before = recorded.read_bytes()
    with pytest.raises(InputError, match=r"line 2 of .*records\.jsonl is not a record"):
        resume(recorded, ROWS, CONFIGURATION)
    assert recorded.read_bytes() == before


def test_a_row_that_is_there_twice_is_not_gone_on_with(recorded):
    append_record(recorded, measured(ROW, 3.5))
    before = recorded.read_bytes()
    with pytest.raises(InputError, match=r"line 4 of .* and line 1 are of the same row"):
        resume(recorded, ROWS, CONFIGURATION)
    assert recorded.read_bytes() == before


def test_two_measurements_do_not_write_to_one_file(tmp_path):
    output = tmp_path / "records.jsonl"
    with only_writer(output):
        with (
            pytest.raises(InputError, match="another run is writing to"),
            only_writer(output),
        ):
            raise AssertionError("let in")
        with only_writer(tmp_path / "another.jsonl"):
            pass
    with only_writer(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_run_is_one_record_for_all_its_rows(recorded):
    fields = outcome(ROW, status="unavailable", backend="tensorrt", rows=16, reason="no GPU")
    del fields["row"], fields["weights_sha256"]
    append_record(recorded, make_record(fields))
    record = load_records([recorded])[-1]
    assert (record.runtime, record.rows, record.status, record.measured) == (
        "tensorrt",
        16,
        "not run",
        False,
    )
    assert resume(recorded, ROWS, CONFIGURATION) == {ROWS[0], ROWS[2]}  # to be tried again
    assert len(load_records([recorded])) == 2


def test_what_earlier_versions_wrote_is_read():
    """Every kept file, of every version that has measured something."""
    files = [*(ROOT / "results").glob("*.jsonl"), *(ROOT / "results/other_run").glob("*.jsonl")]
    assert files
    for path in files:
        records, damaged = read_lines(path, AnyRecord)
        assert records and not damaged
        (record, *_) = records.values()
        assert strict_json.decode(strict_json.encode(record), type=AnyRecord) == record


def test_kept_records_name_no_folder_of_the_machine():
    """But for /tmp, which is none of anybody's; see `cli.command_line`."""
    for path in (ROOT / "results").rglob("*.jsonl"):
        commands = re.findall(r'"command": ?"([^"]*)"', path.read_text())
        paths = [word for command in commands for word in re.findall(r"(?<![^ =])/[^ ]*", command)]
        assert [p for p in paths if not p.startswith("/tmp/")] == [], path


# -- whatever is in a file --

ROOT = Path(__file__).resolve().parents[2]
VALID = measured(ROW, 3.0)


@QUICKLY
@given(st.sampled_from(places(VALID)), HOW, JSON)
def test_a_changed_record_is_read_or_named_and_its_neighbours_are_kept(tmp_path, place, how, value):
    path = tmp_path / "records.jsonl"
    others = [json.dumps(measured(replace(ROW, top_k=k), 2.0)) for k in (10, 20)]
    path.write_text(f"{others[0]}\n{json.dumps(changed(VALID, place, how, value))}\n{others[1]}\n")
    records, damaged = read_lines(path, AnyRecord)
    assert {1, 3} <= records.keys() and records.keys() | damaged.keys() == {1, 2, 3}
    before, rows = path.read_bytes(), [records[1].row, ROW, records[3].row]
    told = []
    try:  # whatever has been read can be drawn, and resumed without a loss
        report_text(load_records([path], told.append))
        resume(path, rows, CONFIGURATION)
    except InputError as error:
        assert "line 2" in str(error)
        assert path.read_bytes() == before
    kept = path.read_text()
    assert all(line in kept for line in others)
    assert len(told) == len(damaged)


@QUICKLY
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_bytes_are_read_or_named_and_their_neighbours_are_kept(tmp_path, junk):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps(VALID).encode(), *junk, json.dumps(VALID).encode()]
    random.Random(0).shuffle(lines)
    path.write_bytes(b"\n".join(lines))
    records, damaged = read_lines(path, AnyRecord)
    assert len(records) == 2
    if damaged:
        with pytest.raises(InputError, match="is not a record"):
            load_records([path])


@QUICKLY
@given(st.sampled_from(places(VALID)), JSON)
def test_a_record_is_checked_as_it_is_written(place, value):
    """What is not read back the same is not written."""
    fields = changed(VALID, place, "replace", value)
    try:
        record = make_record(fields)
    except ValueError:
        return
    assert strict_json.decode(strict_json.encode(record), type=AnyRecord) == record


def test_what_is_no_file_of_records_is_one_sentence(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "folder.jsonl", tmp_path / "none.jsonl", Path("/dev/zero")):
        with pytest.raises(InputError, match=str(path)):
            load_records([path])


def test_no_row_is_lost_where_two_files_have_the_same(tmp_path):
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", [VALID])
    with pytest.raises(InputError, match=r"leave one of the files out"):
        load_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
