"""What decides whether a number may be believed: keys of what is kept, and what a record says."""

import dataclasses
import functools
import gc
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from aliked import files
from aliked.backends import Spec
from aliked.backends.pytorch import PyTorchExtractor
from aliked.errors import InputError
from aliked.files import code_digest, sha256, write_json
from benchmark import artifacts, measure, runner, subjects
from benchmark.artifacts import cached_path, check_model_file
from benchmark.environment import Monitor, git_commit, observed, tf32_of
from benchmark.process import TaskFailed
from benchmark.rows import ImageSet
from benchmark.subjects import ExtractorSubject
from benchmark.timing import Limits, contradiction
from tests.helpers.fake_backends import FakeExtractor
from tests.helpers.small_models import write_small_model
from tests.helpers.timing_records import ROW

SHIPPED = "aliked-t16-homography"
OWN = replace(ROW, model=SHIPPED)
SMALL = replace(ROW, top_k=50, width=64, height=48)
PACKAGE = Path(files.__file__).parent
MADE_ON = {"versions": {"torch": "2.14.1"}, "machine": {"cpu": "Some CPU"}}

# -- keys --


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package that a test may change."""
    folder = tmp_path_factory.mktemp("code") / "aliked"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.pth", "__pycache__"))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "model.py",
        "backends/tensorrt.py",
        "export/engine.py",
        "export/builder.py",
        "export/onnx_checks.py",
        "export/deform_conv_onnx.py",
        "fused/blocks.cu",
        "fused/warp.cuh",
        "fused/pipeline.py",
    ],
)
def test_other_code_anywhere_in_the_package_is_another_key(package, name):
    before = code_digest(package=package)
    source = package / name
    content = source.read_bytes()
    try:
        source.write_bytes(content + b"\n")
        code_digest.cache_clear()
        assert code_digest(package=package) != before
    finally:
        source.write_bytes(content)
        code_digest.cache_clear()
    assert code_digest(package=package) == before


def test_a_new_file_is_other_code_and_what_python_leaves_is_not(package):
    before = code_digest(package=package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"compiled")
    code_digest.cache_clear()
    assert code_digest(package=package) == before
    (package / "new.py").write_text("")
    code_digest.cache_clear()
    assert code_digest(package=package) != before


def key(row=OWN, suffix=".onnx", weights=None, made_on=MADE_ON) -> Path:
    return cached_path(row, suffix, weights, made_on)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "aliked-n16"},
        {"top_k": 500},
        {"top_k": 0, "scores_th": 0.2, "n_limit": 5000},
        {"width": 641},
        {"height": 481},
        {"batch": 2},
        {"precision": "fp16"},
    ],
)
def test_what_a_file_is_made_for_is_in_its_key(change, weights_dir):
    assert key(replace(OWN, **change), weights=weights_dir if "model" in change else None) != key()


def test_each_part_of_a_threshold_is_in_the_key():
    row = replace(OWN, top_k=0, scores_th=0.2, n_limit=5000)
    keys = {key(row), key(replace(row, scores_th=0.3)), key(replace(row, n_limit=400))}
    assert len(keys) == 3


def test_the_backend_is_not_in_the_key_and_the_kind_of_file_is():
    assert key(replace(OWN, backend="onnxruntime-cuda", device="cuda")) == key()
    assert key(suffix=".trt") != key()


@pytest.mark.parametrize("name", ["versions", "machine"])
def test_versions_and_machine_are_in_the_key(name):
    assert key(made_on=MADE_ON | {name: {"another": "one"}}) != key()


def test_weights_are_in_the_key(tmp_path):
    other = tmp_path / "other.pth"
    state = torch.load(PACKAGE / "pretrained" / f"{SHIPPED}.pth", weights_only=True)
    torch.save(state | {"conv1.weight": state["conv1.weight"] + 1e-6}, other)
    assert key(weights=other) != key()


def test_code_is_in_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(artifacts, "code_digest", lambda *_: "other code")
    assert key() != before


def run_of(**changes) -> runner.Run:
    images = ImageSet(OWN.image_set, (Path("a.png"),), 640, 480, "ab" * 32)
    fields = MADE_ON | {"device": "cpu", "unavailable": {}, "image_sets": [images]}
    return runner.Run(**fields | {"limits": Limits(), "commit": None} | changes)


def test_a_reference_is_of_its_images_weights_versions_and_machine():
    run = run_of()
    before = runner.reference_path(run, OWN)
    other = dataclasses.replace(run.image_sets[0], sha256="cd" * 32)
    for change in (
        {"image_sets": [other]},
        {"versions": {"torch": "3.0"}},
        {"machine": {"cpu": "Another CPU"}},
    ):
        assert runner.reference_path(run_of(**change), OWN) != before
    assert runner.reference_path(run, replace(OWN, top_k=500)) != before
    # It is made in float32, of single images, on the CPU, whatever the row is.
    like = replace(OWN, precision="fp16", batch=8, backend="fused", device="cuda")
    assert runner.reference_path(run, like) == before


def test_files_for_a_gpu_are_found_again_by_a_run_on_fewer_threads():
    facts = {"cpu": "Some CPU", "gpu": "Some GPU"}

    def made_on(device, **changes):
        return run_of(device=device, machine=facts | {"cpu_threads": 64} | changes).made_on

    assert made_on("cuda:0") == made_on("cuda:0", cpu_threads=16)
    assert made_on("cuda:0") != made_on("cuda:0", gpu="Another GPU")
    assert made_on("cpu") != made_on("cpu", cpu_threads=16)


# -- the commit --


@pytest.fixture
def repository(tmp_path) -> Path:
    def git(*words: str) -> None:
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "aliked").mkdir()
    (tmp_path / "aliked" / "model.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("# Title\n")
    git("init")
    git("add", "-A")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    return tmp_path


def test_a_clean_tree_is_its_commit(repository):
    commit = git_commit(repository)
    assert len(commit) == 40
    (repository / "README.md").write_text("# Another\n")  # decides no number
    assert git_commit(repository) == commit


def test_a_dirty_tree_names_its_difference(repository):
    commit, code = git_commit(repository), repository / "aliked" / "model.py"
    names = set()
    for content in ("x = 2\n", "x = 3\n"):
        code.write_text(content)
        names.add(git_commit(repository))
    code.write_text("x = 1\n")
    new = repository / "aliked" / "new.py"
    for content in ("y = 1\n", "y = 2\n"):  # which git does not know yet
        new.write_text(content)
        names.add(git_commit(repository))
    assert len(names) == 4
    assert all(name.startswith(f"{commit}+dirty.") and len(name) == 59 for name in names)
    new.unlink()
    assert git_commit(repository) == commit


def test_code_without_its_history_is_what_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("ALIKED_COMMIT", raising=False)
    assert git_commit(tmp_path) is None
    monkeypatch.setenv("ALIKED_COMMIT", "abc")
    assert git_commit(tmp_path) == "abc"


# -- what a record says --


class Forward(FakeExtractor):
    """An extractor that PyTorch runs, with TF32 and gradients as they are."""

    def forward(self, batch):
        return super().infer(batch)

    def infer(self, batch):
        return self.forward(batch)


@pytest.fixture
def measured_by(monkeypatch):
    """Measures a row with an extractor of the test's."""

    def run(extractor, row=SMALL) -> dict:
        monkeypatch.setattr(subjects, "create_extractor", lambda *_: extractor)
        monkeypatch.setattr(ExtractorSubject, "parity", lambda _: {"passed": True})
        images = {"a.png": np.zeros((row.height, row.width, 3), np.uint8)}
        spec, limits = row.spec("cpu", None, None), Limits(10, 3, 5.0)
        subject = functools.partial(ExtractorSubject, row, spec, images, {})
        return measure.measure(subject, spec, limits, lambda *_: None)

    return run


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_switches_of_a_record_are_those_inside_of_its_runs(measured_by, tf32, gradients):
    extractor = Forward(Spec(top_k=50))
    with (
        torch.backends.cudnn.flags(allow_tf32=tf32),
        torch.set_grad_enabled(gradients),
    ):
        settings = measured_by(extractor)["settings"]
    assert (settings["tf32"], settings["gradients"]) == (tf32, gradients)
    assert "forward" not in vars(extractor) or extractor.forward.__func__ is Forward.forward


def test_pytorch_runs_without_tf32_and_gradients_though_both_are_on_outside():
    extractor = PyTorchExtractor(Spec(model=SHIPPED, device="cpu", top_k=20))
    assert torch.is_grad_enabled() and torch.backends.cudnn.allow_tf32
    with observed(extractor) as inside:
        extractor.infer(extractor.to_device(np.zeros((1, 32, 32, 3), np.uint8)))
    assert (inside["tf32"], inside["gradients"]) == (False, False)


@pytest.mark.parametrize("tf32", [True, False])
def test_an_engine_is_as_its_manifest_says(tf32):
    assert tf32_of(SimpleNamespace(manifest={"tf32": tf32})) is tf32


def session(**options) -> SimpleNamespace:
    return SimpleNamespace(session=SimpleNamespace(get_provider_options=lambda: options))


def test_onnx_runtime_is_as_its_provider_says():
    assert tf32_of(session(CUDAExecutionProvider={"use_tf32": "1"})) is True
    assert tf32_of(session(CUDAExecutionProvider={"use_tf32": "0"})) is False
    assert tf32_of(session(CPUExecutionProvider={})) is False
    assert tf32_of(session(TensorrtExecutionProvider={})) is None  # it does not tell
    assert tf32_of(session(nv_tensorrt_rtx={})) is None
    assert tf32_of(SimpleNamespace()) is None


def test_a_record_says_whether_garbage_was_collected_in_timed_runs(measured_by, monkeypatch):
    assert measured_by(FakeExtractor(Spec(top_k=50)))["settings"]["garbage_collector"] is False
    monkeypatch.setattr(gc, "disable", lambda: None)
    assert measured_by(FakeExtractor(Spec(top_k=50)))["settings"]["garbage_collector"] is True


def test_what_a_gpu_runtime_leaves_to_the_processor_is_a_problem(measured_by):
    extractor = FakeExtractor(Spec(top_k=50))
    nodes = {"CPUExecutionProvider": Counter(Conv=2, Shape=5)}
    extractor.placement = lambda: nodes
    subject = SimpleNamespace(row=replace(ROW, device="cuda"), runtime=extractor)
    assert measure.stray_nodes(subject) == "part of the model ran on the CPU: 2 Conv"
    nodes["CPUExecutionProvider"] = Counter(Shape=5)
    assert measure.stray_nodes(subject) is None
    nodes["CPUExecutionProvider"] = Counter(Conv=2)
    on_cpu = SimpleNamespace(row=ROW, runtime=extractor)
    assert measure.stray_nodes(on_cpu) is None
    extractor.device = "cuda"
    result = measured_by(extractor, replace(ROW, top_k=50, device="cuda"))
    assert result["problems"][0].startswith("part of the model") and not result["ranked"]


def test_times_that_cannot_both_be_right_are_marked(measured_by):
    assert contradiction(3500, 1721) == [
        "impossible: compute took 3500.000 ms, of 1721.000 ms end to end"
    ]
    assert contradiction(1.04, 1.0) == contradiction(0.5, 1.0) == []

    class Impossible(FakeExtractor):
        """Quick where it is called as users call it."""

        def extract_batch(self, images):
            return self.kept

    extractor = Impossible(Spec(top_k=50))
    extractor.kept = FakeExtractor(Spec(top_k=50)).extract_batch(np.zeros((1, 48, 64, 3), np.uint8))
    result = measured_by(extractor)
    for clock in ("compute_ms", "end_to_end_ms"):
        assert any(reason.startswith("impossible") for reason in result[clock]["unstable"])


def test_the_monitor_of_a_cpu_row_notes_no_clocks():
    monitor = Monitor("cpu")
    monitor.note()
    assert monitor.clocks_seen() is None and monitor.collects_garbage is gc.isenabled()


# -- files that are not what a row is --


@pytest.fixture
def exported(tmp_path) -> Path:
    """A file of aliked-t16, 20 keypoints, float32, 64x48."""
    return write_small_model(tmp_path / "model.onnx", height=48, width=64, top_k=20)


FITTING = replace(ROW, backend="onnxruntime", model="aliked-t16", top_k=20, width=64, height=48)
WEIGHTS = {"aliked-t16": "12" * 32, "aliked-n16": "34" * 32}


def test_a_file_that_fits_is_taken(exported):
    check_model_file(exported, [FITTING], WEIGHTS)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"precision": "fp16"}, "its precision is fp32, not fp16"),
        ({"model": "aliked-n16"}, "its model is aliked-t16, not aliked-n16"),
        ({"top_k": 10}, "its selection is 20, not 10"),
        ({"top_k": 0, "scores_th": 0.2, "n_limit": 20}, "its selection is 20, not score > 0.2"),
        ({"width": 65}, "is 1x48x64, not 1x48x65"),
        ({"batch": 2}, "is 1x48x64, not 2x48x64"),
    ],
)
def test_a_file_of_something_else_is_refused_before_anything_runs(exported, change, what):
    with pytest.raises(InputError, match=what):
        check_model_file(exported, [replace(FITTING, **change)], WEIGHTS)


def test_a_file_of_other_weights_is_refused(exported):
    manifest = {"sha256": sha256(exported), "weights": {"sha256": WEIGHTS["aliked-t16"]}}
    write_json(exported.with_name("model.onnx.json"), manifest)
    check_model_file(exported, [FITTING], WEIGHTS)
    with pytest.raises(InputError, match=r"its weights is 1212.*, not 5656"):
        check_model_file(exported, [FITTING], {"aliked-t16": "56" * 32})


def test_a_dynamic_file_takes_every_size(tmp_path):
    path = write_small_model(tmp_path / "model.onnx", top_k=20, dynamic=True)
    for change in ({"width": 65}, {"batch": 2}):
        check_model_file(path, [replace(FITTING, **change)], WEIGHTS)


@pytest.mark.parametrize("name", ["a.onnx", "a.trt", "a.pt2"])
def test_a_missing_file_or_a_folder_is_one_sentence(tmp_path, name):
    with pytest.raises(InputError, match="cannot read"):
        check_model_file(tmp_path / name, [FITTING], WEIGHTS)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_model_file(tmp_path / name, [FITTING], WEIGHTS)


# -- backends that cannot run --


def test_a_backend_that_does_not_open_is_found_before_anything_is_measured(monkeypatch, tmp_path):
    rows = [replace(OWN, top_k=k, backend=b) for k in (100, 50) for b in ("pytorch", "aotinductor")]
    tried = []

    def run_here(tasks, jobs, done, cache=None):
        tried.extend((task.row.backend, task.row.top_k) for task in tasks)
        broken = TaskFailed("no package", expected=True)
        return [broken if task.row.backend == "aotinductor" else None for task in tasks]

    monkeypatch.setattr(runner, "run_tasks", run_here)
    monkeypatch.setattr(runner, "make_references", lambda *_: {runner.reference_key(rows[0]): None})
    monkeypatch.setattr(runner, "make_files", lambda *_: {})
    monkeypatch.setattr(runner, "measure_row", lambda run, row, *_: tried.append(row.top_k))
    monkeypatch.setattr(runner, "append_record", lambda *_: None)
    configuration = {"cpu": "Some CPU", "cpu_threads": 1, "system": "Linux"}
    run = run_of(unavailable={"pytorch": None, "aotinductor": None}, machine=configuration)
    records = list(runner.run_rows(run, rows, tmp_path / "r.jsonl"))
    assert tried == [("pytorch", 50), ("aotinductor", 50), 100, 50]
    assert (records[0].runtime, records[0].rows, records[0].reason) == (
        "aotinductor",
        2,
        "no package",
    )
