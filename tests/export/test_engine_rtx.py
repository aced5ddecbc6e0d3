"""Building by the real TensorRT for RTX, which needs no GPU: what is built, kept and refused."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from aliked import cli, gpu
from aliked.backends import Spec
from aliked.backends.tensorrt import precision_of, read_manifest
from aliked.backends.tensorrt_library import TF32_OVERRIDE, tf32_is_off
from aliked.commands import build as build_command
from aliked.commands import export as export_command
from aliked.export import build as build_module
from aliked.export import builder as builder_module
from aliked.export import engine as engine_module
from aliked.export.engine import Request
from aliked.files import sha256
from tests.helpers.fake_tensorrt import Machine
from tests.helpers.fake_tensorrt.builder import pack
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.small_models import use_right_model, write_small_model

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = "there is no NVIDIA driver here"


@pytest.fixture(autouse=True)
def machine_without_a_gpu(monkeypatch):
    """Also where the tests run on one: what is tested here does without."""
    monkeypatch.setattr(gpu, "unavailable", lambda: NO_GPU)


@pytest.fixture
def onnx_path(tmp_path):
    return write_small_model(tmp_path / "model.onnx")


def run(monkeypatch, *arguments):
    """The script in this process: its exit status."""
    import convert_onnx_to_trt

    monkeypatch.setattr(sys, "argv", ["convert_onnx_to_trt.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run(convert_onnx_to_trt.main, convert_onnx_to_trt.parser())
    return end.value.code


@pytest.fixture
def build(monkeypatch, onnx_path):
    """Run the script on the small model with more options; its exit status."""
    return lambda *options: run(monkeypatch, "--model_onnx_path", onnx_path, *options)


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_the_readmes_command_builds_without_a_gpu_and_says_what_is_missing(tmp_path):
    """As a user runs it, in a process of its own."""
    folder = tmp_path / "converted_model"
    folder.mkdir()
    name = "converted_model/aliked-n16rot-top1k-tum"
    write_small_model(tmp_path / f"{name}.onnx")
    (tmp_path / f"{name}.onnx.json").write_text(json.dumps({"images": "assets/photographs"}))
    script = str(ROOT / "convert_onnx_to_trt.py")
    command = ["--model_onnx_path", f"{name}.onnx", "--model_trt_path", f"{name}.trt"]
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPU, script, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=SEARCHED | {"PATH": ""},
    )
    assert ran.returncode == 0, ran.stderr
    assert f"building with TensorRT for RTX {trt.__version__} (TensorRT cannot: " in ran.stdout
    assert "for compute capability 8.0 and later" in ran.stdout
    verify = f"python convert_onnx_to_trt.py --verify {name}.trt"
    assert f"NOT YET VERIFIED ({NO_GPU}); where there is a GPU: {verify}\n" in ran.stdout
    manifest = read_manifest(tmp_path / f"{name}.trt")
    assert manifest["verified"] is None
    assert manifest["verify_with"] == verify
    assert manifest["source"]["images"] == "assets/photographs"


# Where modules and libraries are found here, for the process to find TensorRT for RTX there too.
SEARCHED = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
}
WITHOUT_GPU = f"""
import runpy, sys
from aliked import gpu
gpu.unavailable = lambda: {NO_GPU!r}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_manifest_names_library_gpus_source_and_precision(build, tmp_path, onnx_path, capsys):
    assert build("--compute_capability", "SM86", "SM89", "SM86") == 0
    assert files(tmp_path) == {"model.onnx", "model.rtx", "model.rtx.json"}
    manifest = read_manifest(tmp_path / "model.rtx")
    assert (manifest["library"], manifest["version"]) == ("tensorrt-rtx", trt.__version__)
    assert manifest["compute_capabilities"] == ["SM86", "SM89"]
    assert manifest["gpu"] is None
    assert manifest["sha256"] == sha256(tmp_path / "model.rtx")
    assert manifest["source"]["sha256"] == sha256(onnx_path)
    assert (manifest["precision"], manifest["tf32"]) == ("FP32", True)
    assert manifest["source"]["images"] is None
    assert manifest["verify_with"].endswith("--images FOLDER")
    assert "compute capability 8.6 and 8.9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "options", "command"),
    [
        (
            "convert_onnx_to_trt.py",
            ["--num_images", 3, "--weights", "my weights.pth"],
            "python convert_onnx_to_trt.py --verify {} --num_images 3 --weights 'my weights.pth'",
        ),
        (
            "/usr/bin/aliked",
            ["--no_verify", "--memory", "pycuda"],
            "aliked build --verify {} --memory pycuda",
        ),
    ],
)
def test_how_an_engine_is_to_be_verified_is_not_forgotten(
    onnx_path, tmp_path, monkeypatch, program, options, command
):
    cv2.imwrite(str(tmp_path / "photograph.png"), np.zeros((48, 64, 3), np.uint8))
    monkeypatch.setattr(engine_module, "build_plan", lambda *_: b"plan")
    monkeypatch.setattr(sys, "argv", [program])
    arguments = ["--model_onnx_path", onnx_path, "--images", tmp_path, *options]
    assert build_command.main(build_command.parser().parse_args(list(map(str, arguments)))) == 0
    engine = tmp_path / "model.rtx"
    assert read_manifest(engine)["verify_with"] == command.format(engine)


@pytest.mark.parametrize("model", [{"half": True}, {"uint8": True}, {"batch": 2}, {"opset": 18}])
def test_every_form_of_a_file_is_built(build, onnx_path, tmp_path, model):
    write_small_model(onnx_path, **model)
    assert build() == 0
    assert read_manifest(tmp_path / "model.rtx")["precision"] == (
        "FP16" if "half" in model else "FP32"
    )


def test_the_export_in_another_precision_can_be_typed_as_it_is_said(build, onnx_path, capsys):
    write_small_model(onnx_path, metadata={"top_k": 0, "scores_th": 0.3, "n_limit": 50})
    assert build("--precision_mode", "FP16") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    given = export_command.parser().parse_args(said.split()[2:])
    export_command.resolve(given)
    assert (given.top_k, given.scores_th, given.n_limit) == (0, 0.3, 50)
    assert given.precision == "fp16"


def test_turing_is_built_for_where_it_is_named(build, tmp_path):
    assert build("--compute_capability", "SM75") == 0
    assert read_manifest(tmp_path / "model.rtx")["compute_capabilities"] == ["SM75"]


def test_the_gpu_of_this_machine_needs_one_and_is_built_for_alone(
    build, tmp_path, monkeypatch, capsys
):
    assert build("--compute_capability", "CURRENT") == 2
    assert f"there is no GPU to build for ({NO_GPU})" in capsys.readouterr().err
    assert build("--compute_capability", "CURRENT", "SM86") == 2
    assert "leave the others out" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}
    monkeypatch.setattr(gpu, "devices", lambda: [gpu.Device("H100", "9.0", 80 << 30)])
    options = builder_module.BuildOptions(("CURRENT",))
    assert builder_module.targets_of(options) == ["SM90"]  # which the manifest names


def test_a_gpu_that_is_none_is_refused(build, tmp_path):
    assert build("--compute_capability", "SM42") == 2
    assert files(tmp_path) == {"model.onnx"}


def test_a_dynamic_file_is_built_with_its_shapes_and_not_without(
    build, onnx_path, tmp_path, capsys
):
    write_small_model(onnx_path, dynamic=True)
    assert build() == 2
    said = capsys.readouterr().err
    assert "give --min_shape, --opt_shape and --max_shape" in said
    assert said.count("\n") == 1
    shapes = ["--min_shape", "1x3x32x32", "--opt_shape", "1x3x48x64", "--max_shape", "3x3x64x96"]
    assert build(*shapes) == 0
    manifest = read_manifest(tmp_path / "model.rtx")
    assert manifest["shapes"] == [[1, 3, 32, 32], [1, 3, 48, 64], [3, 3, 64, 96]]


@pytest.mark.parametrize("side", [3_000_000_000, 10**20])
def test_a_side_that_no_library_can_count_is_refused(build, onnx_path, tmp_path, capsys, side):
    write_small_model(onnx_path, dynamic=True)
    shapes = ["--min_shape", "1x3x32x32", "--opt_shape", "1x3x48x64"]
    assert build(*shapes, "--max_shape", f"1x3x{side}x64") == 2
    assert f"--max_shape: {side} is no whole number to go by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--timing_cache x", "--version_compatible", "--hardware_compatible"],
)
def test_options_that_it_does_not_have_are_refused(build, tmp_path, capsys, option):
    assert build(*option.split()) == 2
    assert f"TensorRT for RTX has no {option.split()[0]}" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}


@pytest.mark.parametrize(
    ("option", "environment", "precision"),
    [([], "1", "tf32"), (["--no_tf32"], "1", "fp32"), ([], "0", "fp32")],
)
def test_the_manifest_says_whether_float32_may_be_tf32(
    build, tmp_path, monkeypatch, option, environment, precision
):
    monkeypatch.setenv(TF32_OVERRIDE, environment)  # the library obeys it without being told
    assert build(*option) == 0
    assert precision_of(read_manifest(tmp_path / "model.rtx")) == precision
    assert tf32_is_off() == (precision == "fp32")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.onnx", "would take the place of"),
        ("model.onnx.json", "would take the place of"),
        ("folder", "is not the name of a file"),
        ("under", "under.json is not the name of a file"),
        ("n" * 240, "is too long; give a shorter --model_trt_path"),
        ("", "is not the name of a file"),
    ],
)
def test_a_name_that_cannot_be_the_engines_is_refused_before_the_build(
    build, onnx_path, tmp_path, monkeypatch, capsys, name, says
):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "under.json"):
        (tmp_path / folder).mkdir()
    Path("model.onnx.json").write_text("{}")
    there, source = files(tmp_path), onnx_path.read_bytes()
    monkeypatch.setattr(engine_module, "build_plan", None)
    assert build("--model_trt_path", name) == 2
    assert says in capsys.readouterr().err
    assert files(tmp_path) == there
    assert onnx_path.read_bytes() == source


def test_the_inspector_is_refused_before_the_build(build, tmp_path, capsys):
    assert build("--inspect") == 2
    assert "--inspect needs a GPU" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}


def test_native_deform_conv_is_refused_with_a_cure(build, onnx_path, tmp_path, capsys):
    write_small_model(onnx_path, deform=True)
    assert build() == 2
    assert "export with --deform_conv gridsample" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}


def test_a_file_for_another_program_is_refused_with_a_cure(build, onnx_path, tmp_path, capsys):
    write_small_model(onnx_path, metadata={"io": "opencv"})
    assert build() == 2
    assert "exported with --io opencv" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}


def test_what_the_parser_refuses_is_said_whole_and_leaves_nothing(
    build, onnx_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(engine_module, "check_source", lambda source, target: "")
    write_small_model(onnx_path, deform=True)
    assert build() == 2
    said = capsys.readouterr().err
    assert f"TensorRT for RTX {trt.__version__} cannot parse" in said
    assert "my_DeformConv" in said
    assert files(tmp_path) == {"model.onnx"}


def test_what_the_builder_refuses_is_one_sentence_and_leaves_nothing(
    build, onnx_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(engine_module, "check_source", lambda source, target: "")
    write_small_model(onnx_path, height=96, width=64, top_k=4000)
    assert build() == 2
    assert "K exceeds the maximum value allowed (3840)" in capsys.readouterr().err
    assert files(tmp_path) == {"model.onnx"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_the_like_cancel_the_build_and_leave_nothing(
    build, tmp_path, monkeypatch, request, number
):
    # nohup and a shell's background start a run with signals ignored, which a build respects.
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, usual)

    def press_ctrl_c(progress, phase, parent, steps):
        start(progress, phase, parent, steps)
        signal.raise_signal(number)

    start = builder_module.Progress.start
    monkeypatch.setattr(builder_module.Progress, "start", press_ctrl_c)
    assert build() == 128 + number
    assert files(tmp_path) == {"model.onnx"}


def test_progress_is_shown(build, capfd):
    assert build() == 0
    assert "Building engine" in capfd.readouterr().err


def test_a_build_by_tensorrt_is_refused_where_it_is_not(build, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build("--builder", "tensorrt") == 2
    assert "[tensorrt]" in capsys.readouterr().err


def test_without_either_library_one_sentence_names_both(build, monkeypatch, capsys):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert build() == 2
    said = capsys.readouterr().err
    assert "no engine can be built here" in said
    assert "[tensorrt]" in said
    assert "[tensorrt-rtx]" in said
    assert said.count("\n") == 1


def test_an_engine_is_not_verified_where_there_is_no_gpu(build, tmp_path, monkeypatch, capsys):
    assert build() == 0
    engine = tmp_path / "model.rtx"
    before = engine.with_name("model.rtx.json").read_text()
    assert run(monkeypatch, "--verify", engine) == 2
    assert "names no photographs" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "driver", lambda: None)
    assert run(monkeypatch, "--verify", engine, "--images", tmp_path) == 2
    assert "no NVIDIA driver" in capsys.readouterr().err
    assert engine.with_name("model.rtx.json").read_text() == before


@pytest.mark.parametrize("option", ["--inspect", "--no_tf32", "--builder tensorrt"])
def test_verify_takes_no_options_of_the_build(tmp_path, monkeypatch, capsys, option):
    assert run(monkeypatch, "--verify", tmp_path / "model.trt", *option.split()) == 2
    assert f"--verify does not use {option.split()[0]}" in capsys.readouterr().err


# an engine that was built without a GPU, verified where there is one


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return folder


@pytest.fixture
def unverified(build, tmp_path, monkeypatch, photographs, onnx_path):
    """A function that puts the engine that was built onto a machine with a GPU.

    There the stand-in runs the ONNX file in its place; the reference is the right model.
    """
    (tmp_path / "model.onnx.json").write_text(json.dumps({"images": str(photographs)}))
    assert build() == 0
    engine = tmp_path / "model.rtx"

    def move(change=lambda path: None):
        monkeypatch.undo()
        use_right_model(monkeypatch, write_small_model(tmp_path / "right.onnx", dynamic=True))
        install(monkeypatch, "11.4", Machine(), rtx=trt.__version__)
        change(onnx_path)
        stand_in(engine, onnx_path)
        return engine

    return move


def stand_in(engine, onnx_path):
    """Put a plan that the stand-in runs in the place of a real one."""
    header = {"version": trt.__version__, "version_compatible": False, "detailed": False}
    engine.write_bytes(pack(onnx_path, **header, profiles=[]))
    manifest = read_manifest(engine) | {"sha256": sha256(engine)}
    engine.with_name(f"{engine.name}.json").write_text(json.dumps(manifest))


def test_an_engine_is_verified_later_on_the_images_of_the_export(unverified, monkeypatch, capsys):
    engine = unverified()
    assert run(monkeypatch, "--verify", engine) == 0
    output = capsys.readouterr()
    assert "within the TF32 tolerance" in output.out
    assert "not been compared" not in output.err
    manifest = read_manifest(engine)
    assert manifest["verified"]["passed"]
    assert manifest["verified"]["images"].endswith("photographs")
    assert manifest["verify_with"] is None
    assert engine.is_file()


def test_an_engine_that_fails_later_becomes_rejected(unverified, monkeypatch, tmp_path, capsys):
    def read_as_nearest(onnx_path):
        model = onnx.load(onnx_path)
        (sample,) = (node for node in model.graph.node if node.op_type == "GridSample")
        sample.attribute[0].s = b"nearest"
        onnx.save(model, onnx_path)

    engine = unverified(read_as_nearest)
    assert run(monkeypatch, "--verify", engine) == 1
    assert not engine.exists()
    assert not engine.with_name("model.rtx.json").exists()
    rejected = tmp_path / "model.rtx.rejected"
    assert not read_manifest(rejected)["verified"]["passed"]


# the real model


def test_the_benchmark_gets_an_engine_of_the_real_model(weights_dir, tmp_path):
    spec = Spec("aliked-t16", top_k=50, precision="fp16", weights=weights_dir)
    if "DeformConv" in operators_of(spec, tmp_path):
        pytest.skip("the default export has native DeformConv, which TensorRT for RTX refuses")
    engine = tmp_path / "engine.rtx"
    build_module.build_model_file(spec, (1, 96, 128), engine)
    manifest = read_manifest(engine)
    assert (manifest["library"], manifest["precision"]) == ("tensorrt-rtx", "FP16")
    assert manifest["judged_by"] == "whoever times it"


def operators_of(spec, tmp_path):
    build_module.build_onnx(spec, (1, 96, 128), tmp_path / "model.onnx")
    return {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


def test_a_request_has_the_librarys_suffix(onnx_path, tmp_path):
    assert engine_module.convert(Request(onnx_path, builder="tensorrt-rtx", verify=False))
    assert (tmp_path / "model.rtx").is_file()
