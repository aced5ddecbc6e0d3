"""Building an engine: what is kept, what is refused, what is said.

By TensorRT 10 and 11 over the stand-in, which packs the ONNX file; by the real TensorRT for RTX
where it is installed, which needs no GPU.
"""

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

from aliked.backends import Spec, tensorrt
from aliked.backends.pytorch import PyTorchExtractor
from aliked.errors import InputError
from aliked.export import build as build_module
from aliked.export import verify
from aliked.files import SCRATCH, scratch_folder, sha256
from tests.helpers.fake_tensorrt import VERSIONS
from tests.helpers.fake_tensorrt.installed import install
from tests.helpers.small_models import use_right_model, write_small_model

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "assets" / "sequence_640x480"


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(3):
        pixels = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), pixels)
    return folder


@pytest.fixture(params=VERSIONS)
def machine(request, monkeypatch):
    machine = install(monkeypatch, request.param)
    machine.version = request.param
    return machine


@pytest.fixture
def onnx_path(tmp_path):
    return write_small_model(tmp_path / "model.onnx")


@pytest.fixture(autouse=True)
def reference(monkeypatch, tmp_path):
    """The right model, in ONNX Runtime, in place of PyTorch with the official weights."""
    use_right_model(monkeypatch, write_small_model(tmp_path / "reference.onnx", dynamic=True))


BY_TENSORRT = ("--builder", "tensorrt")


def run(monkeypatch, *arguments):
    """The script in this process: its exit status."""
    import convert_onnx_to_trt
    from aliked import cli

    command = ["convert_onnx_to_trt.py", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.run(convert_onnx_to_trt.main, convert_onnx_to_trt.parser())
    return end.value.code


@pytest.fixture
def build(monkeypatch, onnx_path, photographs):
    """Run the script on the small model with more options; its exit status."""

    def build(*options, path=onnx_path, images=photographs):
        words = ["--model_onnx_path", path, "--images", images, *options]
        return run(monkeypatch, *words, *(() if "--builder" in options else BY_TENSORRT))

    return build


def header_of(path):
    """The stand-in's own record of how an engine was built."""
    return json.loads(path.read_bytes().removeprefix(b"plan").partition(b"\0")[0])


def manifest_of(path):
    return json.loads(path.with_name(path.name + ".json").read_text())


def left_over(folder):
    return {path.name for path in folder.iterdir()} - {
        "model.onnx",
        "reference.onnx",
        "photographs",
    }


def test_an_engine_is_built_verified_and_kept_with_its_manifest(
    machine, build, tmp_path, onnx_path, capfd
):
    assert build() == 0
    assert left_over(tmp_path) == {"model.trt", "model.trt.json"}
    manifest = manifest_of(tmp_path / "model.trt")
    assert (manifest["library"], manifest["version"]) == ("tensorrt", VERSIONS[machine.version])
    assert manifest["gpu"] == {"name": "Stand-in RTX", "compute_capability": "8.6"}
    assert manifest["source"]["sha256"] == sha256(onnx_path)
    assert manifest["sha256"] == sha256(tmp_path / "model.trt")
    assert manifest["precision"] == "FP32"
    assert manifest["verified"]["passed"]
    output = capfd.readouterr()
    assert "keypoints in common  100.000%" in output.out
    assert header_of(tmp_path / "model.trt")["network_flags"] == ["STRONGLY_TYPED"]


def misread(onnx_path):
    """The file as an engine would be that reads GridSample's mode as nearest neighbour."""
    model = onnx.load(onnx_path)
    (sample,) = (node for node in model.graph.node if node.op_type == "GridSample")
    (mode,) = (attribute for attribute in sample.attribute if attribute.name == "mode")
    mode.s = b"nearest"
    onnx.save(model, onnx_path)


def test_a_wrong_engine_is_kept_only_as_rejected(
    machine, build, tmp_path, monkeypatch, onnx_path, capsys
):
    (tmp_path / "model.trt").write_text("the engine of yesterday")
    misread(onnx_path)  # the descriptors come from other pixels
    assert build() == 1
    assert (tmp_path / "model.trt").read_text() == "the engine of yesterday"
    assert left_over(tmp_path) == {"model.trt", "model.trt.rejected", "model.trt.rejected.json"}
    assert not manifest_of(tmp_path / "model.trt.rejected")["verified"]["passed"]
    assert "descriptor cosine" in capsys.readouterr().out


def test_no_verify_keeps_the_engine_without_images_and_says_so(
    machine, monkeypatch, onnx_path, tmp_path
):
    assert run(monkeypatch, "--model_onnx_path", onnx_path, *BY_TENSORRT, "--no_verify") == 0
    manifest = manifest_of(tmp_path / "model.trt")
    assert manifest["verified"] is None
    assert manifest["verify_with"].startswith("python convert_onnx_to_trt.py --verify")


def test_what_tensorrt_would_misread_stops_the_build(machine, build, onnx_path, tmp_path, capsys):
    write_small_model(onnx_path, opset=20)
    assert build() == 2
    assert "my_GridSample" in capsys.readouterr().err
    assert left_over(tmp_path) == set()


def test_all_options_reach_tensorrt(machine, build, tmp_path):
    options = "--optimization_level 5 --max_workspace_size 64 --version_compatible "
    options += "--hardware_compatible --no_tf32 --max_aux_streams 0 --builder_log verbose"
    assert build(*options.split()) == 0
    header = header_of(tmp_path / "model.trt")
    assert (header["version_compatible"], header["hardware_compatible"]) == (True, True)
    assert "TF32" not in header["flags"]
    assert header["aux_streams"] == 0
    assert header["workspace"] == 64 * 2**20
    manifest = manifest_of(tmp_path / "model.trt")
    assert manifest["max_workspace_size_mib"] == 64
    assert manifest["optimization_level"] == 5
    assert manifest["verified"]["text"][-1] == "within the FP32 tolerance"


def test_an_engine_with_tf32_is_judged_as_such(machine, build, tmp_path):
    assert build() == 0
    assert "TF32" in header_of(tmp_path / "model.trt")["flags"]
    text = manifest_of(tmp_path / "model.trt")["verified"]["text"]
    assert text[-1] == "within the TF32 tolerance"


# precision


def test_an_fp16_file_is_built_strongly_typed(machine, build, onnx_path, tmp_path):
    write_small_model(onnx_path, half=True)
    assert build("--precision_mode", "FP16") == 0
    header = header_of(tmp_path / "model.trt")
    assert header["network_flags"] == ["STRONGLY_TYPED"]
    assert "FP16" not in header["flags"]
    assert (
        manifest_of(tmp_path / "model.trt")["verified"]["text"][-1] == "within the FP16 tolerance"
    )


def test_fp16_of_an_fp32_file_is_version_10s_choice_and_refused_by_11(
    machine, build, tmp_path, capsys
):
    status = build("--precision_mode", "FP16")
    if machine.version == "10.16":
        assert status == 0
        header = header_of(tmp_path / "model.trt")
        assert header["network_flags"] == []
        assert "FP16" in header["flags"]
        assert "--precision fp16" in capsys.readouterr().out
    else:
        assert status == 2
        said = capsys.readouterr().err
        assert "convert_pytorch_to_onnx.py IMAGES --model aliked-t16 --top_k 20" in said
        assert "--precision fp16" in said
        assert left_over(tmp_path) == set()


def test_fp32_of_an_fp16_file_is_refused(machine, build, onnx_path, capsys):
    write_small_model(onnx_path, half=True)
    assert build("--precision_mode", "FP32") == 2
    assert "--precision fp32" in capsys.readouterr().err


def test_the_precision_is_by_default_that_of_the_file(machine, build, onnx_path, tmp_path):
    write_small_model(onnx_path, half=True)
    assert build() == 0
    assert manifest_of(tmp_path / "model.trt")["precision"] == "FP16"


# dynamic shapes

SHAPES = ["--min_shape", "1x3x32x32", "--opt_shape", "1x3x48x64", "--max_shape", "4x3x64x96"]


def test_a_dynamic_file_is_built_with_its_shapes(machine, build, onnx_path, tmp_path):
    write_small_model(onnx_path, dynamic=True)
    assert build(*SHAPES) == 0
    shapes = [[1, 3, 32, 32], [1, 3, 48, 64], [4, 3, 64, 96]]
    assert header_of(tmp_path / "model.trt")["profiles"] == [{"image": shapes}]
    assert manifest_of(tmp_path / "model.trt")["shapes"] == shapes


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ("", "give --min_shape, --opt_shape and --max_shape"),
        ("--min_shape 1x3x32x32 --max_shape 1x3x64x64", "give --min_shape"),
        ("--min_shape 1x3x64x64 --opt_shape 1x3x48x64 --max_shape 1x3x96x96", "not decrease"),
        ("--min_shape 1x1x32x32 --opt_shape 1x3x48x64 --max_shape 1x3x96x96", "does not fit"),
        ("--min_shape 3x32x32 --opt_shape 3x48x64 --max_shape 3x96x96", "does not fit"),
        ("--min_shape 1x3x9x9 --opt_shape 1x3x9x9 --max_shape 1x3x40x40", "photographs"),
        ("--min_shape 1x3x8x8 --opt_shape 1x3x9x9 --max_shape 1x3x64x96", "room for 16 keypoints"),
        ("--min_shape 1x3x1x1 --opt_shape 1x3x9x9 --max_shape 1x3x64x96", "room for 0 keypoints"),
    ],
)
def test_shapes_that_do_not_fit_a_dynamic_file_are_refused(
    machine, build, onnx_path, tmp_path, capsys, shapes, says
):
    write_small_model(onnx_path, dynamic=True)
    assert build(*shapes.split()) == 2
    assert says in capsys.readouterr().err
    assert left_over(tmp_path) == set()


def test_shapes_for_a_static_file_are_refused(machine, build, capsys):
    assert build(*SHAPES) == 2
    assert "fixed input" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["1x3x0x64", "1,3,48,64", "x"])
def test_shapes_that_are_none_are_refused_by_the_command_line(build, machine, bad):
    assert build("--min_shape", bad) == 2


def test_batches_are_verified_whole_with_the_last_one_filled_up(
    machine, build, onnx_path, tmp_path, capsys
):
    write_small_model(onnx_path, batch=2)
    assert build() == 0
    assert "images               3" in capsys.readouterr().out


def test_a_dynamic_engine_is_verified_on_other_sizes_too(
    machine, build, onnx_path, tmp_path, monkeypatch, capsys
):
    write_small_model(onnx_path, dynamic=True)
    assert build(*SHAPES, "--num_images", 2) == 0
    assert "images               4" in capsys.readouterr().out  # two, and a part of each
    # An engine whose columns are wrong wherever the image is not 64 wide.
    model = onnx.load(onnx_path)
    for node in model.graph.node:
        if node.op_type in ("Mod", "Div") and node.input[0].startswith("TopK"):
            node.input[1] = "width"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(64), "width"))
    onnx.save(model, onnx_path)
    assert build(*SHAPES, "--num_images", 2) == 1
    assert "cut to 49x37" in capsys.readouterr().out


def test_a_dynamic_engine_that_mixes_the_images_of_a_batch_is_rejected(
    machine, build, onnx_path, monkeypatch, capsys
):
    write_small_model(onnx_path, dynamic=True)
    model = onnx.load(onnx_path)
    (sample,) = (node for node in model.graph.node if node.op_type == "GridSample")
    first = [
        onnx.helper.make_node("Gather", ["image", "zeros"], ["first"], axis=0),
        onnx.helper.make_node("Sub", ["image", "image"], ["nothing"]),
        onnx.helper.make_node("Add", ["nothing", "first"], ["mixed"]),
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "zeros"))
    sample.input[0] = "mixed"  # descriptors of the first image for all of them
    nodes = [*first, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, onnx_path)
    assert build(*SHAPES) == 1
    assert "descriptor cosine" in capsys.readouterr().out


def test_an_engine_for_uint8_images_is_verified(machine, build, onnx_path):
    write_small_model(onnx_path, uint8=True)
    assert build() == 0


# timing cache, layers


def test_the_timing_cache_is_written_reused_and_bound_to_its_machine(
    machine, build, tmp_path, capsys
):
    cache = tmp_path / "timing.cache"
    assert build("--timing_cache", cache) == 0
    written = cache.read_bytes()
    assert b"Stand-in RTX" in written
    assert build("--timing_cache", cache) == 0
    machine.gpus[0] = ("Another RTX", 8, 9)
    assert build("--timing_cache", cache) == 2
    assert "timing.cache is no timing cache of this" in capsys.readouterr().err
    assert cache.read_bytes() == written


def test_a_damaged_timing_cache_is_refused_and_left_alone(machine, build, tmp_path, capsys):
    cache = tmp_path / "timing.cache"
    cache.write_text("garbage")
    assert build("--timing_cache", cache) == 2
    assert "timing.cache" in capsys.readouterr().err
    assert cache.read_text() == "garbage"


def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(
    machine, build, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("aliked.export.builder.stopped_at_a_step", None)  # around the build
    assert build("--timing_cache", tmp_path / "file" / "timing.cache") == 2
    assert "cannot write into" in capsys.readouterr().err


def test_inspect_writes_the_layers_as_json_and_text(machine, build, tmp_path, capsys):
    assert build("--inspect") == 0
    layers = json.loads((tmp_path / "model.trt.layers.json").read_text())["Layers"]
    table = (tmp_path / "model.trt.layers.txt").read_text().splitlines()
    assert len(table) == len(layers) + 1
    (row,) = (line for line in table if "my_GridSample" in line)
    assert "GridSample" in row.split()
    assert ("Linear Float" if machine.version == "11.4" else "Row FP32") in row
    assert build() == 0  # and a new engine without them leaves none of the old ones
    assert not (tmp_path / "model.trt.layers.json").exists()


def test_layers_without_detail_are_listed_by_name():
    from aliked.export.engine import layer_table

    assert layer_table({"Layers": ["conv1", "conv2"]}).splitlines()[2].split() == ["1", "conv2"]


def test_a_build_removes_what_killed_ones_left_and_nothing_of_others(machine, build, tmp_path):
    code = (
        "import os, pathlib, signal, sys; from aliked.files import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.trt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(f"{SCRATCH}*")
    with scratch_folder(tmp_path) as running:
        assert not left.exists()
        left.mkdir()
        assert build() == 0
        assert running.is_dir()
    assert left_over(tmp_path) == {"model.trt", "model.trt.json"}


# what goes wrong on the machine


def test_an_engine_that_does_not_run_is_kept_only_as_rejected(machine, build, tmp_path, capsys):
    machine.execution_error = "an illegal instruction was encountered"
    assert build() == 2
    assert "an illegal instruction" in capsys.readouterr().err
    assert left_over(tmp_path) == {"model.trt.rejected", "model.trt.rejected.json"}


def test_what_the_verification_lacks_is_found_before_the_build(machine, build, tmp_path, capsys):
    assert build("--memory", "pycuda") == 2
    said = capsys.readouterr().err
    assert "the package pycuda is not installed" in said
    assert "Building Engine" not in said


def test_without_verification_no_pytorch_is_needed(tmp_path, onnx_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import pytest\n"
        "from tests.helpers.fake_tensorrt.installed import install\n"
        "install(pytest.MonkeyPatch(), '11.4')\n"
        "import convert_onnx_to_trt as script\n"
        "words = ['--model_onnx_path', sys.argv[1], '--builder', 'tensorrt', '--no_verify']\n"
        "args = script.parser().parse_args(words)\n"
        "assert script.main(args) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code, onnx_path], check=True, cwd=ROOT)
    assert (tmp_path / "model.trt").is_file()


def test_without_a_gpu_nothing_of_tensorrt_is_touched(machine, build, capsys):
    machine.gpus.clear()
    assert build() == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_without_tensorrt_the_sentence_says_what_to_install(monkeypatch, build, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build() == 2
    assert "[tensorrt]" in capsys.readouterr().err


# bad input


def test_a_file_that_is_no_onnx_is_refused(machine, build, onnx_path, capsys):
    onnx_path.write_text("hello")
    assert build() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_onnx_file_of_other_making_is_refused(machine, build, onnx_path, capsys):
    write_small_model(onnx_path, outputs=("keypoints", "scores"))
    assert build() == 2
    assert (
        "outputs ['keypoints', 'scores'], not image and keypoints, descriptors"
        in capsys.readouterr().err
    )


def test_a_file_that_does_not_say_what_it_is_cannot_be_verified(machine, build, onnx_path, capsys):
    model = onnx.load(onnx_path)
    del model.metadata_props[:]
    onnx.save(model, onnx_path)
    assert build() == 2
    assert "--no_verify" in capsys.readouterr().err
    assert build("--no_verify") == 0


@pytest.mark.parametrize(
    ("key", "value"), [("aliked.top_k", "{"), ("aliked.top_k", '"20"'), ("aliked.model", "3")]
)
def test_metadata_that_are_not_ours_are_refused(machine, build, onnx_path, capsys, key, value):
    model = onnx.load(onnx_path)
    onnx.helper.set_model_props(model, {key: value})
    onnx.save(model, onnx_path)
    assert build() == 2
    assert "the metadata of" in capsys.readouterr().err


def test_images_of_another_size_are_refused_before_the_build(machine, build, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "photographs" / "9.png"), np.zeros((40, 64, 3), np.uint8))
    assert build() == 2
    assert "9.png has 64x40 pixels and the engine takes 64x48" in capsys.readouterr().err


def test_images_without_a_keypoint_are_refused_before_the_build(
    machine, build, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(verify, "FAINT", 2.0)  # as the small model finds keypoints everywhere
    assert build() == 2
    assert "prove nothing" in capsys.readouterr().err
    assert left_over(tmp_path) == set()


def test_missing_images_are_refused(machine, build, monkeypatch, onnx_path, tmp_path, capsys):
    assert build(images=tmp_path / "nowhere") == 2
    assert run(monkeypatch, "--model_onnx_path", onnx_path, *BY_TENSORRT) == 2
    assert "--no_verify" in capsys.readouterr().err
    assert build("--no_verify", images=tmp_path / "nowhere") == 2  # a later --verify would
    assert "cannot list the images of" in capsys.readouterr().err
    assert left_over(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_refused(machine, build, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert build("--model_trt_path", tmp_path / "file" / "model.trt") == 2
    assert "cannot write" in capsys.readouterr().err


def test_deform_conv_and_version_compatible_engines_exclude_each_other(
    machine, build, onnx_path, capsys
):
    write_small_model(onnx_path, deform=True)
    assert build() == 0
    assert build("--version_compatible") == 2
    assert "my_DeformConv" in capsys.readouterr().err


# the real model


@pytest.fixture
def real_photographs(tmp_path):
    """Two parts of a shipped frame, small enough to be quick."""
    (tmp_path / "parts").mkdir()
    frame = cv2.imread(str(ASSETS / "000000.jpg"))
    for index, (y, x) in enumerate([(100, 100), (200, 300)]):
        cv2.imwrite(str(tmp_path / "parts" / f"{index}.png"), frame[y : y + 96, x : x + 128])
    return tmp_path / "parts"


@pytest.fixture(scope="module")
def exported(weights_dir, tmp_path_factory):
    """A function that exports the real model once per precision and batch."""
    folder = tmp_path_factory.mktemp("exports")

    @functools.cache
    def export(precision: str, batch: int) -> Path:
        spec = Spec(model="aliked-t16", top_k=50, precision=precision, weights=weights_dir)
        path = folder / f"{precision}-{batch}.onnx"
        build_module.build_onnx(spec, (batch, 96, 128), path)
        return path

    return export


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 1), ("fp16", 2)])
def test_an_engine_of_the_real_model_is_that_model(
    exported, weights_dir, machine, monkeypatch, build, tmp_path, real_photographs, precision, batch
):
    monkeypatch.setattr("aliked.export.verify.PyTorchExtractor", PyTorchExtractor)
    engine = tmp_path / "real.trt"
    options = ["--model_trt_path", engine, "--no_tf32", "--weights", weights_dir]
    for name in ("min", "opt", "max") if batch > 1 else ():
        options += [f"--{name}_shape", f"{batch}x96x128x3"]
    assert build(*options, path=exported(precision, batch), images=real_photographs) == 0
    text = manifest_of(engine)["verified"]["text"]
    assert text[-1] == f"within the {precision.upper()} tolerance"
    assert "100 in the reference" in text[1]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_benchmark_gets_an_engine_without_tf32(machine, monkeypatch, tmp_path, batch):
    monkeypatch.setattr(
        build_module,
        "build_onnx",
        lambda spec, shape, path: write_small_model(path, dynamic=shape[0] > 1, uint8=True),
    )
    engine, images = tmp_path / "engine.trt", np.zeros((batch, 48, 64, 3), np.uint8)
    build_module.build_engine(Spec(), images.shape[:3], engine)
    assert "TF32" not in header_of(engine)["flags"]
    extractor = tensorrt.TensorRTExtractor(engine)
    assert extractor.limits() == (images.shape, images.shape)
    assert len(extractor.extract_batch(images)) == batch


def test_an_unknown_memory_is_refused(machine, tmp_path):
    from aliked.backends.cuda_memory import create_memory

    with pytest.raises(InputError, match="torch, pycuda"):
        create_memory("host", 0)
