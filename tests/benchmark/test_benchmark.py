"""Timing, its statistics, its records and its processes."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from aliked.backends import Spec
from aliked.matching import Matches, PairRuntime
from aliked.parity import NO_TIES
from aliked.ties import Expected
from benchmark import artifacts, environment, measure, process, runner, subjects
from benchmark.environment import Describe, ProcessMemory
from benchmark.measure import merged
from benchmark.records import Agreement
from benchmark.rows import Grid, ImageSet
from benchmark.subjects import Batches, ExtractorSubject, PairSubject, WrongAnswer
from benchmark.timing import (
    Limits,
    Sample,
    clock_statistics,
    has_settled,
    instability,
    timed_runs,
    unseen,
    warm_up,
    window_length,
)
from tests.helpers.fake_backends import FakeBackend, features_of
from tests.helpers.fake_backends import Tensor as FakeTensor
from tests.helpers.timing_records import ROW, measured

ROOT = Path(__file__).resolve().parents[2]
NOISE = np.random.default_rng(0).normal(scale=0.01, size=2000)


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


def run_of(times):
    """A run whose time is `times[index]`, whatever the real time."""
    times = list(times)
    return lambda index: Sample(times[index], times[index])


# -- has it settled, is it stable --


def test_steady_times_have_settled_and_are_stable():
    times = list(1 + NOISE[:200])
    assert has_settled(times, period=1)
    assert instability(times, period=1) == []


@pytest.mark.parametrize("slope", [0.01, -0.01])
def test_times_that_still_move_have_not_settled(slope):
    times = [1 + slope * i + NOISE[i] for i in range(40)]
    assert not has_settled(times, period=1)


def test_fewer_runs_than_the_window_are_not_enough():
    assert not has_settled([1.0] * (window_length(1) - 1), period=1)


def test_images_that_differ_in_cost_do_not_look_like_a_drift():
    cost = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2]
    times = [cost[i % 12] * (1 + NOISE[i]) for i in range(120)]
    assert has_settled(times, period=12)
    assert instability(times, period=12) == []


def test_a_drift_over_the_timed_runs_is_unstable():
    times = [1 + 0.001 * i for i in range(200)]
    (reason,) = instability(times, period=1)
    assert reason.startswith("drift of +")


def test_a_wide_spread_is_unstable():
    times = [1.0 + (i % 2) for i in range(200)]
    (reason,) = instability(times, period=1)
    assert reason.startswith("spread of")


# -- warm-up and timed runs --


def test_the_warm_up_ends_when_times_have_settled():
    falling = [2 - 0.03 * i for i in range(30)]
    times = falling + list(1 + NOISE[:1000])
    warmed = warm_up(run_of(times), Limits(warmup=1000), period=1, progress=silent)
    assert warmed["settled"]
    assert len(falling) < warmed["runs"] < 200


def test_the_warm_up_ends_at_its_limit_without_pretending():
    times = [2 - 0.01 * i for i in range(100)]
    warmed = warm_up(run_of(times), Limits(warmup=50), period=1, progress=silent)
    assert (warmed["runs"], warmed["settled"]) == (50, False)


def test_as_many_runs_are_timed_as_asked_for():
    samples = timed_runs(run_of([1.0] * 300), Limits(repeats=250), silent)
    assert len(samples) == 250


def test_a_time_limit_leaves_ten_runs():
    samples = timed_runs(run_of([1.0] * 300), Limits(repeats=250, max_seconds=1e-9), silent)
    assert len(samples) == 10


def test_statistics_are_of_all_runs():
    times = [float(t) for t in range(1, 101)]
    warmed = warm_up(run_of([1.0] * 40), Limits(), period=1, progress=silent)
    found = clock_statistics([Sample(t, t) for t in times], warmed, period=1)
    assert (found["min"], found["p50"], found["max"]) == (1, 50.5, 100)
    assert found["mean"] == pytest.approx(50.5)
    assert found["std"] == pytest.approx(np.std(times, ddof=1))
    assert found["p90"] == pytest.approx(np.percentile(times, 90))
    assert found["p99"] == pytest.approx(np.percentile(times, 99))
    assert found["samples"] == times


def result_of(times, **changes):
    """What a process returns that took these times."""
    own = clock_statistics([Sample(t, t) for t in times], {"runs": 30, "settled": True}, period=1)
    return measured(ROW, 1.0) | {"compute_ms": own, "end_to_end_ms": own} | changes


def test_processes_that_agree_are_one_row_of_all_their_runs():
    fast, slow = (result_of(level + 0.1 * NOISE[:100]) for level in (1.0, 1.03))
    clock = merged([fast, slow])["compute_ms"]
    assert clock["runs"] == len(clock["samples"]) == 200
    assert fast["compute_ms"]["p50"] < clock["p50"] < slow["compute_ms"]["p50"]
    assert clock["warmup"] == {"runs": 60, "settled": True}
    assert (clock["process_medians"], clock["unstable"]) == (
        [fast["compute_ms"]["p50"], slow["compute_ms"]["p50"]],
        [],
    )


def test_processes_that_differ_are_unstable_though_each_is_steady():
    results = [result_of(level + 0.1 * NOISE[:100]) for level in (1.0, 1.0, 1.2)]
    assert not any(result["compute_ms"]["unstable"] for result in results)
    assert merged(results)["end_to_end_ms"]["unstable"] == ["medians of the processes 20% apart"]


def test_a_row_is_as_right_as_its_worst_process_and_as_large_as_its_largest():
    good, wrong = (measured(ROW, 1.0, in_common=share) for share in (0.999, 0.9))
    shifted = measured(ROW, 1.0, in_common=1.0)
    shifted["parity"] |= {"passed": False}
    assert merged([good, shifted])["parity"] == shifted["parity"]
    large = measured(ROW, 1.0, mib=900.0) | {"problems": ["part of the model ran on the CPU"]}
    assert merged([good, wrong])["parity"] == wrong["parity"]
    assert not merged([good, wrong])["ranked"]
    assert merged([good, large])["memory"]["process_mib"] == 900.0
    assert not merged([good, large])["ranked"]


def test_throughput_and_start_are_of_all_processes():
    first, second = measured(ROW, 2.0), measured(ROW, 4.0) | {"load_s": 1.5, "first_run_s": 2.5}
    for result, ms in ((first, 2.0), (second, 4.0)):
        result["compute_ms"] = clock_statistics(
            [Sample(ms, ms)] * 10, {"runs": 30, "settled": ms > 3}, period=1
        )
        result["images_per_second"] = {"compute": 1000 / ms, "end_to_end": 1.0}
    both = merged([first, second])
    assert both["images_per_second"]["compute"] == pytest.approx(1000 / 3)
    assert (both["load_s"], both["first_run_s"]) == (1.0, 2.0)
    assert both["compute_ms"]["warmup"] == {"runs": 60, "settled": False}


def test_each_image_and_each_range_of_the_clocks_is_of_all_processes():
    def result(ms, lowest):
        image = {"image": "a.png", "compute_ms": ms, "end_to_end_ms": None, "keypoints": 7}
        seen = {"sm_mhz": [lowest, 1980], "temperature_c": None, "held_down_by": ["power"]}
        return measured(ROW, ms) | {"per_image": [image], "clocks_seen": seen}

    both = merged([result(1.0, 1700), result(3.0, 1500)])
    assert both["per_image"] == [
        {"image": "a.png", "compute_ms": 2.0, "end_to_end_ms": None, "keypoints": 7}
    ]
    assert both["clocks_seen"] == {
        "sm_mhz": [1500, 1980],
        "temperature_c": None,
        "held_down_by": ["power"],
    }


def test_work_that_the_clock_did_not_see_is_noticed():
    assert "outside their stream" in unseen([Sample(0.1, 3.0)] * 10)
    assert unseen([Sample(3.0, 3.05)] * 10) is None


# -- what is run --


@pytest.mark.parametrize(("images", "size", "count"), [(3, 1, 3), (3, 2, 3), (4, 8, 1), (12, 8, 3)])
def test_batches_take_all_images_in_turn(images, size, count):
    batches = Batches([np.full((5, 6, 3), i, np.uint8) for i in range(images)], size)
    assert batches.count == count
    runs = [batches[index] for index in range(2 * count)]
    assert all(batch.shape == (size, 5, 6, 3) for batch in runs)
    order = [int(image[0, 0, 0]) for batch in runs for image in batch]
    assert order == [i % images for i in range(len(order))]


def grid(**changes) -> Grid:
    """A small grid."""
    defaults = {
        "backends": ["pytorch", "onnxruntime-cpu", "tensorrt"],
        "models": ["aliked-t16", "aliked-n16"],
        "top_ks": [500, 1000],
        "precisions": ["fp32", "fp16"],
        "batches": [1],
    }
    return Grid(**(defaults | changes))


IMAGES = ImageSet("photos", (Path("a.png"),), 64, 48, "ab" * 32)


def test_every_combination_is_a_row_in_an_order_that_the_seed_decides():
    rows = grid().rows([IMAGES], "cuda:0", seed=1)
    assert len(rows) == len(set(rows)) == 24
    assert rows == grid().rows([IMAGES], "cuda:0", seed=1)
    assert rows != grid().rows([IMAGES], "cuda:0", seed=2)
    assert set(rows) == set(grid().rows([IMAGES], "cuda:0", seed=2))


def test_a_name_that_says_where_it_runs_decides_the_device():
    on_gpu = {row.backend: row.device for row in grid().rows([IMAGES], "cuda:0", seed=0)}
    assert on_gpu == {"pytorch": "cuda", "onnxruntime-cpu": "cpu", "tensorrt": "cuda"}
    on_cpu = {row.backend: row.device for row in grid().rows([IMAGES], "cpu", seed=0)}
    assert on_cpu == {"pytorch": "cpu", "onnxruntime-cpu": "cpu", "tensorrt": "cuda"}


# -- one row, in this process --


@pytest.fixture
def measured_here(monkeypatch):
    """Measures a row of a fake backend beside the reference that it should agree with."""

    def measure_row(row=ROW, **options) -> dict:
        backend = FakeBackend(**options)
        monkeypatch.setattr(subjects, "create_extractor", lambda name, spec: backend.create(spec))
        random = np.random.default_rng(0)
        shape = (row.height, row.width, 3)
        images = {f"{i}.png": random.integers(0, 256, shape, np.uint8) for i in range(3)}
        reference = {
            name: Expected(features_of(image, row.top_k), NO_TIES) for name, image in images.items()
        }
        limits = Limits(repeats=12, warmup=5, max_seconds=5)
        spec = row.spec("cpu", None, None)
        subject = functools.partial(ExtractorSubject, row, spec, images, reference)
        return measure.measure(subject, spec, limits, silent)

    return measure_row


def test_a_row_has_both_clocks_memory_and_parity(measured_here):
    result = measured_here()
    assert result["compute_ms"]["runs"] == result["end_to_end_ms"]["runs"] == 12
    assert 0 < result["compute_ms"]["min"] <= result["compute_ms"]["p50"]
    assert result["memory"]["process_mib"] > 10  # Python and NumPy alone take that
    assert result["parity"]["passed"] and result["parity"]["keypoints_in_common"] == 1
    assert result["ranked"]
    assert [entry["keypoints"] for entry in result["per_image"]] == [ROW.top_k] * 3
    assert all(entry["compute_ms"] > 0 for entry in result["per_image"])


def test_the_throughput_of_a_batch_counts_its_images(measured_here):
    result = measured_here(replace(ROW, batch=2))
    mean = result["compute_ms"]["mean"]
    assert result["images_per_second"]["compute"] == pytest.approx(2000 / mean)
    assert result["parity"]["compared"] == 2 * 2 * 3  # both clocks, three batches of two


def test_a_wrong_answer_is_measured_but_not_ranked(measured_here):
    result = measured_here(shift_px=0.01)
    assert not result["parity"]["passed"] and not result["ranked"]
    assert "max |dxy|" in result["parity"]["reasons"][0]


def test_each_precision_has_its_tolerance(measured_here):
    assert measured_here(replace(ROW, precision="fp16"), shift_px=0.01)["ranked"]


def test_another_number_of_keypoints_is_another_measurement(measured_here):
    with pytest.raises(WrongAnswer, match="1000 keypoints was asked for"):
        measured_here(keypoints=2000)


def test_a_gpu_row_that_runs_on_the_cpu_is_found_out(measured_here):
    with pytest.raises(WrongAnswer, match="runs on cpu"):
        measured_here(replace(ROW, device="cuda"), device="cpu")


# -- processes --


class FakePairs(PairRuntime):
    """LightGlue without a network: each image's keypoints match those of the same number."""

    name, device = "fake", "cpu"

    def __init__(self, matched: int):
        self.matched = matched

    def __call__(self, inputs):
        count = inputs["mask0"].shape[1]
        matches = np.where(np.arange(count) < self.matched, np.arange(count), -1)
        return {"matches0": matches[None], "scores0": np.full((1, count), 0.5, np.float32)}

    def to_device(self, inputs):
        return inputs

    def infer(self, batch):
        time.sleep(1e-4)
        return {name: FakeTensor(rows) for name, rows in self(batch).items()}

    def synchronize(self):
        pass


@pytest.fixture
def pair_measured_here(monkeypatch):
    """Measures LightGlue alone, faked, beside the first 100 keypoints matched in their order."""

    def measure_row(matched: int) -> dict:
        row = replace(ROW, graph="matcher")
        monkeypatch.setattr(subjects, "create_pair_runtime", lambda *_: FakePairs(matched))
        images = {f"{i}.png": np.full((row.height, row.width, 3), i, np.uint8) for i in range(3)}
        reference = {
            name: Expected(features_of(image, row.top_k), NO_TIES) for name, image in images.items()
        }
        order = np.arange(100)
        expected = [Matches(np.stack([order, order], 1), np.full(100, 0.5, np.float32))] * 2
        spec = row.spec("cpu", None, None)
        subject = functools.partial(PairSubject, row, spec, images, reference, expected, None)
        return measure.measure(subject, spec, Limits(repeats=12, warmup=5, max_seconds=5), silent)

    return measure_row


def test_a_row_of_lightglue_is_of_each_image_with_the_next(pair_measured_here):
    result = pair_measured_here(matched=100)
    assert result["ranked"] and result["matches"] == 100
    assert result["parity"]["matches_in_common"] == 1
    assert result["parity"]["compared"] == 2 * 2  # both clocks, two pairs of three images
    mean = result["compute_ms"]["mean"]
    assert result["images_per_second"]["compute"] == pytest.approx(2000 / mean)
    msgspec.convert(result["parity"], Agreement)


def test_wrong_matches_are_measured_but_not_ranked(pair_measured_here):
    result = pair_measured_here(matched=90)
    assert not result["ranked"] and result["parity"]["matches_in_common"] == 0.9
    assert "10 matches lost" in result["parity"]["reasons"][0]


def test_what_a_task_returns_comes_back():
    facts = process.run_task(Describe("cpu", ("pytorch",)))
    assert facts["device"] == "cpu"
    assert facts["unavailable"] == {"pytorch": None}
    assert facts["versions"]["torch"]


def test_bad_input_in_a_task_is_expected():
    with pytest.raises(process.TaskFailed, match="unknown device") as caught:
        process.run_task(Describe("toaster", ()))
    assert caught.value.expected


LOADED = """
import ctypes, importlib, os, sys, threading
from benchmark import process
for name in [*process.IMPORTED, *process.IMPORTED_FOR_A_GPU]:
    importlib.import_module(name)
import torch
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
children = f"/proc/self/task/{os.getpid()}/children"
from aliked import gpu
if gpu.driver():
    status = ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int()))
    assert status == 3, "not CUDA_ERROR_NOT_INITIALIZED: the driver is in use"
assert not os.path.exists(children) or open(children).read() == "", "a process was started"
"""


def test_what_workers_find_imported_has_started_nothing():
    """A fork has none of its parent's threads, and cannot use CUDA where its parent has."""
    subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, check=True)


def test_only_workers_for_a_gpu_find_imported_what_runs_there(monkeypatch):
    monkeypatch.setattr(process.gpu, "driver", lambda: None)
    assert process.imported_once("auto") == list(process.IMPORTED)
    monkeypatch.setattr(process.gpu, "driver", object)
    assert process.imported_once("cpu") == list(process.IMPORTED)
    assert "aliked.model" in process.imported_once("cuda:0")


@pytest.mark.parametrize(("peak", "mib"), [("VmHWM:\t  2048 kB\n", 2.0), ("", None)])
def test_a_system_that_does_not_tell_the_peak_of_memory_has_none(peak, mib, tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\n{peak}VmRSS:\t  1024 kB\n")
    monkeypatch.setattr(environment, "Path", lambda name: status)
    monkeypatch.setattr(environment.sys, "platform", "linux")
    assert environment.host_peak_mib() == mib


@dataclasses.dataclass
class Dying:
    """A task whose process ends before it does."""

    device: str = "cpu"

    def run(self, progress):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        os.write(2, b"illegal memory access\n")
        os.kill(os.getpid(), signal.SIGSEGV)


@dataclasses.dataclass
class Working:
    """A task that says how far it is."""

    name: str
    device: str = "cpu"

    def run(self, progress):
        progress("timing", 3, 9)
        return self.name


def test_a_process_that_dies_says_how():
    pattern = r"SIGSEGV.*last words: illegal memory access; it was in File .* in run"
    with pytest.raises(process.TaskFailed, match=pattern) as caught:
        process.run_task(Dying())
    assert not caught.value.expected


def _not_found_there(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}")


class Unreadable(Working):
    """A task that the new process cannot make again."""

    def __reduce__(self):
        return _not_found_there, (self.name,)


def test_a_process_that_cannot_read_its_task_says_how_it_ended():
    with pytest.raises(process.TaskFailed, match="the process ended with status 1"):
        process.run_task(Unreadable("row"))


def test_progress_is_passed_on():
    seen = []
    result = process.run_task(Working("row"), lambda *stage: seen.append(stage))
    assert (result, seen) == ("row", [("timing", 3, 9)])


def test_what_was_compiled_once_is_not_compiled_again(tmp_path, monkeypatch):
    """Nor does what failed count as compiled."""
    asked = []

    def run_here(tasks, jobs, done, cache):
        asked.append([task.row.backend for task in tasks])
        for task in tasks:
            if task.row.backend == "pytorch-compile":  # the other fails
                task.run(silent)

    paths = tuple(sorted((ROOT / "assets" / "sequence_640x480").glob("*.jpg"))[:1])
    images = [ImageSet(ROW.image_set, paths, 640, 480, "")]
    run = runner.Run("cpu", {}, {}, {}, images, Limits(), compiler_cache=tmp_path)
    row = replace(ROW, model="aliked-t16-homography", top_k=20)
    rows = [replace(row, backend=name) for name in ("pytorch", "pytorch-compile", "fused")]
    monkeypatch.setattr(artifacts, "create_extractor", lambda _, spec: FakeBackend().create(spec))
    monkeypatch.setattr(runner, "run_tasks", run_here)
    for _ in range(2):
        runner.fill_compiler_cache(run, rows, jobs=1)
    assert asked == [["pytorch-compile", "fused"], ["fused"]]
    other = dataclasses.replace(run, versions={"torch": "3.0"})
    runner.fill_compiler_cache(other, rows, jobs=1)
    assert asked[-1] == ["pytorch-compile", "fused"]


# -- memory of a process --


class FakeGpu:
    """A GPU whose processes change from one look to the next."""

    def __init__(self, *processes: dict, in_use: tuple[int, ...] = (1000, 1700)):
        self.processes, self.in_use = list(processes), list(in_use)

    def memory_by_process(self) -> dict:
        """The next state."""
        return self.processes.pop(0)

    def memory_in_use(self) -> int:
        """The next state."""
        return self.in_use.pop(0)


def test_memory_is_that_of_this_process(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 42)
    assert ProcessMemory(FakeGpu({7: 900}, {7: 900, 8: 300, 42: 500})).read() == (500, "process")


def test_in_a_container_the_new_process_is_this_one(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 42)
    assert ProcessMemory(FakeGpu({7: 900}, {7: 900, 31337: 500})).read() == (500, "process")


@pytest.mark.parametrize("after", [{}, {42: None}, {8: 300, 9: 400}])
def test_where_no_process_can_be_told_apart_the_difference_is_said_to_be_one(monkeypatch, after):
    monkeypatch.setattr("os.getpid", lambda: 1)
    assert ProcessMemory(FakeGpu({}, after)).read() == (700, "difference")


@pytest.mark.parametrize(("jobs", "threads"), [(1, 8), (3, 2), (16, 1)])
def test_files_made_at_a_time_share_the_processor(monkeypatch, tmp_path, jobs, threads):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(artifacts, "build_model_file", lambda spec, shape, path: None)
    monkeypatch.setattr(artifacts, "run_tasks", lambda tasks, *_: [t.run(None) for t in tasks])
    path = tmp_path / "model.onnx"
    artifacts.build_files([artifacts.BuildFile(Spec("aliked-t16"), (1, 64, 64), path)], jobs)
    assert given == [threads]
