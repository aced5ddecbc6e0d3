"""Every backend gives the model's answer, or says why it cannot run."""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aliked import gpu
from aliked.backends import BACKENDS, Spec, aotinductor, create_extractor, get_backend
from aliked.backends import onnxruntime as onnxruntime_backend
from aliked.backends import pytorch as pytorch_backend
from aliked.configs import DEFAULT_MODEL
from aliked.drawing import draw_matches
from aliked.errors import InputError
from aliked.export.build import build_model_file
from aliked.features import Features, drop_fill_ins
from aliked.files import sha256
from aliked.images import find_images, list_images, load_image
from aliked.lightglue import LightGlue
from aliked.matching import MutualMatcher, check_matchable, match_mutual
from aliked.model import ALIKED
from aliked.parity import FP16, FP32, compare_features, judge
from aliked.store import FeatureStore
from aliked.weights import SHIPPED, find_weights
from tests.helpers.fake_tensorrt import Machine
from tests.helpers.small_models import write_small_model

ROOT = Path(__file__).resolve().parents[2]
SPEC = Spec(model="aliked-t16", top_k=100, device="cpu")
# Of the best 100 keypoints of a small image, some are chosen over others by a hair.
HALF = replace(FP16, min_fraction=0.95)
NAMES = ("keypoints", "descriptors", "scores")


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Two pieces of a photograph, uint8 [2, 96, 128, 3]."""
    path = ROOT / "assets" / "sequence_640x480" / "000000.jpg"
    image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    return np.stack([image[200:296, 100:228], image[150:246, 300:428]])


@pytest.fixture(scope="module")
def reference(photographs, weights_dir):
    """The eager model's features of both."""
    extractor = create_extractor("pytorch", replace(SPEC, weights=weights_dir))
    return [extractor(image) for image in photographs]


def to_host(values) -> np.ndarray:
    """What `infer` returns, in host memory."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values.numpy())


def check_extractor(extractor, photographs, reference, tolerance=FP32) -> None:
    """Alone and in a batch, end to end and on the device, the features are the reference's."""
    outputs = extractor.infer(extractor.to_device(photographs))
    extractor.synchronize()
    rows = [to_host(outputs[name]) for name in NAMES]
    assert [values.shape[:2] for values in rows] == [(2, 100)] * 3
    found = {
        "on the device": [drop_fill_ins(*image) for image in zip(*rows, strict=True)],
        "alone": [extractor(image) for image in photographs],
        "batch": extractor.extract_batch(photographs),
    }
    verdict = judge(
        {
            f"{how} {i}": compare_features(expected, features)
            for how, both in found.items()
            for i, (expected, features) in enumerate(zip(reference, both, strict=True))
        },
        tolerance,
    )
    assert verdict.passed, verdict.text


def test_every_backend_says_whether_it_can_run():
    for name in BACKENDS:
        reason = BACKENDS[name].unavailable()
        assert reason is None or reason.strip(), name


def test_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"pytorch-cudagraph cannot run here: .*CUDA"):
        create_extractor("pytorch-cudagraph", SPEC)


def test_onnxruntime_refuses_cuda_where_its_provider_is_missing(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    model = write_small_model(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="no CUDAExecutionProvider"):
        create_extractor("onnxruntime-cuda", Spec("aliked-t16", model_path=model, top_k=20))
    with pytest.raises(InputError, match="device cuda was asked for"):
        create_extractor(
            "onnxruntime", Spec("aliked-t16", model_path=model, top_k=20, device="cuda")
        )


def test_onnxruntime_loads_cuda_before_its_provider_and_not_for_the_cpu(tmp_path, monkeypatch):
    """The libraries of pip packages are on no loader's path: somebody has to load them."""
    import onnxruntime

    from aliked.backends.onnxruntime import CPU, CUDA, open_session

    class Session:
        def __init__(self, path, settings, providers):
            steps.append(providers[0][0])

        def get_providers(self):
            return steps[-1:]

    def preload() -> None:
        print("Failed to load libcudnn.so.9")
        steps.append("libraries")

    steps, model = [], write_small_model(tmp_path / "model.onnx")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    open_session(model, CPU, {})
    open_session(model, CUDA, {})
    assert steps == [CPU, "libraries", CUDA]


@pytest.mark.parametrize(
    ("library", "package", "runs"),
    [(None, False, False), ("libnvinfer.so.10", False, True), (None, True, True)],
)
def test_a_provider_without_tensorrt_itself_cannot_run(library, package, runs, monkeypatch):
    import onnxruntime

    from aliked.backends import onnxruntime as backend

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [backend.TENSORRT])
    monkeypatch.setattr(backend.ctypes.util, "find_library", lambda name: library)
    monkeypatch.setattr(backend, "tensorrt_from_pip", lambda: package)
    reason = BACKENDS["onnxruntime-tensorrt"].unavailable()
    assert reason is None if runs else "libraries are not installed" in reason


def test_onnxruntime_tells_which_provider_runs_what(tmp_path):
    model = write_small_model(tmp_path / "model.onnx")
    extractor = create_extractor("onnxruntime-cpu", Spec("aliked-t16", model_path=model, top_k=20))
    if not hasattr(extractor.session, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not tell")
    assert extractor.placement()["CPUExecutionProvider"]["TopK"] == 1


def test_onnxruntime_can_be_sent_to_another_process(tmp_path):
    import multiprocessing

    model = write_small_model(tmp_path / "model.onnx")
    extractor = create_extractor("onnxruntime-cpu", Spec("aliked-t16", model_path=model, top_k=20))
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(extractor, (image,))
    np.testing.assert_array_equal(there.keypoints, extractor(image).keypoints)


def rewritten(path: Path, change) -> Path:
    """A file of `write_small_model` after `change(model)`."""
    model = onnx.load(write_small_model(path))
    change(model)
    onnx.save(model, path)
    return path


def set_metadata(**texts):
    """What sets metadata of a model, or removes it where the text is None."""

    def change(model) -> None:
        facts = {entry.key: entry.value for entry in model.metadata_props}
        facts |= {f"aliked.{name}": text for name, text in texts.items()}
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {k: v for k, v in facts.items() if v is not None})

    return change


def without_batch_axis(model) -> None:
    """As other projects export ALIKED: outputs of one image."""
    for output in model.graph.output:
        producer = next(node for node in model.graph.node if node.output[0] == output.name)
        axis = onnx.numpy_helper.from_array(np.array([0]), f"axis of {output.name}")
        model.graph.initializer.append(axis)
        producer.op_type = "Squeeze"
        producer.input.append(axis.name)
        del output.type.tensor_type.shape.dim[0]


def scaled(name: str, factor: float):
    """What multiplies an output."""

    def change(model) -> None:
        producer = next(node for node in model.graph.node if node.output[0] == name)
        value = onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor")
        model.graph.initializer.append(value)
        producer.op_type = "Mul"
        producer.input.append("factor")

    return change


@pytest.mark.parametrize(
    ("change", "spec", "words"),
    [
        (set_metadata(model=None), {}, "does not say which model"),
        (set_metadata(model="{"), {}, "not JSON"),
        (set_metadata(io='"opencv"'), {}, "another contract"),
        (set_metadata(precision='"fp32"'), {"precision": "fp16"}, "is float32"),
        (set_metadata(weights_sha256='"0"'), {"model": "aliked-t16-homography"}, "holds aliked-t1"),
        (without_batch_axis, {}, "another contract"),
        (scaled("keypoints", 100), {}, "of an image of 64x48"),
        (scaled("keypoints", np.nan), {}, "NaN"),
        (scaled("scores", np.nan), {}, "NaN"),
        (scaled("descriptors", np.inf), {}, "NaN"),
        (lambda model: None, {"top_k": 0}, "not exported for --top_k 0"),
        (lambda model: None, {"top_k": 21}, "gives 20 keypoints"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(change, spec, words, tmp_path):
    path = rewritten(tmp_path / "model.onnx", change)
    spec = Spec(**{"model": "aliked-t16", "top_k": 20, "model_path": path} | spec)
    with pytest.raises(InputError, match=words):
        create_extractor("onnxruntime-cpu", spec)(np.full((48, 64, 3), 99, np.uint8))


def test_a_file_of_other_weights_is_refused(tmp_path):
    name = "aliked-t16-homography"
    facts = {"model": name, "weights_sha256": sha256(SHIPPED / f"{name}.pth")}
    spec = Spec(name, top_k=20, weights=SHIPPED / f"{name}.pth")
    right = write_small_model(tmp_path / "right.onnx", metadata=facts)
    create_extractor("onnxruntime-cpu", replace(spec, model_path=right))
    wrong = write_small_model(tmp_path / "w.onnx", metadata=facts | {"weights_sha256": "0" * 64})
    with pytest.raises(InputError, match="other weights"):
        create_extractor("onnxruntime-cpu", replace(spec, model_path=wrong))


def test_a_batch_that_a_file_does_not_take_is_refused(tmp_path):
    model = write_small_model(tmp_path / "model.onnx")
    extractor = create_extractor("onnxruntime-cpu", Spec("aliked-t16", model_path=model, top_k=20))
    with pytest.raises(InputError, match="has 2 images"):
        extractor.extract_batch(np.zeros((2, 48, 64, 3), np.uint8))


def test_onnxruntime_without_deform_conv_says_which_has_it(tmp_path, monkeypatch):
    import onnxruntime

    from aliked.backends.onnxruntime import deform_conv_missing

    model = write_small_model(tmp_path / "model.onnx", deform=True)

    def refuse(*_) -> None:
        raise RuntimeError("Could not find an implementation for DeformConv(19)")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.2")
    with pytest.raises(InputError, match=r"1\.24\.2 has no DeformConv; install 1\.25"):
        create_extractor("onnxruntime-cpu", Spec("aliked-t16", model_path=model, top_k=20))
    monkeypatch.setattr(onnxruntime, "__version__", "1.100.0")
    assert deform_conv_missing() is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": None}, "unknown model None"),
        ({"model": ["aliked-t16"]}, "unknown model"),
        ({"top_k": "100"}, "top_k is '100'"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": True}, "top_k is True"),
        ({"n_limit": None}, "n_limit is None"),
        ({"top_k": 0, "n_limit": 0}, "at least 1"),
        ({"scores_th": float("nan")}, "scores_th is nan"),
        ({"scores_th": float("inf")}, "scores_th is inf"),
        ({"scores_th": -5}, "scores_th is -5"),
        ({"scores_th": 7}, "scores_th is 7"),
        ({"scores_th": "0.2"}, "scores_th is '0.2'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"device": "mps"}, "unknown device 'mps'"),
        ({"device": "xpu:0"}, "unknown device 'xpu:0'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"device": "cuda:x"}, "unknown device 'cuda:x'"),
        ({"device": 0}, "unknown device 0"),
        ({"weights": 3}, "weights is 3"),
        ({"model_path": 3}, "model_path is 3"),
        ({"model_path": "model.onnx"}, "pytorch does not run model.onnx; .*--backend onnxruntime"),
        ({"model_path": Path("model.trt")}, "--backend tensorrt"),
    ],
)
def test_what_says_nothing_to_run_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        create_extractor("pytorch", Spec(**fields))


@given(
    field=st.sampled_from(["model", "top_k", "scores_th", "n_limit", "precision", "device"]),
    value=st.one_of(st.none(), st.booleans(), st.binary(max_size=3), st.just(float("nan"))),
)
def test_a_field_of_another_type_never_reaches_a_model(field, value):
    with pytest.raises(InputError):
        replace(SPEC, **{field: value}).check()


def test_create_extractor_takes_only_names_and_specs():
    with pytest.raises(InputError, match="unknown backend None"):
        create_extractor(None, SPEC)
    with pytest.raises(InputError, match="give a Spec"):
        create_extractor("pytorch", {"top_k": 5})


WRONG = (
    None,
    True,
    3.5,
    b"bytes",
    [1],
    object(),
    np.zeros((4, 4)),
    torch.zeros(2, 2).to_sparse(),
)
ROWS = np.eye(1, 128, dtype=np.float32)
FEATURES = Features(np.zeros((1, 2), np.float32), np.ones(1, np.float32), ROWS)
IMAGE = np.zeros((9, 9, 3), np.uint8)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_an_argument_of_another_type_is_one_sentence(wrong, tmp_path):
    store = FeatureStore.open(tmp_path / "a.h5", {})
    calls = [
        lambda: ALIKED.from_pretrained(wrong),
        lambda: ALIKED.from_pretrained(DEFAULT_MODEL, device=wrong),
        lambda: ALIKED.from_pretrained(DEFAULT_MODEL, precision=wrong),
        lambda: ALIKED.from_pretrained(DEFAULT_MODEL, top_k=[wrong]),
        lambda: LightGlue(filter_threshold=[wrong]),
        lambda: LightGlue.from_pretrained(device=wrong),
        lambda: create_extractor(wrong, SPEC),
        lambda: replace(SPEC, precision=wrong).check(),
        lambda: load_image(wrong),
        lambda: load_image(tmp_path, max_size=[wrong]),
        lambda: list_images(wrong),
        lambda: find_images(wrong),
        lambda: match_mutual(ROWS, ROWS, [wrong]),
        lambda: match_mutual(wrong, ROWS),
        lambda: MutualMatcher(0.5, wrong),
        lambda: MutualMatcher().match(FEATURES, wrong, (9, 9), (9, 9)),
        lambda: check_matchable(FEATURES, wrong, 128),
        lambda: check_matchable(wrong, (9, 9), 128),
        lambda: FeatureStore.open(wrong, {}),
        lambda: store.write(wrong, FEATURES, (9, 9)),
        lambda: store.write("a", wrong, (9, 9)),
        lambda: store.write("a", FEATURES, wrong),
        lambda: draw_matches([wrong], FEATURES, IMAGE, FEATURES, np.zeros((0, 2), int), ""),
        lambda: draw_matches(IMAGE, FEATURES, IMAGE, FEATURES, wrong, ""),
        lambda: find_weights(wrong),
    ]
    for call in calls:
        with pytest.raises(InputError) as refusal:
            call()
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", ["pytorch", "onnxruntime-cpu"])
def test_a_batch_that_memory_cannot_hold_is_refused(name, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("aliked.features.available_memory", lambda: 2**20)
    monkeypatch.setattr("aliked.features.SMALL", 0)
    path = None
    if name != "pytorch":
        path = write_small_model(tmp_path / "small.onnx", dynamic=True)
    model = "aliked-t16" if path else DEFAULT_MODEL
    extractor = create_extractor(name, Spec(model, top_k=20, model_path=path))
    with pytest.raises(InputError, match=r"a batch of 2 images .* needs about .* GiB"):
        extractor.extract_batch(np.zeros((2, 480, 640, 3), np.uint8))


def test_the_eager_model_takes_batches(photographs, reference, weights_dir):
    extractor = create_extractor("pytorch", replace(SPEC, weights=weights_dir))
    check_extractor(extractor, photographs, reference)


def test_an_exported_file_is_the_model(photographs, reference, weights_dir, tmp_path):
    spec = replace(SPEC, weights=weights_dir)
    spec = replace(spec, model_path=tmp_path / "model.onnx")
    build_model_file(spec, photographs.shape[:3], spec.model_path)
    extractor = create_extractor("onnxruntime-cpu", spec)
    check_extractor(extractor, photographs, reference)


def test_mixed_precision_is_not_called_float32(weights_dir):
    with pytest.raises(InputError, match="pass --precision fp16"):
        create_extractor("pytorch-amp", replace(SPEC, weights=weights_dir))


def test_mixed_precision_finds_the_same_keypoints(photographs, reference, weights_dir):
    spec = replace(SPEC, weights=weights_dir, precision="fp16")
    extractor = create_extractor("pytorch-amp", spec)
    # The choice of what is half precision is PyTorch's here, and costs descriptors up to 1e-3.
    check_extractor(extractor, photographs, reference, replace(HALF, mean_cosine=0.998))


def test_a_compile_mode_that_does_not_exist_is_refused(weights_dir):
    with pytest.raises(InputError, match="unknown compile mode 'fastest'"):
        create_extractor("pytorch-compile", replace(SPEC, compile_mode="fastest"))


def test_a_missing_package_is_named(tmp_path):
    spec = replace(SPEC, model_path=tmp_path / "model.pt2")
    with pytest.raises(InputError, match=r"no file .*model.pt2"):
        create_extractor("aotinductor", spec)


STATIC_COMPILER = """#!/bin/sh
case " $* " in *" -shared "*) exec {compiler} -static-libstdc++ "$@" ;; esac
exec {compiler} "$@"
"""


OTHERWISE = (
    ({"model": "aliked-n32"}, r"the model of .*model\.pt2 is aliked-t16, not aliked-n32"),
    ({"top_k": 50}, r"the selection of .* is 100, not 50; ask for 100"),
    ({"precision": "fp16"}, r"the precision of .* is fp32, not fp16"),
)


@pytest.mark.slow
def test_a_package_is_the_model_and_takes_only_its_size(
    photographs, reference, weights_dir, tmp_path
):
    """It carries a C++ library of its own, as some compilers have no other than a static one.

    Mixed with PyTorch's it crashes.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("Inductor needs g++")
    from torch._inductor import config

    wrapper, path = tmp_path / "g++", tmp_path / "model.pt2"
    wrapper.write_text(STATIC_COMPILER.format(compiler=compiler))
    wrapper.chmod(0o755)
    spec = replace(SPEC, weights=weights_dir, model_path=path)
    # Inductor compiles ten probes of the processor and two headers for later use first, which
    # takes longer than the model; nothing here depends on either.
    shortcuts = {"cpp.vec_isa_ok": True, "aot_inductor.precompile_headers": False}
    with config.patch({"cpp.cxx": (None, str(wrapper)), **shortcuts}):
        build_model_file(spec, (1, *photographs.shape[1:3]), path)
    with zipfile.ZipFile(path) as package:
        (library,) = (name for name in package.namelist() if name.endswith(".so"))
        assert b"libstdc++.so" not in package.read(library)
    extractor = create_extractor("aotinductor", spec)
    for image, expected in zip(photographs, reference, strict=True):
        verdict = judge({"image": compare_features(expected, extractor(image))}, FP32)
        assert verdict.passed, verdict.text
    contiguous = extractor.to_device(photographs[:1]).contiguous()
    again = extractor.infer(contiguous)["keypoints"]  # a package does not check its strides
    assert torch.equal(again, extractor.infer(extractor.to_device(photographs[:1]))["keypoints"])
    with pytest.raises(InputError, match="compiled for"):
        extractor(photographs[0][:90])
    compiled = tmp_path / "compiled"
    load_afresh(path, "cpu", photographs, TORCHINDUCTOR_CACHE_DIR=str(compiled))
    assert not list(compiled.rglob("*.so"))  # loading it compiled nothing
    for fields, words in OTHERWISE:
        with pytest.raises(InputError, match=words):
            create_extractor("aotinductor", replace(spec, **fields))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["pytorch", "pytorch-compile", "pytorch-cudagraph", "aotinductor"])
def test_on_a_gpu_it_is_the_model_too(
    name, precision, photographs, reference, weights_dir, tmp_path
):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = replace(SPEC, weights=weights_dir, precision=precision, device="cuda")
    if get_backend(name).suffix:
        spec = replace(spec, model_path=tmp_path / "model.pt2")
        build_model_file(spec, photographs.shape[:3], spec.model_path)
        found = create_extractor(name, spec).extract_batch(photographs)
        pairs = enumerate(zip(reference, found, strict=True))
        parities = {str(i): compare_features(*pair) for i, pair in pairs}
        assert judge(parities, FP32 if precision == "fp32" else HALF).passed
        return
    extractor = create_extractor(name, spec)
    check_extractor(extractor, photographs, reference, FP32 if precision == "fp32" else HALF)


LOADED_AFRESH = """
import sys
from pathlib import Path
import numpy as np
from aliked.backends import Spec, create_extractor
path, device, height, width = sys.argv[1:]
spec = Spec("aliked-t16", top_k=100, device=device, model_path=Path(path))  # as SPEC
features = create_extractor("aotinductor", spec)(np.zeros((int(height), int(width), 3), np.uint8))
assert features.descriptors.shape[1] == 64
"""


def load_afresh(path: Path, device: str, photographs: np.ndarray, **environment: str) -> None:
    """Run a package in a process that has compiled nothing."""
    arguments = [str(argument) for argument in (path, device, *photographs.shape[1:3])]
    command = [sys.executable, "-c", LOADED_AFRESH, *arguments]
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def test_what_is_no_package_is_refused_with_the_reason(tmp_path):
    path = tmp_path / "model.pt2"
    spec = Spec("aliked-t16", device="cpu", model_path=path)
    path.write_text("no archive")
    with pytest.raises(InputError, match=r"model\.pt2 cannot be loaded .*not a ZIP archive"):
        create_extractor("aotinductor", spec)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "an archive, but no package")
    with pytest.raises(InputError, match=r"model\.pt2 cannot be loaded"):
        create_extractor("aotinductor", spec)


def test_a_package_of_another_project_is_refused(tmp_path, monkeypatch):
    foreign = SimpleNamespace(get_metadata=lambda: {"AOTI_DEVICE_KEY": "cpu"})
    monkeypatch.setattr(aotinductor, "load", lambda path, device: foreign)
    with pytest.raises(InputError, match="does not say what images it is for"):
        aotinductor.PackagedForward(tmp_path / "model.pt2", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_process_that_has_compiled_nothing_runs_a_package(
    device, photographs, weights_dir, tmp_path
):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = tmp_path / "model.pt2"
    spec = replace(SPEC, device=device, weights=weights_dir)
    build_model_file(spec, (1, *photographs.shape[1:3]), path)
    load_afresh(path, device, photographs)


@pytest.mark.gpu
def test_cuda_events_and_a_stopwatch_agree(photographs, weights_dir):
    """Within the time that Python and two waits take: 0.1 ms and a fifth of the call."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from benchmark.timing import CudaClock, unseen

    extractor = create_extractor("pytorch", replace(SPEC, weights=weights_dir, device="cuda"))
    batch, clock = extractor.to_device(photographs), CudaClock("cuda")
    laps = [clock(lambda: extractor.infer(batch), extractor.synchronize)[0] for _ in range(50)]
    assert unseen(laps[10:]) is None


# TensorRT for RTX inside ONNX Runtime and PyTorch: what is missing is said


@pytest.fixture
def plugin(monkeypatch, tmp_path):
    """ONNX Runtime's plugin as a package whose library is no library, of a version."""

    def install(version):
        path = tmp_path / "no_library.so"
        path.write_text("no library")
        module = ModuleType(onnxruntime_backend.PLUGIN)
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.get_ep_name = lambda: onnxruntime_backend.TENSORRT_RTX
        module.get_library_path = lambda: str(path)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(onnxruntime_backend, "version", lambda package: version)

    return install


def test_the_plugin_with_tensorrt_for_rtx_says_what_is_missing(monkeypatch, plugin):
    backend = BACKENDS["onnxruntime-tensorrt-rtx"]
    monkeypatch.setitem(sys.modules, onnxruntime_backend.PLUGIN, None)
    assert "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13" in backend.unavailable()
    plugin("0.4.0")
    monkeypatch.setattr(gpu, "driver", lambda: None)
    assert "no NVIDIA driver" in backend.unavailable()


def test_the_plugins_version_decides_over_hopper(monkeypatch, plugin):
    hopper = Machine(gpus=[("NVIDIA H100 80GB HBM3", 9, 0)])
    monkeypatch.setattr(gpu, "driver", lambda: hopper.driver)
    backend = BACKENDS["onnxruntime-tensorrt-rtx"]
    plugin("0.5.0")
    assert "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.4.0" in backend.unavailable()
    plugin("0.4.0")
    assert backend.unavailable() is None


def test_a_plugin_that_does_not_load_is_one_sentence(monkeypatch, plugin, tmp_path):
    plugin("0.4.0")
    monkeypatch.setattr(gpu, "driver", lambda: Machine().driver)
    onnxruntime_backend.plugin_devices.cache_clear()
    path = write_small_model(tmp_path / "model.onnx")
    with pytest.raises(InputError, match="does not load into ONNX Runtime") as refusal:
        create_extractor("onnxruntime-tensorrt-rtx", Spec("aliked-t16", model_path=path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("installed", "says"),
    [("1.0.0", "is not for PyTorch"), (torch.__version__.split("+")[0], "no NVIDIA driver")],
)
def test_torch_tensorrt_of_another_pytorch_is_refused(monkeypatch, installed, says):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    monkeypatch.setattr(pytorch_backend, "version", lambda package: installed)
    monkeypatch.setattr(gpu, "driver", lambda: None)
    assert says in pytorch_backend.torch_tensorrt_refuses()


def test_torch_tensorrt_for_rtx_finds_what_its_library_has_dropped(monkeypatch, tmp_path):
    """A class, the setter of a property, and plugins, whose module cannot be imported."""
    (tmp_path / "torch_tensorrt.py").write_text(
        "import importlib.util, tensorrt_rtx\n"
        "named = tensorrt_rtx.IAlgorithmSelector\n"
        "output = tensorrt_rtx.ITensor()\n"
        "output.dtype = output.dtype\n"
        "plugins = importlib.util.find_spec('tensorrt.plugin')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", ModuleType("tensorrt.plugin"))
    library = ModuleType("tensorrt_rtx")
    library.ITensor = type("ITensor", (), {"dtype": property(lambda tensor: "FLOAT")})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(pytorch_backend, "version", {"torch-tensorrt-rtx": "2.11.0"}.get)
    assert pytorch_backend.import_torch_tensorrt().plugins is None
    del sys.modules["torch_tensorrt"]


def test_autocast_runs_where_torch_tensorrt_for_rtx_is_installed(monkeypatch, weights_dir):
    monkeypatch.setattr(pytorch_backend, "version", {"torch-tensorrt-rtx": "2.11.0"}.get)
    spec = replace(SPEC, weights=weights_dir, precision="fp16", device="cpu")
    assert create_extractor("pytorch-amp", spec).device == "cpu"


@pytest.mark.parametrize("package", ["torch-tensorrt", "torch-tensorrt-rtx"])
def test_torch_tensorrt_for_rtx_runs_its_engines_from_python(monkeypatch, package):
    compiler = SimpleNamespace(compile=lambda program, **options: options)
    module = SimpleNamespace(dynamo=compiler)
    monkeypatch.setattr(pytorch_backend, "import_torch_tensorrt", lambda: module)
    monkeypatch.setattr(pytorch_backend, "_installed", {package: "2.11.0"}.get)
    monkeypatch.setattr(torch.export, "export", lambda model, inputs: None)
    forward = pytorch_backend.EngineForward(torch.nn.Identity(), tf32=False)
    options = forward._compile(torch.zeros(1, 3, 32, 32))
    assert options["use_python_runtime"] == (package == "torch-tensorrt-rtx")
    assert options["disable_tf32"]


def test_torch_tensorrt_that_does_not_load_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "torch_tensorrt.py").write_text("raise Exception('libtensorrt_rtx.so.1 is gone')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(InputError, match=r"torch_tensorrt does not load \(libtensorrt_rtx"):
        pytorch_backend.import_torch_tensorrt()
