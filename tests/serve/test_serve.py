"""A model repository in a real tritonserver, asked by an ordinary tritonclient."""

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from aliked.backends import Spec, create_extractor
from aliked.errors import InputError
from aliked.images import load_image
from aliked.matching import match_mutual
from serve import client as script
from serve import repository
from serve.client import Client, Load, measure
from tests.helpers import triton_server
from tests.helpers.small_models import write_small_model

ROOT = Path(__file__).resolve().parents[2]
FRAMES = sorted((ROOT / "assets/sequence_640x480").glob("*.jpg"))[:3]
TOP_K = 100


def write(folder: Path, *options) -> Path:
    """A model repository."""
    arguments = [folder, "--device", "cpu", "--top_k", TOP_K, *options]
    repository.main(repository.parser().parse_args(list(map(str, arguments))))
    return folder


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> list[Path]:
    """Two photographs of one size, small enough for a processor, and one of another."""
    folder = tmp_path_factory.mktemp("frames")
    for index, path in enumerate(FRAMES):
        size = (320, 240) if index < 2 else (256, 160)
        cv2.imwrite(str(folder / path.name), cv2.resize(cv2.imread(str(path)), size))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> str:
    """HOST:PORT of a server with all models that it can load."""
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    if triton_server.wheel() is None:
        pytest.skip("nvidia-pytriton, which has a tritonserver, is not installed")
    environment = triton_server.environment()
    if environment is None:
        pytest.skip(
            "the tritonserver of nvidia-pytriton needs NumPy 1: name a virtual environment with "
            "it, PyTorch and OpenCV in ALIKED_TRITON_ENV"
        )
    scratch = tmp_path_factory.mktemp("triton")
    options = ("--environment", environment, "--max_batch", 4, "--device", "auto")
    folder = write(scratch / "models", *options)
    with triton_server.serving(folder, scratch) as url:
        yield url


@pytest.fixture(scope="module")
def expected(frames) -> list:
    """The same features without a server."""
    extractor = create_extractor("pytorch", Spec(device="cpu", top_k=TOP_K))
    return [extractor.extract_batch(load_image(path)[None])[0] for path in frames]


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    # In another batch a convolution may round differently.
    np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=1e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
    np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-3)


def test_files_and_pixels_give_the_features_of_the_extractor(server, frames, expected):
    client = Client(server)
    for path, features in zip(frames, expected, strict=True):
        assert_same(client.extract(path.read_bytes()), features)
        assert_same(client.extract(load_image(path)), features)


def test_images_of_several_sizes_at_the_same_time(server, frames, expected):
    """What the server puts into one batch comes back to who asked for it."""
    count = 0

    def ask(index: int):
        client, path = Client(server), frames[index % 3]

        def call():
            nonlocal count
            assert_same(client.extract(path.read_bytes()), expected[index % 3])
            count += 1

        return call

    load = measure(ask, 6, 1.5)
    assert len(load.latencies) + 1 == count and load.refused == 0


def test_one_request_of_several_images(server, frames, expected):
    import tritonclient.grpc as triton

    given = triton.InferInput("image", [3, 1], "BYTES")
    given.set_data_from_numpy(np.array([[p.read_bytes()] for p in frames], dtype=object))
    answer = triton.InferenceServerClient(server).infer("aliked", [given])
    for index, features in enumerate(expected):
        np.testing.assert_allclose(
            answer.as_numpy("keypoints")[index][: len(features)], features.keypoints, atol=1e-2
        )
        assert (answer.as_numpy("scores")[index] > 0).sum() == len(features)


def test_two_images_give_features_and_matches(server, frames, expected):
    first, second, matches = Client(server).match(*(p.read_bytes() for p in frames[:2]))
    assert_same(first, expected[0])
    assert_same(second, expected[1])
    descriptors = first.descriptors, second.descriptors
    np.testing.assert_array_equal(matches, match_mutual(*descriptors, 0.75))
    assert len(matches) > 10


def test_a_bad_request_gets_an_error_of_its_own(server, frames, expected):
    client = Client(server)
    with pytest.raises(InputError, match="the image is truncated, damaged"):
        client.extract(b"no image")
    with pytest.raises(InputError, match="the image is 4x4 pixels"):
        client.extract(np.zeros((4, 4, 3), np.uint8))
    for image in (np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3)), np.zeros(40, np.uint8)):
        with pytest.raises(InputError, match="give uint8"):
            client.extract(image)
    with pytest.raises(InputError, match="the image is truncated, damaged"):
        client.match(frames[0].read_bytes(), b"")
    with pytest.raises(InputError, match="unknown model"):
        client.extract(b"", model="nowhere")
    assert_same(client.extract(frames[0].read_bytes()), expected[0])


def test_an_image_without_a_feature_has_no_match(server, frames):
    """Of one colour: whatever is found there, the answer has its shape."""
    black = cv2.imencode(".png", np.zeros((64, 64, 3), np.uint8))[1].tobytes()
    first, _, matches = Client(server).match(black, frames[0].read_bytes())
    assert first.keypoints.shape[1] == 2 and matches.shape[1:] == (2,)


def test_the_client_names_the_images_that_it_asks_for(server, frames, tmp_path, capsys):
    def ask() -> str:
        script.main(script.parser().parse_args([server, str(tmp_path)]))
        return capsys.readouterr().out

    shutil.copy(frames[0], tmp_path / "0.jpg")
    assert ask() == f"0.jpg: {TOP_K} keypoints\n"
    shutil.copy(frames[1], tmp_path / "1.jpg")
    assert ask().startswith(f"0.jpg - 1.jpg: {TOP_K} and {TOP_K} keypoints, ")
    (tmp_path / "2.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"1\.jpg - 2\.jpg: the server refuses: .* is truncated"):
        ask()


def test_the_load_test_prints_a_row_for_each_number_of_clients(server, frames):
    command = [sys.executable, "-m", "serve.client", server, str(frames[0].parent)]
    result = subprocess.run(
        [*command, "--load", "1", "2", "--seconds", "0.5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.split()[:2] == ["concurrency", "requests/s"]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert all(float(row.split()[1]) > 0 and row.split()[-1] == "0" for row in rows)


def test_no_server_is_one_sentence():
    pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
    with pytest.raises(InputError, match="no Triton server is ready at 127"):
        Client(f"127.0.0.1:{triton_server.free_port()}")


def test_percentiles_are_those_of_the_latencies():
    load = Load(4, 2.0, np.arange(1, 101) / 1000, refused=3)
    assert load.row().split() == ["4", "50.0", "50.5", "90.1", "99.0", "3"]


def test_refused_requests_are_counted_and_not_timed():
    def ask(index):
        calls = iter(range(10**9))

        def call():
            if next(calls) % 2:
                raise InputError("no")

        return call

    load = measure(ask, 2, 0.05)
    assert load.refused > 0 and abs(load.refused - len(load.latencies)) <= 2

    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        measure(lambda index: refuse, 1, 0.01)


def parsed(folder: Path, model: str):
    """A configuration, read by Triton's own schema."""
    schema = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed"
    )
    from google.protobuf import text_format

    return text_format.Parse((folder / model / "config.pbtxt").read_text(), schema.ModelConfig())


def tensors(given) -> dict:
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in given}


FP32, UINT8 = 11, 2  # of Triton's DataType


@pytest.mark.parametrize("uint8", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_configurations_of_onnx_and_tensorrt_are_of_tritons_schema(tmp_path, dynamic, uint8):
    """This server has no backend for them: their tensors are those of the exported file."""
    onnx = write_small_model(tmp_path / "m.onnx", dynamic=dynamic, uint8=uint8)
    engine = tmp_path / "m.trt"
    engine.write_bytes(b"plan")
    folder = write(tmp_path / "models", "--onnx", onnx, "--engine", engine, "--device", "auto")
    for model, runtime, file in (
        ("aliked_onnx", ("onnxruntime", ""), "model.onnx"),
        ("aliked_tensorrt", ("", "tensorrt_plan"), "model.plan"),
    ):
        config = parsed(folder, model)
        assert config.name == model and (config.backend, config.platform) == runtime
        assert (folder / model / "1" / file).read_bytes() == (
            onnx if file == "model.onnx" else engine
        ).read_bytes()
        size = [-1, -1] if dynamic else [48, 64]
        image = [*size, 3] if uint8 else [3, *size]
        kind = UINT8 if uint8 else FP32
        if dynamic:
            assert config.max_batch_size == 16 and config.HasField("dynamic_batching")
            assert tensors(config.input) == {"image": (kind, image)}
            assert [len(t.dims) for t in config.output] == [2, 2, 1]
        else:
            assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
            assert tensors(config.input) == {"image": (kind, [1, *image])}
        assert [t.name for t in config.output] == ["keypoints", "descriptors", "scores"]


def test_configurations_of_the_python_models_are_of_tritons_schema(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").touch()
    folder = write(tmp_path / "models", "--environment", tmp_path)
    config = parsed(folder, "aliked")
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert tensors(config.output)["descriptors"] == (FP32, [-1, 64])
    assert config.parameters["EXECUTION_ENV_PATH"].string_value == str(tmp_path)
    pair = parsed(folder, "aliked_pair")
    assert [step.model_name for step in pair.ensemble_scheduling.step] == [
        "aliked",
        "aliked",
        "aliked_matcher",
    ]
    parsed(folder, "aliked_matcher")


@pytest.mark.parametrize(
    ("device", "kind", "gpus"),
    [("auto", "AUTO", []), ("cpu", "CPU", []), ("cuda", "GPU", []), ("cuda:1", "GPU", [1])],
)
def test_a_model_runs_on_the_device_that_is_asked_for(tmp_path, device, kind, gpus):
    config = parsed(write(tmp_path / "models", "--device", device), "aliked")
    (group,) = config.instance_group
    assert group.Kind.Name(group.kind) == f"KIND_{kind}" and list(group.gpus) == gpus


REFUSED = {
    "pass --onnx as well": ("--engine", "m.trt"),
    "cannot be read as an ONNX file": ("--onnx", "file"),
    "unknown model": ("--model", "aliked-x"),
    "unknown device": ("--device", "gpu"),
    "fused cannot run on cpu; pass --device cuda": ("--backend", "fused"),
    "--engine cannot run on cpu": ("--engine", "m.trt", "--onnx", "m.onnx"),
    "pass --model_path FILE.onnx": ("--backend", "onnxruntime"),
    "pytorch does not run file": ("--model_path", "file"),
    "is no virtual environment": ("--environment", "."),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_served_is_refused(tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no ONNX file")
    with pytest.raises(InputError, match=reason):
        write(Path("models"), *REFUSED[reason])
    with pytest.raises(InputError, match="is not empty"):
        write(tmp_path)
    assert not Path("models").exists()


def test_options_of_the_load_test_need_it(tmp_path):
    for option in (("--pairs",), ("--seconds", "3")):
        with pytest.raises(InputError, match=f"{option[0]} needs --load"):
            script.main(script.parser().parse_args(["127.0.0.1:1", str(tmp_path), *option]))
