"""Running engines, over the stand-in: results, shapes, batches, graphs, and every refusal."""

import copy
import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aliked import threads
from aliked.backends import BACKENDS, Spec, create_extractor
from aliked.backends.cuda_memory import TorchMemory
from aliked.backends.onnxruntime import ONNXRuntimeExtractor
from aliked.backends.tensorrt import (
    MANIFEST_TYPES,
    TensorRTExtractor,
    manifest_path,
    mismatch,
    read_manifest,
    runtime_config,
)
from aliked.backends.tensorrt_library import (
    LEAN,
    TENSORRT,
    TF32_OVERRIDE,
    tf32_is_off,
    tf32_settled,
)
from aliked.errors import InputError
from aliked.export.builder import BuildOptions
from aliked.export.engine import Request, convert
from aliked.files import sha256
from aliked.gpu import Device
from tests.helpers.damage import HOW, JSON, QUICKLY, changed, places
from tests.helpers.fake_tensorrt import RTX_VERSION, VERSIONS, Machine
from tests.helpers.fake_tensorrt.builder import pack
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.fake_tensorrt.pycuda import make_pycuda
from tests.helpers.fake_tensorrt.runtime import CompiledEngine, IRuntimeCache
from tests.helpers.small_models import write_small_model

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((1, 3, 32, 32), (1, 3, 48, 64), (3, 3, 64, 96))


def photograph(height=48, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def features_in_onnxruntime(path, image):
    return ONNXRuntimeExtractor(Spec("aliked-t16", top_k=20, model_path=path))(image)


def assert_same(features, expected):
    """Bit for bit: both are ONNX Runtime on the same file, on the CPU."""
    assert len(expected) > 0
    np.testing.assert_array_equal(features.keypoints, expected.keypoints)
    np.testing.assert_array_equal(features.scores, expected.scores)
    np.testing.assert_array_equal(features.descriptors, expected.descriptors)


@pytest.fixture(params=VERSIONS)
def machine(request, monkeypatch):
    machine = install(monkeypatch, request.param)
    machine.version = request.param
    return machine


@pytest.fixture
def make_engine(tmp_path, machine):
    """Build an engine of a small model, without verification; its ONNX file and its own."""

    def make(shapes=None, options=None, **model):
        onnx_path, engine = tmp_path / "model.onnx", tmp_path / "model.trt"
        write_small_model(onnx_path, dynamic=shapes is not None, **model)
        request = Request(
            onnx_path,
            engine,
            BuildOptions(**(options or {})),
            builder="tensorrt",
            shapes=shapes or (None,) * 3,
            verify=False,
        )
        assert convert(request)
        return onnx_path, engine

    return make


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("model", [{}, {"uint8": True}, {"half": True}, {"deform": True}])
def test_features_are_those_of_the_file(make_engine, model, cuda_graph):
    onnx_path, engine = make_engine(**model)
    extractor = TensorRTExtractor(engine, cuda_graph=cuda_graph)
    for seed in range(3):
        image = photograph(seed=seed)
        assert_same(extractor(image), features_in_onnxruntime(onnx_path, image))


def test_an_inspected_engine_runs_as_fast_as_another(make_engine):
    _, engine = make_engine(options={"detailed": True})
    context = TensorRTExtractor(engine).engine.context
    assert context.nvtx_verbosity.name == "LAYER_NAMES_ONLY"


def test_an_engine_with_deform_conv_loads_in_a_new_process(make_engine, machine):
    _, engine = make_engine(deform=True)
    machine.plugins_registered = False
    assert len(TensorRTExtractor(engine)(photograph())) == 20


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_dynamic_engine_follows_the_image_size(make_engine, cuda_graph):
    onnx_path, engine = make_engine(SHAPES)
    extractor = TensorRTExtractor(engine, cuda_graph=cuda_graph)
    for size in ((48, 64), (32, 96), (48, 64), (48, 64), (33, 47)):
        image = photograph(*size)
        assert_same(extractor(image), features_in_onnxruntime(onnx_path, image))


@pytest.mark.parametrize("part_bytes", [1, 1 << 40])  # copied by several threads, or by one
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_batch_gives_each_image_its_own_features(
    make_engine, monkeypatch, part_bytes, cuda_graph
):
    monkeypatch.setattr(threads, "PART_BYTES", part_bytes)
    onnx_path, engine = make_engine(SHAPES)
    extractor = TensorRTExtractor(engine, cuda_graph=cuda_graph)
    images = np.stack([photograph(seed=seed) for seed in range(3)])
    for batch in (images, images[:, ::-1], images[1:2]):  # a view, and a single image
        for image, features in zip(batch, extractor.extract_batch(batch), strict=True):
            assert_same(features, features_in_onnxruntime(onnx_path, image))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_batches_on_the_device_do_not_disturb_each_other(make_engine, cuda_graph):
    onnx_path, engine = make_engine()
    extractor = TensorRTExtractor(engine, cuda_graph=cuda_graph)
    images = [photograph(seed=seed) for seed in range(2)]
    batches = [extractor.to_device(image[None]) for image in images]
    for image, batch in zip(images, batches, strict=True):
        for _ in range(2):
            result = extractor.infer(batch)
            extractor.synchronize()
        expected = features_in_onnxruntime(onnx_path, image)
        assert set(result) == {"keypoints", "descriptors", "scores"}
        np.testing.assert_array_equal(result["keypoints"].numpy()[0], expected.keypoints)
        np.testing.assert_array_equal(result["descriptors"].numpy()[0], expected.descriptors)


def test_what_a_batch_holds_now_is_read_however_often_it_was_passed(make_engine, monkeypatch):
    """Graphs that read a batch where it lies are recorded for a few addresses, and given up."""
    monkeypatch.setattr("aliked.backends.tensorrt.DIRECT", 2)
    monkeypatch.setattr("aliked.backends.tensorrt.PATIENCE", 3)
    onnx_path, engine = make_engine()
    extractor = TensorRTExtractor(engine, cuda_graph=True)
    batches = [extractor.to_device(photograph()[None]) for _ in range(4)]
    graphs = set()
    for turn in range(5):
        for number, batch in enumerate(batches):
            image = photograph(seed=4 * turn + number)
            batch.data[...] = extractor.to_device(image[None]).data
            result = extractor.infer(batch)
            extractor.synchronize()
            expected = features_in_onnxruntime(onnx_path, image)
            np.testing.assert_array_equal(result["keypoints"].numpy()[0], expected.keypoints)
            graphs.update(extractor.engine._direct)
            assert len(extractor.engine._direct) <= 2
    assert len(graphs) > 2


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_batch_at_an_odd_address_is_moved_to_where_tensorrt_takes_it(make_engine, cuda_graph):
    onnx_path, engine = make_engine()
    extractor = TensorRTExtractor(engine, cuda_graph=cuda_graph)
    aligned = extractor.to_device(photograph()[None])
    memory = extractor.engine.memory
    with memory.active():
        room = memory.empty((aligned.data.size + 4,), np.uint8)
    odd = copy.copy(aligned)
    odd.address, odd.room = room.address + 4, room
    room.data[4:] = aligned.data
    for _ in range(3):
        scores = extractor.infer(odd)["scores"]
        extractor.synchronize()
    expected = features_in_onnxruntime(onnx_path, photograph())
    np.testing.assert_array_equal(scores.numpy()[0], expected.scores)


def test_graphs_of_addresses_go_with_the_size_and_a_batch_lives_until_it_is_read(make_engine):
    onnx_path, engine = make_engine(SHAPES)
    extractor = TensorRTExtractor(engine, cuda_graph=True)
    for size in ((48, 64), (32, 96), (48, 64)):
        image = photograph(*size)
        batch = extractor.to_device(image[None])
        for _ in range(3):
            extractor.infer(batch)
        assert len(extractor.engine._direct) == 1
        scores = extractor.infer(extractor.to_device(image[None]))["scores"]  # nobody else has it
        extractor.synchronize()
        expected = features_in_onnxruntime(onnx_path, image)
        np.testing.assert_array_equal(scores.numpy()[0], expected.scores)


def test_top_k_keeps_the_best_and_cannot_exceed_the_engine(make_engine):
    _, engine = make_engine(top_k=20)
    all_of_them = TensorRTExtractor(engine)(photograph())
    best = TensorRTExtractor(engine, top_k=5)(photograph())
    np.testing.assert_array_equal(best.keypoints, all_of_them.keypoints[:5])
    with pytest.raises(InputError, match=r"top_k 21 was asked for, but .* gives 20 keypoints"):
        TensorRTExtractor(engine, top_k=21)


def test_pycuda_gives_the_same_features(make_engine, machine, monkeypatch):
    onnx_path, engine = make_engine(SHAPES)
    for name, module in make_pycuda(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    for cuda_graph in (False, True):
        extractor = TensorRTExtractor(engine, memory="pycuda", cuda_graph=cuda_graph)
        image = photograph()
        expected = features_in_onnxruntime(onnx_path, image)
        assert_same(extractor(image), expected)
        result = extractor.infer(extractor.to_device(image[None]))
        extractor.synchronize()
        np.testing.assert_array_equal(result["scores"].numpy()[0], expected.scores)
    machine.free_bytes = 0
    with pytest.raises(InputError, match="out of device memory"):
        extractor(photograph(32, 32))
    assert machine.current == 0  # every context was popped


def test_the_backend_is_made_from_a_spec(make_engine):
    _, engine = make_engine()
    extractor = create_extractor("tensorrt", Spec("aliked-t16", model_path=engine, top_k=10))
    assert extractor.name == "tensorrt"
    assert len(extractor(photograph())) == 10
    with pytest.raises(InputError, match="--model_path"):
        create_extractor("tensorrt", Spec())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (Spec("aliked-n32"), "holds aliked-t16, not aliked-n32; pass --model aliked-t16"),
        (Spec("aliked-t16", top_k=0), "not exported for --top_k 0 --scores_th 0.2"),
    ],
)
def test_an_engine_of_something_else_is_refused(make_engine, spec, says):
    _, engine = make_engine()
    with pytest.raises(InputError, match=says):
        create_extractor("tensorrt", replace(spec, model_path=engine))


def test_an_engine_with_a_threshold_runs_for_that_selection_only(make_engine):
    selection = {"top_k": 0, "scores_th": 0.1, "n_limit": 20, "strict": True}
    _, engine = make_engine(metadata=selection)
    spec = Spec("aliked-t16", **selection, model_path=engine)
    assert len(create_extractor("tensorrt", spec)(photograph())) > 0
    for other in ({"scores_th": 0.2}, {"n_limit": 10}, {"strict": False}, {"top_k": 5}):
        with pytest.raises(InputError, match="was not exported for --top_k"):
            create_extractor("tensorrt", replace(spec, **other))


def test_the_variants_of_the_backend_run_the_same_engine(make_engine, machine, monkeypatch):
    onnx_path, engine = make_engine(options={"version_compatible": True})
    for name, module in make_pycuda(machine).items():
        monkeypatch.setitem(sys.modules, name, module)
    for variant in ("cudagraph", "pycuda", "lean"):
        name = f"tensorrt-{variant}"
        assert BACKENDS[name].unavailable() is None
        extractor = create_extractor(name, Spec("aliked-t16", model_path=engine, top_k=20))
        assert extractor.name == name
        assert_same(extractor(photograph()), features_in_onnxruntime(onnx_path, photograph()))
    monkeypatch.setitem(sys.modules, "pycuda", None)
    assert "pycuda" in BACKENDS["tensorrt-pycuda"].unavailable()


# refusals


def test_images_outside_the_profile_are_refused_and_the_next_one_runs(make_engine):
    onnx_path, engine = make_engine(SHAPES)
    extractor = TensorRTExtractor(engine)
    for size in ((31, 64), (48, 97)):
        with pytest.raises(InputError, match=r"takes \[1, 3, 32, 32\] to \[3, 3, 64, 96\]"):
            extractor(photograph(*size))
    with pytest.raises(InputError, match="the input is"):
        extractor.extract_batch(np.stack([photograph()] * 4))
    assert_same(extractor(photograph()), features_in_onnxruntime(onnx_path, photograph()))


def test_images_of_another_size_than_a_static_engines_are_refused(make_engine):
    _, engine = make_engine()
    with pytest.raises(InputError, match=r"takes \[1, 3, 48, 64\]"):
        TensorRTExtractor(engine)(photograph(64, 64))


def test_images_that_are_no_rgb_bytes_are_refused(make_engine):
    _, engine = make_engine()
    with pytest.raises(InputError, match="uint8"):
        TensorRTExtractor(engine)(photograph().astype(np.float32))


@pytest.mark.parametrize(
    ("oddity", "says"),
    [
        ("open", "the size of scores in .* depends on the data"),
        ("host", "wants scores in host memory"),
        ("bf16", "scores of .* is BF16"),
    ],
)
def test_engines_whose_outputs_cannot_be_run_here_are_refused(make_engine, machine, oddity, says):
    _, engine = make_engine()
    machine.odd_tensors["scores"] = oddity
    with pytest.raises(InputError, match=says):
        TensorRTExtractor(engine)(photograph())


def test_an_engine_of_another_contract_is_refused(make_engine, monkeypatch):
    monkeypatch.setattr("aliked.export.engine.OUTPUTS", ("scores",))
    _, engine = make_engine(outputs=("keypoints", "scores"))
    with pytest.raises(InputError, match=r"outputs \['keypoints', 'scores'\], not image and"):
        TensorRTExtractor(engine)


def test_a_batch_from_elsewhere_is_refused(make_engine):
    _, engine = make_engine()
    with pytest.raises(InputError, match="to_device"):
        TensorRTExtractor(engine).infer(photograph()[None])


def test_an_engine_of_another_version_is_refused(make_engine, monkeypatch, machine):
    _, engine = make_engine()
    (other,) = set(VERSIONS) - {machine.version}
    install(monkeypatch, other)
    with pytest.raises(InputError, match=f"built by TensorRT {VERSIONS[machine.version]}"):
        TensorRTExtractor(engine)


@pytest.mark.parametrize("gpu", [("Stand-in RTX Mobile", 8, 6), ("Stand-in RTX", 9, 0)])
def test_an_engine_of_another_gpu_is_refused(make_engine, machine, gpu):
    _, engine = make_engine()
    machine.gpus[0] = gpu
    with pytest.raises(InputError, match=r"built on a Stand-in RTX \(8\.6\)"):
        TensorRTExtractor(engine)


def test_hardware_compatible_engines_run_from_ampere_on(make_engine, machine):
    _, engine = make_engine(options={"hardware_compatible": True})
    machine.gpus[0] = ("Another RTX", 12, 0)
    assert len(TensorRTExtractor(engine)(photograph())) == 20
    machine.gpus[0] = ("Old GTX", 7, 5)
    with pytest.raises(InputError, match=r"compute capability 8\.0"):
        TensorRTExtractor(engine)


def test_version_compatible_engines_run_on_newer_versions_only(make_engine, monkeypatch, machine):
    _, engine = make_engine(options={"version_compatible": True})
    (other,) = set(VERSIONS) - {machine.version}
    install(monkeypatch, other)
    if other == "11.4":
        assert len(TensorRTExtractor(engine)(photograph())) == 20
    else:
        with pytest.raises(InputError, match="does not read it"):
            TensorRTExtractor(engine)


def test_the_lean_runtime_runs_version_compatible_engines_only(make_engine):
    _, engine = make_engine()
    with pytest.raises(InputError, match="--version_compatible"):
        TensorRTExtractor(engine, library="tensorrt-lean")
    onnx_path, engine = make_engine(options={"version_compatible": True})
    features = TensorRTExtractor(engine, library="tensorrt-lean")(photograph())
    assert_same(features, features_in_onnxruntime(onnx_path, photograph()))


@pytest.mark.parametrize("change", ["cut", "empty", "other"])
def test_a_damaged_engine_is_refused_before_tensorrt_sees_it(make_engine, change):
    _, engine = make_engine()
    data = {"cut": engine.read_bytes()[:-7], "empty": b"", "other": b"plan{}"}[change]
    engine.write_bytes(data)
    with pytest.raises(InputError, match="truncated"):
        TensorRTExtractor(engine)


def test_an_engine_that_tensorrt_cannot_load_is_refused_in_its_words(make_engine, machine):
    _, engine = make_engine()
    manifest = engine.with_name("model.trt.json")
    facts = json.loads(manifest.read_text())
    facts["gpu"] = {"name": "New RTX", "compute_capability": "9.0"}
    manifest.write_text(json.dumps(facts))
    machine.gpus[0] = ("New RTX", 9, 0)
    with pytest.raises(InputError, match="the engine was built for another device"):
        TensorRTExtractor(engine)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing"),
        ("{", "is damaged"),
        ("{}", "is not the manifest"),
        ("[]", "is not the"),
    ],
)
def test_an_engine_without_its_manifest_is_refused(make_engine, text, says):
    _, engine = make_engine()
    manifest = engine.with_name("model.trt.json")
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(InputError, match=says):
        TensorRTExtractor(engine)


def test_a_missing_engine_is_refused(machine, tmp_path):
    with pytest.raises(InputError, match=r"absent\.trt does not exist"):
        TensorRTExtractor(tmp_path / "absent.trt")


def test_no_room_for_the_buffers_names_workspace_and_batch(make_engine, machine):
    _, engine = make_engine(SHAPES, options={"max_workspace_size_mib": 64})
    extractor = TensorRTExtractor(engine)
    machine.free_bytes = 1000
    with pytest.raises(InputError, match=r"workspace of 64 MiB and is to run a batch of 2"):
        extractor.extract_batch(np.stack([photograph()] * 2))
    machine.free_bytes = 2**30
    assert len(extractor(photograph())) == 20


def test_no_room_for_the_context_names_workspace_and_batch(make_engine, machine):
    _, engine = make_engine(SHAPES)
    machine.free_bytes = 0
    with pytest.raises(InputError, match="no limit on its workspace and is to run a batch of 3"):
        TensorRTExtractor(engine)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("CUDA error: out of memory", "out of device memory"),
        ("misaligned", "refuses the execution"),
    ],
)
def test_a_failing_execution_is_reported_and_the_next_one_runs(make_engine, machine, error, says):
    _, engine = make_engine()
    extractor = TensorRTExtractor(engine)
    machine.execution_error = error
    with pytest.raises(InputError, match=says):
        extractor(photograph())
    machine.execution_error = ""
    assert len(extractor(photograph())) == 20


def test_work_that_cannot_be_recorded_is_reported(make_engine, machine):
    _, engine = make_engine()
    machine.capturable = False
    with pytest.raises(InputError, match="cannot be recorded as a CUDA graph"):
        TensorRTExtractor(engine, cuda_graph=True)(photograph())


def test_no_gpu_and_no_driver_are_one_sentence_each(make_engine, machine, monkeypatch, tmp_path):
    _, engine = make_engine()
    machine.gpus.clear()
    with pytest.raises(InputError, match="no CUDA device"):
        TensorRTExtractor(engine)
    monkeypatch.setattr("aliked.gpu.driver", lambda: None)
    with pytest.raises(InputError, match="no NVIDIA driver"):
        TensorRTExtractor(engine)


@pytest.mark.parametrize(
    ("device", "says"), [("cpu", "is no CUDA device"), ("cuda:1", "there are 1 CUDA devices")]
)
def test_devices_that_are_not_there_are_refused(make_engine, device, says):
    _, engine = make_engine()
    with pytest.raises(InputError, match=says):
        TensorRTExtractor(engine, device=device)


def test_without_the_package_the_sentence_says_what_to_install(monkeypatch):
    install(monkeypatch, "11.4", Machine())
    assert TENSORRT.unavailable() is None
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed" in TENSORRT.unavailable()
    monkeypatch.setitem(sys.modules, "tensorrt_lean", None)
    assert "tensorrt_lean is not installed" in LEAN.unavailable()


def test_the_backend_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import aliked.backends.tensorrt, aliked.images\n"
        "from aliked.backends import Spec, get_backend\n"
        "assert get_backend.__module__ == 'aliked.backends'\n"
        "assert 'tensorrt' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# TensorRT for RTX


@pytest.fixture
def rtx(monkeypatch):
    """A machine with TensorRT for RTX; call it again for another version or machine."""

    def install_rtx(version=RTX_VERSION, machine=None):
        return install(monkeypatch, "11.4", machine, rtx=version)

    return install_rtx


def write_rtx_engine(folder, version=RTX_VERSION, targets=(), verified=None, tf32=True, **model):
    """An engine of the stand-in with the manifest of one by TensorRT for RTX."""
    onnx_path, engine = folder / "model.onnx", folder / "model.trt"
    write_small_model(onnx_path, **model)
    header = {"version": version, "version_compatible": False, "detailed": False}
    engine.write_bytes(pack(onnx_path, **header, profiles=[]))
    manifest = {
        "sha256": sha256(engine),
        "library": "tensorrt-rtx",
        "version": version,
        "gpu": None,
        "precision": "FP32",
        **asdict(BuildOptions(compute_capabilities=targets, tf32=tf32)),
        "source": {"export": {"model": "aliked-t16", "top_k": 20}},
        "verified": verified,
        "verify_with": "python convert_onnx_to_trt.py --verify model.trt",
    }
    engine.with_name("model.trt.json").write_text(json.dumps(manifest))
    return onnx_path, engine


def open_rtx(engine, name="tensorrt-rtx"):
    return create_extractor(name, Spec("aliked-t16", top_k=20, model_path=engine))


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt-rtx-cudagraph"])
def test_an_engine_of_tensorrt_for_rtx_gives_the_features_of_its_file(rtx, tmp_path, name):
    rtx()
    onnx_path, engine = write_rtx_engine(tmp_path)
    extractor = open_rtx(engine, name)
    assert extractor.name == name
    for seed in range(2):
        image = photograph(seed=seed)
        assert_same(extractor(image), features_in_onnxruntime(onnx_path, image))
    assert len(TensorRTExtractor(engine)(photograph())) == 20  # the manifest says which library


def test_the_second_load_compiles_nothing(rtx, tmp_path):
    machine = rtx()
    _, engine = write_rtx_engine(tmp_path)
    assert len(open_rtx(engine)(photograph())) == 20
    (cache,) = tmp_path.glob("*.cache")
    assert cache.name == "model.trt.1.6.1.120-Stand-in-RTX.cache"
    written = cache.stat().st_mtime_ns
    assert open_rtx(engine).engine.cache.used
    assert machine.compiled == 1
    assert cache.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "change", ["cut", "empty", "text", "other engine", "other GPU", "folder", "pipe"]
)
def test_a_damaged_or_foreign_runtime_cache_is_made_anew(rtx, tmp_path, change, capsys):
    machine = rtx()
    _, engine = write_rtx_engine(tmp_path)
    open_rtx(engine)
    (cache,) = tmp_path.glob("*.cache")
    whole = cache.read_bytes()
    if change == "folder":
        cache.unlink()
        cache.mkdir()
    elif change == "pipe":  # nobody writes to, so that reading it would wait
        cache.unlink()
        os.mkfifo(cache)
    elif change == "other engine":
        _, engine = write_rtx_engine(tmp_path, top_k=19)
    elif change == "other GPU":
        cache.write_bytes(whole.replace(b"Stand-in RTX", b"Another RTX"))
    else:
        cache.write_bytes({"cut": whole[:-3], "empty": b"", "text": b"hello"}[change])
    capsys.readouterr()
    extractor = TensorRTExtractor(engine)
    assert not extractor.engine.cache.used
    assert len(extractor(photograph())) in (19, 20)
    assert machine.compiled == 2
    assert f"{cache} is damaged or another engine's" in capsys.readouterr().err
    if change != "folder":
        assert TensorRTExtractor(engine).engine.cache.used


def test_a_runtime_cache_that_the_library_refuses_is_said_and_made_anew(
    rtx, tmp_path, monkeypatch, capsys
):
    machine = rtx()
    _, engine = write_rtx_engine(tmp_path)
    open_rtx(engine)
    (cache,) = tmp_path.glob("*.cache")
    with monkeypatch.context() as patch:
        patch.setattr(IRuntimeCache, "deserialize", lambda self, blob: False)
        assert not open_rtx(engine).engine.cache.used
    assert machine.compiled == 2
    assert f"does not take {cache} here: compiling again" in capsys.readouterr().err
    assert open_rtx(engine).engine.cache.used


def test_each_gpu_and_version_has_a_cache_of_its_own(rtx, tmp_path):
    _, engine = write_rtx_engine(tmp_path)
    for name in ("Stand-in RTX", "Another RTX"):
        machine = rtx(machine=Machine(gpus=[(name, 8, 9)]))
        open_rtx(engine)
        assert machine.compiled == 1
    assert len(list(tmp_path.glob("*.cache"))) == 2


def test_a_folder_that_cannot_be_written_costs_only_the_cache(rtx, tmp_path, monkeypatch, capsys):
    rtx()
    _, engine = write_rtx_engine(tmp_path)

    def refuse(path):
        raise InputError(f"cannot write into {path.parent}")

    monkeypatch.setattr("aliked.backends.tensorrt.whole_file", refuse)
    assert len(open_rtx(engine)(photograph())) == 20
    assert "every load compiles the engine again: cannot write" in capsys.readouterr().err
    assert list(tmp_path.glob("*.cache")) == []


def test_only_graphs_wait_for_the_best_kernels_of_a_shape(rtx, tmp_path, monkeypatch):
    rtx()
    _, engine = write_rtx_engine(tmp_path)
    configured = []

    def remember(*arguments):
        configured.append(runtime_config(*arguments))
        return configured[-1]

    monkeypatch.setattr("aliked.backends.tensorrt.runtime_config", remember)
    open_rtx(engine)
    open_rtx(engine, "tensorrt-rtx-cudagraph")
    plain, graph = configured
    assert not hasattr(plain, "dynamic_shapes_kernel_specialization_strategy")
    assert graph.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("outside", [None, "0", "1"])
def test_an_engine_is_compiled_under_the_setting_of_tf32_that_it_was_built_under(
    rtx, tmp_path, monkeypatch, tf32, outside
):
    rtx()
    _, engine = write_rtx_engine(tmp_path, tf32=tf32)
    if outside:
        monkeypatch.setenv(TF32_OVERRIDE, outside)
    seen, create = [], CompiledEngine.create_execution_context

    def noting(*arguments):
        seen.append(tf32_is_off())
        return create(*arguments)

    monkeypatch.setattr(CompiledEngine, "create_execution_context", noting)
    open_rtx(engine)
    assert seen == [not tf32]
    assert tf32_is_off() != tf32  # also where later shapes are compiled


def test_engines_with_and_without_tf32_do_not_share_a_process(rtx, tmp_path):
    rtx()
    _, engine = write_rtx_engine(tmp_path, tf32=True)
    open_rtx(engine)
    _, engine = write_rtx_engine(tmp_path, tf32=False)
    with pytest.raises(InputError, match="run each in a process of its own"):
        open_rtx(engine)
    tf32_settled.cache_clear()
    open_rtx(engine)


def test_an_engine_that_nobody_compared_says_so_once(rtx, tmp_path, capsys):
    rtx()
    _, engine = write_rtx_engine(tmp_path)
    for _ in range(2):
        open_rtx(engine)
    assert capsys.readouterr().err.count("has not been compared with the model yet: python") == 1
    (tmp_path / "verified").mkdir()
    _, engine = write_rtx_engine(tmp_path / "verified", verified={"passed": True})
    open_rtx(engine)
    assert "not been compared" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "targets", "says"),
    [
        (("Turing card", 7, 5), (), "built for compute capability 8.0 and later"),
        (("Ampere card", 8, 6), ("SM75",), "compute capability 7.5 and this is a Ampere card"),
        (("Ampere card", 8, 6), ("SM89", "SM120"), "8.9 and 12.0 .* --compute_capability SM86"),
        (("Hopper card", 9, 0), ("SM89",), "--compute_capability CURRENT on this machine"),
        (("Pascal card", 6, 1), (), "needs compute capability 7.5 or more"),
    ],
)
def test_an_engine_for_other_gpus_is_refused(rtx, tmp_path, gpu, targets, says):
    rtx(machine=Machine(gpus=[gpu]))
    _, engine = write_rtx_engine(tmp_path, targets=targets)
    with pytest.raises(InputError, match=says):
        open_rtx(engine)


def test_an_engine_for_named_gpus_runs_on_them(rtx, tmp_path):
    rtx(machine=Machine(gpus=[("Turing card", 7, 5)]))
    _, engine = write_rtx_engine(tmp_path, targets=("SM75",))
    assert len(open_rtx(engine)(photograph())) == 20


def test_hopper_is_refused_by_the_versions_that_refuse_it(rtx, tmp_path):
    hopper = Machine(gpus=[("NVIDIA H100 80GB HBM3", 9, 0)])
    rtx("1.7.1.116", hopper)
    assert "tensorrt-rtx-cu13==1.6.1.120" in BACKENDS["tensorrt-rtx"].unavailable()
    _, engine = write_rtx_engine(tmp_path, version="1.7.1.116")
    with pytest.raises(InputError, match=r"1\.7\.1\.116 refuses the NVIDIA H100.*1\.6\.1"):
        TensorRTExtractor(engine)
    rtx("1.6.1.120", hopper)
    _, engine = write_rtx_engine(tmp_path)
    assert BACKENDS["tensorrt-rtx"].unavailable() is None
    assert len(open_rtx(engine)(photograph())) == 20


def test_the_libraries_do_not_run_each_others_engines(rtx, make_engine, tmp_path):
    rtx()
    (tmp_path / "rtx").mkdir()
    _, engine = write_rtx_engine(tmp_path / "rtx")
    for backend in ("tensorrt", "tensorrt-lean"):
        with pytest.raises(InputError, match="built by TensorRT for RTX; run it with --backend"):
            open_rtx(engine, backend)
    _, engine = make_engine()
    with pytest.raises(InputError, match="built by TensorRT; run it with --backend tensorrt"):
        open_rtx(engine)


def test_an_engine_of_another_version_of_tensorrt_for_rtx_is_refused(rtx, tmp_path):
    rtx()
    _, engine = write_rtx_engine(tmp_path, version="1.5.0.114")
    with pytest.raises(InputError, match=r"TensorRT for RTX 1\.5\.0\.114 and this is 1\.6\.1"):
        open_rtx(engine)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("library", "tensorflow"),
        ("version", None),
        ("version", "newest"),
        ("precision", "FP64"),
        ("compute_capabilities", ["8.6"]),
        ("gpu", {"name": 3}),
        ("source", {}),
        ("source", {"export": []}),
        ("source", {"export": {"top_k": "20"}}),
        ("source", {"export": {}, "images": 3}),
        ("verified", True),
    ],
)
def test_a_manifest_with_a_wrong_field_is_no_manifest(rtx, tmp_path, field, wrong):
    rtx()
    _, engine = write_rtx_engine(tmp_path)
    manifest = engine.with_name("model.trt.json")
    manifest.write_text(json.dumps(read_manifest(engine) | {field: wrong}))
    with pytest.raises(InputError, match="is not the manifest of an engine"):
        open_rtx(engine)


def test_an_engine_of_other_weights_or_precision_is_refused(rtx, tmp_path):
    rtx()
    _, engine = write_rtx_engine(tmp_path)
    read = read_manifest(engine)
    read["source"]["export"]["weights_sha256"] = "0" * 64
    manifest_path(engine).write_text(json.dumps(read))
    spec = Spec("aliked-t16", top_k=20, model_path=engine)
    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"weights")
    with pytest.raises(InputError, match="was made of other weights than"):
        create_extractor("tensorrt-rtx", replace(spec, weights=mine))
    with pytest.raises(InputError, match="is float32; ask for fp32"):
        create_extractor("tensorrt-rtx", replace(spec, precision="fp16"))


@pytest.fixture(scope="module")
def small_engine(tmp_path_factory):
    """An engine and its manifest, for what looks at the manifest alone."""
    _, engine = write_rtx_engine(tmp_path_factory.mktemp("engine"))
    return engine, read_manifest(engine)


@QUICKLY
@given(st.data())
def test_a_changed_manifest_is_read_or_refused(small_engine, data):
    engine, manifest = small_engine
    place, how = data.draw(st.sampled_from(places(manifest))), data.draw(HOW)
    text = json.dumps(changed(manifest, place, how, data.draw(JSON)))
    manifest_path(engine).write_text(text)
    try:
        read = read_manifest(engine)
    except InputError as error:
        assert manifest_path(engine).name in str(error)
        return
    assert mismatch(read, LEAN, Device("GPU", "8.9", 2**33))  # which runs no engine of RTX


@pytest.mark.parametrize("field", MANIFEST_TYPES)
def test_a_manifest_without_a_field_is_no_manifest(rtx, tmp_path, field):
    rtx()
    _, engine = write_rtx_engine(tmp_path)
    manifest = read_manifest(engine)
    del manifest[field]
    engine.with_name("model.trt.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not the manifest of an engine"):
        open_rtx(engine)


def test_a_wheel_without_its_libraries_is_one_sentence(tmp_path):
    """As the real bindings fail: their module is there, what it links to is not."""
    (tmp_path / "tensorrt_rtx.py").write_text(
        "raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')"
    )
    code = (
        "from aliked.backends.tensorrt_library import RTX\n"
        "print(RTX.not_installed()); print(RTX.cannot_build())\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    for line in run.stdout.splitlines():
        assert "does not load (libtensorrt_rtx.so.1: cannot open" in line
        assert "[tensorrt-rtx]" in line


# with a real GPU, without TensorRT


@pytest.mark.gpu
def test_torch_memory_copies_and_records_on_its_stream():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from aliked.backends.cuda_memory import CudaGraph, Twin

    memory = TorchMemory(0)
    with memory.active():
        buffer = memory.empty((2, 3), np.float32)
        make = functools.partial(memory.pinned, (2, 3), np.float32)
        twin = Twin(memory.address(buffer), (2, 3), 24, make)
        twin.send(np.arange(6, dtype=np.float32).reshape(2, 3), memory.stream)
        memory.synchronize()
        graph = CudaGraph(memory.stream, lambda: buffer.add_(1))
        graph.launch(memory.stream)
        graph.launch(memory.stream)
        found = twin.fetch(memory.stream)
        memory.synchronize()
    assert memory.address(buffer) % 256 == 0
    assert memory.matches(buffer, np.float32)
    assert not memory.matches(buffer, np.uint8)
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3) + 2)


@pytest.mark.gpu
def test_torch_memory_replays_in_order_on_whatever_stream_the_caller_is():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from aliked.backends.cuda_memory import CudaGraph

    memory = TorchMemory(0)
    with memory.active():
        first, target, total = (memory.empty((1 << 24,), np.float32) for _ in range(3))
        total.zero_()
        memory.synchronize()
        copies = [(target.data_ptr(), first.data_ptr(), first.nbytes)]
        graph = CudaGraph(memory.stream, lambda: total.add_(target), copies)
    sources = [torch.full_like(total, value) for value in range(8)]
    torch.cuda.synchronize()
    for source in sources:  # large enough that a copy out of turn would be seen
        with torch.cuda.stream(torch.cuda.Stream()):
            memory.replay(graph, [source.data_ptr()])
    with memory.active():
        memory.synchronize()
    assert torch.all(total == sum(range(8)))
