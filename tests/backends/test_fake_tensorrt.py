"""The stand-in for TensorRT: no name that the real bindings lack, and none of their rules lost."""

import ctypes
import enum
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_tensorrt import (
    RTX_VERSION,
    VERSIONS,
    Crash,
    HostMemory,
    Machine,
    make_tensorrt,
)
from tests.helpers.small_models import write_small_model

REAL_VERSIONS = {"10.16": ["10.13", "10.16"], "11.4": ["11.4"]}


def public_members(kind):
    names = [name for base in kind.__mro__ for name in vars(base)]
    return {name for name in names if not name.startswith("_") and name != "WRITABLE"}


def classes_of(module):
    found = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    return found | {"ILogger.Severity": module.ILogger.Severity}


@pytest.mark.parametrize(
    ("version", "real"), [(v, real) for v, reals in REAL_VERSIONS.items() for real in reals]
)
def test_the_stand_in_has_only_what_the_real_bindings_have(shared, version, real):
    api = json.loads((shared / "tensorrt" / f"api-{real}.json").read_text())["modules"]["tensorrt"]
    for name, kind in classes_of(make_tensorrt(version, Machine())).items():
        if name.startswith("_"):
            continue
        members = api["classes"][name]["members"]
        if issubclass(kind, enum.Enum):
            real_values = {key: members[key]["value"] for key in kind.__members__}
            assert real_values == {key: int(value) for key, value in kind.__members__.items()}
            continue
        assert public_members(kind) <= members.keys(), name
        for writable in getattr(kind, "WRITABLE", ()):
            assert members[writable]["writable"], f"{name}.{writable}"
    functions = {"nptype", "init_libnvinfer_plugins"}
    assert functions <= api["functions"].keys()


def test_the_stand_in_has_only_what_tensorrt_for_rtx_has():
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for name, kind in classes_of(make_tensorrt(RTX_VERSION, Machine(), "tensorrt_rtx")).items():
        theirs = real
        for part in name.split("."):
            theirs = getattr(theirs, part)
        if issubclass(kind, enum.Enum):
            values = {key: int(value) for key, value in theirs.__members__.items()}
            assert {key: int(value) for key, value in kind.__members__.items()}.items() <= (
                values.items()
            )
        else:
            assert public_members(kind) <= set(dir(theirs)), name


@pytest.mark.parametrize("version", VERSIONS)
def test_methods_of_the_stand_in_take_the_real_parameters(shared, version):
    api = json.loads((shared / "tensorrt" / f"api-{version}.json").read_text())
    api = api["modules"]["tensorrt"]["classes"]
    checked = 0
    for name, kind in classes_of(make_tensorrt(version, Machine())).items():
        for method, entry in api[name]["members"].items():
            function = getattr(kind, method, None)
            if (
                entry["kind"] != "method"
                or method.startswith("_")
                or not hasattr(function, "__code__")
            ):
                continue
            code = function.__code__
            own = list(code.co_varnames[1 : code.co_argcount])
            wanted = [
                [part.split(":")[0].split("=")[0].strip() for part in parts]
                for parts in (
                    signature.split("(", 1)[1].rsplit(")", 1)[0].split(", ")[1:]
                    for signature in entry["signature"]
                )
            ]
            assert any(own == names[: len(own)] for names in wanted), f"{name}.{method}{own}"
            checked += 1
    assert checked > 25


@pytest.fixture(params=VERSIONS)
def trt(request):
    return make_tensorrt(request.param, Machine())


def logger_of(trt):
    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.lines = []

        def log(self, severity, msg):
            self.lines.append(msg)

    return Log()


def parsed(trt, path, flags=None):
    log = logger_of(trt)
    trt.init_libnvinfer_plugins(log, "")
    builder = trt.Builder(log)
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong if flags is None else flags)
    parser = trt.OnnxParser(network, log)
    done = parser.parse_from_file(str(path))
    return builder, network, parser, done


def engine_of(trt, path):
    builder, network, _parser, _ = parsed(trt, path)
    config = builder.create_builder_config()
    plan = builder.build_serialized_network(network, config)
    return trt.Runtime(logger_of(trt)).deserialize_cuda_engine(bytes(plan))


def test_unknown_names_raise(trt):
    config = trt.Builder(logger_of(trt)).create_builder_config()
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1 << 30
    with pytest.raises(AttributeError):
        trt.Builder(logger_of(trt)).max_batch_size = 1
    assert not hasattr(trt, "Dims3")


def test_fp16_is_a_flag_of_version_10_only():
    assert hasattr(make_tensorrt("10.16", Machine()).BuilderFlag, "FP16")
    assert not hasattr(make_tensorrt("11.4", Machine()).BuilderFlag, "FP16")


def test_flags_must_be_shifted_as_integers(trt):
    with pytest.raises(TypeError):
        1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED


def test_fp16_with_a_strongly_typed_network_builds_nothing(tmp_path):
    trt = make_tensorrt("10.16", Machine())
    builder, network, _parser, _ = parsed(trt, write_small_model(tmp_path / "m.onnx"))
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    assert builder.build_serialized_network(network, config) is None


@pytest.mark.parametrize("broken", ["address", "alignment", "null", "shape"])
def test_contexts_refuse_to_run_before_everything_is_set(trt, tmp_path, broken):
    engine = engine_of(trt, write_small_model(tmp_path / "m.onnx"))
    memory = HostMemory(trt._machine)
    context = engine.create_execution_context()
    with memory.active():
        buffers = {
            name: memory.empty((1, 3, 48, 64), np.float32)
            for name in ("image", "keypoints", "descriptors", "scores")
        }
        set_ = {name: context.set_tensor_address(name, b.address) for name, b in buffers.items()}
        assert all(set_.values())
        if broken == "address":
            context = engine.create_execution_context()
            assert not context.execute_async_v3(memory.stream)
        elif broken == "alignment":
            assert not context.set_tensor_address("image", buffers["image"].address + 4)
        elif broken == "null":
            assert not context.set_tensor_address("image", 0)
        else:
            assert not context.set_input_shape("image", (1, 3, 49, 64))


def driver_copy(memory: HostMemory, driver, target: int, source: int, size: int) -> None:
    words = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size))
    assert driver.cuMemcpyAsync(*words, ctypes.c_void_p(memory.stream)) == 0


@pytest.mark.parametrize("page_locked", [True, False])
def test_work_runs_only_when_the_stream_is_waited_for(trt, page_locked):
    memory = HostMemory(trt._machine)
    with memory.active():
        buffer = memory.empty((4,), np.float32)
        host = memory.pinned((4,), np.float32) if page_locked else np.empty(4, np.float32)
        host[:] = 1
        driver_copy(memory, trt._machine.driver, buffer.address, host.ctypes.data, host.nbytes)
        assert not buffer.numpy().any()
        host[:] = 2  # which a copy from page-locked memory sees, and one of ordinary memory not
        memory.synchronize()
    assert (buffer.numpy() == (2 if page_locked else 1)).all()


def test_freed_device_memory_cannot_be_read(trt):
    memory = HostMemory(trt._machine)
    with memory.active():
        buffer, host = memory.empty((4,), np.float32), memory.pinned((4,), np.float32)
        driver_copy(memory, trt._machine.driver, host.ctypes.data, buffer.address, host.nbytes)
        del buffer
        with pytest.raises(Crash):
            memory.synchronize()


def test_without_a_device_the_runtime_crashes(tmp_path):
    trt = make_tensorrt("11.4", Machine(gpus=[]))
    with pytest.raises(Crash):
        trt.Runtime(logger_of(trt))
    with pytest.raises(TypeError, match="nullptr"):
        trt.Builder(logger_of(trt))


def test_the_real_api_has_every_name_that_the_project_uses(shared):
    script = shared / "tensorrt" / "check_api_usage.py"
    if not script.is_file():
        pytest.skip("check_api_usage.py is not here")
    project = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, str(script), project], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
