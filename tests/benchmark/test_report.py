"""Tables and plots from records."""

import random
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from msgspec.structs import replace

import draw_report as report
from aliked.backends import BACKENDS
from aliked.errors import InputError
from benchmark import plots
from benchmark.records import load_records, pair_runs
from benchmark.report import report_text, summary_table
from tests.helpers.timing_records import CONFIGURATION, ROW, clock, measured, outcome, write_records

GPU = CONFIGURATION | {
    "machine": CONFIGURATION["machine"] | {"gpu": "Some GPU", "driver": "600.1"},
}
ON_GPU = replace(ROW, device="cuda")
COMPILED = replace(ON_GPU, backend="pytorch-compile", compile_mode="reduce-overhead")


def grid() -> list[dict]:
    """Two models, two K, two sizes, two precisions, three runtimes and one that cannot run."""
    records = []
    for model, factor in (("aliked-t16", 1), ("aliked-n32", 2)):
        for k in (1000, 2000):
            for width, height in ((640, 480), (1241, 376)):
                for precision in ("fp32", "fp16"):
                    case = {
                        "model": model,
                        "top_k": k,
                        "image_set": f"sequence_{width}x{height}",
                        "width": width,
                        "height": height,
                        "precision": precision,
                    }
                    ms = factor * (1 + k / 1e4) * width * height / 1e5
                    on_cpu = replace(ROW, backend="onnxruntime-cpu", **case)
                    missing = replace(ON_GPU, backend="onnxruntime-cuda", **case)
                    records += [
                        measured(replace(ON_GPU, **case), ms),
                        measured(replace(COMPILED, **case), ms / 3),
                        measured(on_cpu, 30 * ms),
                        outcome(missing, status="not run", reason="no CUDA provider"),
                    ]
    return [record | {"configuration": GPU} for record in records]


@pytest.fixture
def tables(tmp_path):
    """Makes the report of some records, which lie in a file."""

    def make(records: list[dict]) -> str:
        path = tmp_path / "records.jsonl"
        write_records(path, records)
        return report_text(load_records([path]))

    return make


def line_of(text: str, start: str) -> list[str]:
    """The cells of the first table line that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_is_a_model_a_k_and_an_image_and_a_column_a_runtime(tables):
    text = tables(grid())
    header = line_of(text, "model | K | image")
    assert header == ["model", "K", "image", "pytorch", "pytorch-compile", "onnxruntime-cpu"]
    assert line_of(text, "aliked-t16 | 1000 | 640x480") == [
        "aliked-t16",
        "1000",
        "640x480",
        "3.379, 500",
        "**1.126, 500**",
        "101.4, 500",
    ]


def test_the_section_names_hardware_versions_and_commit(tables):
    text = tables(grid())
    for fact in ("Some GPU", "Driver 600.1", "torch 2.14.1", "commit 0123456789abcdef"):
        assert fact in text


def test_a_runtime_that_cannot_run_says_why_once(tables):
    text = tables(grid())
    assert text.count("no CUDA provider") == 1
    assert "- onnxruntime-cuda, not run: no CUDA provider (16 rows)" in text


def test_a_row_outside_tolerance_is_shown_and_never_the_fastest(tables):
    wrong = measured(replace(COMPILED, precision="fp16"), 0.5, in_common=0.97)
    text = tables([measured(replace(ON_GPU, precision="fp16"), 3.0), wrong])
    assert line_of(text, "aliked-t16")[3:] == ["**3.000, 500**", "0.500, 500†"]
    assert "outside the FP16 tolerance: 000000.png: keypoints in common 0.97 < 0.985" in text


def test_the_summary_ranks_what_is_within_tolerance_and_puts_the_rest_last(tmp_path):
    wrong = measured(COMPILED, 0.5, in_common=0.9)
    slow, quick = measured(ON_GPU, 3.0), measured(replace(ON_GPU, backend="aotinductor"), 2.0)
    write_records(tmp_path / "r.jsonl", [wrong, slow, quick])
    text = summary_table(load_records([tmp_path / "r.jsonl"]))
    assert max(map(len, text.splitlines())) <= 120
    assert [tuple(line.split()[:2]) for line in text.splitlines()[3:]] == [
        ("aotinductor", "1"),
        ("pytorch", "2"),
        ("pytorch-compile", "†"),
    ]


def test_an_unstable_clock_is_marked_where_it_is_shown(tables):
    shaky = measured(ON_GPU, 3.0) | {"compute_ms": clock(3.0, ["drift of +9%"])}
    text = tables([shaky])
    compute, end_to_end = (line for line in text.splitlines() if line.startswith("| aliked-t16"))
    assert "~" in compute and "~" not in end_to_end
    assert "compute: drift of +9%" in text


def test_batches_have_a_table_of_throughput(tables):
    text = tables([measured(replace(ON_GPU, batch=8), 4.0)])
    assert "**FP32, batches, compute: images per second**" in text
    assert "**2000**" in text


def test_a_second_run_is_compared_row_by_row(tmp_path):
    cases = [replace(ON_GPU, top_k=k) for k in (500, 1000, 2000, 4000)]
    write_records(tmp_path / "a.jsonl", [measured(row, 2.0) for row in cases[:3]])
    later = [measured(row, ms) for row, ms in zip(cases, (2.0, 2.06, 1.6, 9.0), strict=True)]
    later = [r | {"measured_at": "2026-01-02T03:04:06+00:00"} for r in later]
    write_records(tmp_path / "b.jsonl", [*later, measured(COMPILED, 1.0)])
    runs = [load_records([tmp_path / f"{name}.jsonl"]) for name in "ab"]
    # The change is from the first run to the second, whichever of them is the table's.
    one, other = (report_text(pair_runs(*order)) for order in (runs, runs[::-1]))
    table = one[one.index("**Measured twice**") :]
    assert table == other[other.index("**Measured twice**") :]
    assert "| pytorch | fp32 | 3 | +0.0 [-20.0, +3.0] % | 2 | +0.0 [-16.0, +2.4] % | 2 |" in table
    assert "compile" not in table  # was not measured twice
    assert "Measured twice" not in report_text(runs[1])


def test_what_another_run_of_the_same_code_does_not_bear_out_is_marked(tmp_path):
    cases = [replace(ON_GPU, top_k=k) for k in (500, 1000, 2000)]
    first, second, third = (measured(row, 2.0) for row in cases)
    write_records(tmp_path / "a.jsonl", [first, second, third])
    again = [measured(row, ms) for row, ms in zip(cases, (2.06, 2.4, 2.4), strict=True)]
    again[2]["commit"] = "fedcba9876543210"  # of other code, which may well be slower
    write_records(tmp_path / "b.jsonl", again)
    results, others = (load_records([tmp_path / f"{name}.jsonl"]) for name in "ab")
    text = report_text(pair_runs(results, others))
    compute = [line.split("|")[4] for line in text.splitlines() if "2.000," in line]
    assert ["~" in cell for cell in compute] == [False, True, False]
    assert "K 1000, 640x480: compute: +20% in another run; end to end: +16% in another run" in text


def test_another_run_of_other_rows_is_refused_before_anything_is_written(tmp_path):
    write_records(tmp_path / "a.jsonl", [measured(COMPILED, 2.0)])
    write_records(tmp_path / "b.jsonl", [measured(ON_GPU, 2.0)])
    with pytest.raises(InputError, match=r"no row of .*a\.jsonl was measured"):
        run(tmp_path / "b.jsonl", other_run=tmp_path / "a.jsonl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_compared_with_itself(tmp_path):
    write_records(tmp_path / "a.jsonl", [measured(ON_GPU, 2.0)])
    with pytest.raises(InputError, match=r"a\.jsonl has records of the files"):
        run(tmp_path / "a.jsonl", other_run=tmp_path / "a.jsonl", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_is_not_taken_for_another_run(tmp_path):
    write_records(tmp_path / "a.jsonl", [{"schema": 1, "task": "pose"}])
    write_records(tmp_path / "b.jsonl", [measured(ON_GPU, 2.0)])
    with pytest.raises(InputError, match=r"line 1 of .*a\.jsonl is of evaluate\.py"):
        run(tmp_path / "b.jsonl", other_run=tmp_path / "a.jsonl", output=tmp_path / "out")


def test_the_order_of_records_and_files_does_not_change_a_byte(tables, tmp_path):
    records = grid()
    text = tables(records)
    random.Random(0).shuffle(records)
    write_records(tmp_path / "a.jsonl", records[:20])
    write_records(tmp_path / "b.jsonl", records[20:])
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    assert report_text(load_records(files)) == text


def test_devices_and_versions_have_sections_of_their_own(tables):
    other = CONFIGURATION | {"versions": {"torch": "2.11.0"}}
    records = [
        measured(ROW, 100.0),
        measured(ROW, 90.0) | {"configuration": other},
        measured(ON_GPU, 3.0) | {"configuration": GPU},
    ]
    text = tables(records)
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert titles == ["### Some CPU", "### Some CPU", "### Some GPU"]


def test_of_one_device_the_largest_section_comes_first_and_has_the_plain_names(tables, tmp_path):
    versions = {"large": {"torch": "2.11.0"}, "small": {"numpy": "2.0", "torch": "2.11.0"}}
    rows = [ON_GPU, COMPILED]
    records = [
        measured(replace(row, top_k=k), 3.0) | {"configuration": GPU | {"versions": versions[name]}}
        for name, ks in (("small", [1000]), ("large", [1000, 2000]))
        for row in rows
        for k in ks
    ]
    text = tables(records)
    assert text.index("torch 2.11.0. Code") < text.index("numpy 2.0")
    path = tmp_path / "plots.jsonl"
    write_records(path, records)
    names = [plot.name for plot in plots.draw_all(load_records([path]), tmp_path / "plots")]
    assert len(set(names)) == len(names)
    assert sum("some_gpu_2_" in name for name in names) == 2  # of one K


@pytest.mark.parametrize(("capability", "said"), [("9.0", True), ("8.9", False)])
def test_a_gpu_outside_the_support_list_is_named(tables, capability, said):
    machine = GPU["machine"] | {"compute_capability": capability}
    row = replace(ON_GPU, backend="tensorrt-rtx")
    text = tables([measured(row, 3.0) | {"configuration": GPU | {"machine": machine}}])
    assert ("outside NVIDIA's support list" in text) == said


def test_two_measurements_of_one_row_are_refused(tables):
    with pytest.raises(InputError, match=r"line 2 of .* and line 1 of .* leave one"):
        tables([measured(ROW, 3.0), measured(ROW, 4.0)])


@pytest.fixture
def no_plots(monkeypatch):
    """Leaves out the drawing, which takes most of the time."""
    monkeypatch.setattr(plots, "draw_all", lambda records, folder: [])


def run(records: Path, **options) -> None:
    """The report's command."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    report.main(report.parser().parse_args([str(records), *given]))


def test_tables_go_between_the_markers_of_the_readme_and_nowhere_else(tmp_path, no_plots):
    records, readme = tmp_path / "r.jsonl", tmp_path / "README.md"
    write_records(records, grid())
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    run(records, output=tmp_path / "out", docs=readme)
    once = readme.read_bytes()
    text = once.decode()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\nThe end.\n")
    assert "\nold\n" not in text and (tmp_path / "out" / "tables.md").read_text() in text
    run(records, output=tmp_path / "out", docs=readme)
    assert readme.read_bytes() == once


def test_the_readme_gets_one_small_table(tmp_path, no_plots):
    records = [r for r in grid() if r["row"]["model"] == "aliked-t16"]
    on_cpu = [r | {"configuration": CONFIGURATION} for r in grid()[2::4]]  # fewer of the rows
    write_records(tmp_path / "r.jsonl", records)
    write_records(tmp_path / "c.jsonl", on_cpu[:3])
    readme, docs = tmp_path / "README.md", tmp_path / "results.md"
    for path in (readme, docs):
        path.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    run(tmp_path / "c.jsonl", output=tmp_path / "out", docs=docs)
    files = [tmp_path / "c.jsonl", tmp_path / "r.jsonl", "--output", tmp_path / "out"]
    options = [*files, "--docs", docs, "--readme", readme]
    report.main(report.parser().parse_args(list(map(str, options))))
    assert "**FP32, compute: ms, MiB**" in docs.read_text()
    text = readme.read_text()
    assert "**Some GPU, FP16: ms, MiB**" in text and "FP32" not in text
    lines = [line for line in text.splitlines() if line.startswith("| aliked")]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| aliked-t16", k, size] for size in ("640x480", "1241x376") for k in ("1000", "2000")
    ]


def test_a_small_table_of_nothing_is_refused(tmp_path, no_plots):
    records, readme = tmp_path / "r.jsonl", tmp_path / "README.md"
    write_records(records, [measured(replace(ROW, top_k=10), 3.0)])
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    with pytest.raises(InputError, match="no timings for the small table"):
        run(records, output=tmp_path / "out", readme=readme)


def test_a_readme_without_markers_is_left_alone(tmp_path, no_plots):
    records, readme = tmp_path / "r.jsonl", tmp_path / "README.md"
    write_records(records, [measured(ROW, 3.0)])
    readme.write_text("# Title\n")
    with pytest.raises(InputError, match="has no lines"):
        run(records, output=tmp_path / "out", docs=readme)
    assert readme.read_text() == "# Title\n"


def test_no_file_is_written_where_one_of_several_cannot_be(tmp_path):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    blocks = {(report.BEGIN, report.END): "new", report.EVALUATION: "more"}
    for content, reason in ((b"# Title", "bad.md has no lines"), (b"\xff", "not UTF-8")):
        bad.write_bytes(content)
        with pytest.raises(InputError, match=reason):
            report.put_between_markers([good, bad], blocks)
    with pytest.raises(InputError, match="evaluation:begin"):
        report.put_between_markers([good], blocks)
    with pytest.raises(InputError, match="cannot read"):
        report.put_between_markers([good, tmp_path / "none.md"], blocks)
    assert "old" in good.read_text()


def test_results_of_a_dirty_tree_are_not_published(tmp_path, no_plots, capsys):
    records, docs = tmp_path / "r.jsonl", tmp_path / "results.md"
    docs.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    write_records(records, [measured(ROW, 3.0) | {"commit": "ab" * 20 + "+dirty.0123456789ab"}])
    run(records, output=tmp_path / "out")  # but they can be looked at
    with pytest.raises(InputError, match=r"in no commit \(abab.*dirty\.0123"):
        run(records, output=tmp_path / "out", docs=docs)
    assert "old" in docs.read_text()
    write_records(records, [r | {"commit": "cd" * 20 + "+changes"} for r in grid()])
    run(records, output=tmp_path / "out", docs=docs)
    assert capsys.readouterr().err.count("+changes") == 1


def test_damaged_lines_are_named_and_the_others_shown(tmp_path, no_plots, capsys):
    records = tmp_path / "r.jsonl"
    write_records(records, [measured(ROW, 3.0), measured(replace(ROW, top_k=500), 2.0)])
    lines = records.read_text().splitlines()
    records.write_text(f"{lines[0]}\n{{\n{lines[1]}")  # nor has the last its end
    run(records, output=tmp_path / "out")
    output = capsys.readouterr()
    assert "line 2 of" in output.err and "3.000" in output.out and "2.000" in output.out
    docs = tmp_path / "results.md"
    docs.write_text(f"{report.BEGIN}\n{report.END}\n")
    with pytest.raises(InputError, match="line 2 of"):
        run(records, output=tmp_path / "out", docs=docs)


def test_pictures_of_an_earlier_report_go_and_others_stay(tmp_path):
    records, folder = tmp_path / "r.jsonl", tmp_path / "out"
    two = [measured(ROW, 3.0), measured(replace(ROW, backend="aotinductor"), 2.0)]
    write_records(records, two)
    run(records, output=folder)
    older = {path.name for path in folder.glob("*.png")}
    (folder / "mine.png").write_bytes(b"\x89PNG")
    other = {"top_k": 500}
    write_records(records, [r | {"row": r["row"] | other} for r in two])
    run(records, output=folder)
    assert older and not older & {path.name for path in folder.glob("*.png")}
    assert (folder / "mine.png").exists()


def test_plots_are_drawn_apart_for_gpu_and_cpu(tmp_path):
    records = tmp_path / "r.jsonl"
    write_records(records, grid())
    run(records, output=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    for device in ("some_gpu", "some_cpu"):
        assert {
            f"{device}_latency.png",
            f"{device}_bars_640x480_k_1000.png",
            f"{device}_speed_and_precision_1241x376_k_2000.png",
        } <= names
    assert all((tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG" for name in names)


def latency(records: list[dict], tmp_path: Path) -> Figure | None:
    """The figure of latencies over K and size, if there is one."""
    write_records(tmp_path / "r.jsonl", records)
    own = [r for r in load_records([tmp_path / "r.jsonl"]) if r.measured]
    return dict(plots.draw(own, "Some GPU")).get("latency")


def test_latency_has_a_column_for_what_varies_only(tmp_path):
    records = grid()
    of_one_k = [record for record in records if record["row"]["top_k"] == 1000]
    of_one_case = [record for record in of_one_k if record["row"]["width"] == 640]
    assert len(latency(records, tmp_path).axes) == 2 * 2  # two models
    assert len(latency(of_one_k, tmp_path).axes) == 2
    assert latency(of_one_case, tmp_path) is None
    of_one_k_each = [
        r for r in records if (r["row"]["top_k"] == 1000) == (r["row"]["width"] == 640)
    ]
    assert latency(of_one_k_each, tmp_path) is None


def test_the_legend_shows_the_colour_of_what_is_ranked_somewhere(tmp_path):
    sizes = [COMPILED, replace(COMPILED, width=1000)]
    wrong = [measured(replace(row, model="aliked-n32"), 0.5, in_common=0.9) for row in sizes]
    records = [*wrong, *(measured(row, 0.5) for row in sizes)]
    (legend,) = latency(records, tmp_path).legends
    assert [handle.get_alpha() for handle in legend.legend_handles] == [1.0]


def test_a_runtime_has_one_colour_whatever_is_drawn_beside_it(tmp_path):
    def colour(*rows) -> tuple:
        write_records(tmp_path / "r.jsonl", [measured(row, 2.0) for row in rows])
        records = load_records([tmp_path / "r.jsonl"])
        ((_, bars), *_) = plots.draw(records, "Some GPU")
        (axis,) = bars.axes
        (own,) = (c for c in axis.containers if c.get_label() == "pytorch-compile")
        return own.patches[0].get_facecolor()[:3]

    fused = replace(COMPILED, backend="fused", compile_mode=None)
    assert colour(COMPILED, ON_GPU) == colour(fused, COMPILED)
    colours = [plots.colour_of(replace(ON_GPU, backend=name)) for name in BACKENDS]
    own = [name for name in BACKENDS if not name.startswith("onnxruntime")]
    assert len({plots.colour_of(replace(ON_GPU, backend=name)) for name in own}) == len(own)
    assert to_rgb(plots.OTHERS) not in colours  # every backend has one


def test_there_is_no_plot_of_a_single_dot_and_no_share_above_all(tmp_path):
    write_records(tmp_path / "r.jsonl", [measured(ON_GPU, 2.0)])
    assert plots.draw(load_records([tmp_path / "r.jsonl"]), "Some GPU") == []
    write_records(tmp_path / "r.jsonl", [measured(ON_GPU, 2.0), measured(COMPILED, 1.0)])
    figures = dict(plots.draw(load_records([tmp_path / "r.jsonl"]), "Some GPU"))
    (name,) = (name for name in figures if name.startswith("speed"))
    assert figures[name].axes[0].get_ylim()[1] == 100
    assert all(
        "ms" in axis.get_ylabel() + axis.get_xlabel() for f in figures.values() for axis in f.axes
    )
