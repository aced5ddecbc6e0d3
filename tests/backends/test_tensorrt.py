"""Running engines, over the stand-in: results, shapes, batches, graphs, and every refusal."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aliked.backends import BACKENDS, Spec, create_extractor
from aliked.backends.cuda_memory import TorchMemory
from aliked.backends.onnxruntime import ONNXRuntimeExtractor
from aliked.backends.tensorrt import TensorRTExtractor, unavailable
from aliked.errors import InputError
from aliked.export.builder import BuildOptions
from aliked.export.engine import Request, convert
from tests.helpers.fake_tensorrt import VERSIONS, Machine
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.fake_tensorrt.pycuda import make_pycuda
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
    context = TensorRTExtractor(engine).session.context
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


def test_a_batch_gives_each_image_its_own_features(make_engine):
    onnx_path, engine = make_engine(SHAPES)
    images = np.stack([photograph(seed=seed) for seed in range(3)])
    for image, features in zip(
        images, TensorRTExtractor(engine).extract_batch(images), strict=True
    ):
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


def test_a_batch_at_an_odd_address_is_moved_to_where_tensorrt_takes_it(make_engine):
    onnx_path, engine = make_engine()
    extractor = TensorRTExtractor(engine)
    aligned = extractor.to_device(photograph()[None])
    with extractor.memory.active():
        room = extractor.memory.empty((aligned.data.size + 4,), np.uint8)
    odd = copy.copy(aligned)
    odd.address, odd.room = room.address + 4, room
    room.data[4:] = aligned.data
    scores = extractor.infer(odd)["scores"]
    extractor.synchronize()
    expected = features_in_onnxruntime(onnx_path, photograph())
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
        TensorRTExtractor(engine, lean=True)
    onnx_path, engine = make_engine(options={"version_compatible": True})
    features = TensorRTExtractor(engine, lean=True)(photograph())
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
    assert unavailable() is None
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed" in unavailable()
    monkeypatch.setitem(sys.modules, "tensorrt_lean", None)
    assert "tensorrt_lean is not installed" in unavailable(lean=True)


def test_the_backend_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import aliked.backends.tensorrt, aliked.images\n"
        "from aliked.backends import Spec, get_backend\n"
        "assert get_backend.__module__ == 'aliked.backends'\n"
        "assert 'tensorrt' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# with a real GPU, without TensorRT


@pytest.mark.gpu
def test_torch_memory_copies_and_records_on_its_stream():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from aliked.backends.cuda_memory import CudaGraph

    memory = TorchMemory(0)
    host = memory.pinned((2, 3), np.float32)
    host[...] = np.arange(6).reshape(2, 3)
    with memory.active():
        source, target = (memory.empty((2, 3), np.float32) for _ in range(2))
        memory.upload(host, source)
        memory.copy(source, target)
        memory.synchronize()
        graph = CudaGraph(memory.stream, lambda: target.add_(1))
        graph.launch()
        graph.launch()
        memory.download(target, host)
        memory.synchronize()
    assert memory.address(source) % 256 == 0
    assert memory.matches(source, np.float32)
    assert not memory.matches(source, np.uint8)
    np.testing.assert_array_equal(host, np.arange(6).reshape(2, 3) + 2)
