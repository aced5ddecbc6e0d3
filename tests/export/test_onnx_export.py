"""Exported files are the model: in every form, at every size, through the contract they promise."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from aliked import cli
from aliked.backends import Spec
from aliked.backends.onnxruntime import ONNXRuntimeExtractor
from aliked.commands import export as script
from aliked.configs import Form
from aliked.errors import InputError
from aliked.export import onnx_export, verify
from aliked.export.engine import read_source
from aliked.export.onnx_checks import check_file
from aliked.export.onnx_export import ExportOptions, export_onnx
from aliked.export.verify import verify_onnx
from aliked.images import list_images, load_image
from aliked.model import ALIKED
from aliked.parity import FP32, Verdict, compare_features, judge

NAME = "aliked-t16"
FRAMES = "assets/sequence_640x480"


@pytest.fixture(scope="module")
def photograph():
    """A part of a shipped frame whose sides are not multiples of 32."""
    image = load_image(list_images(FRAMES)[0])
    return image[100:333, 50:361].copy()


@pytest.fixture(scope="module")
def model(weights_dir):
    """The smallest model, which the tests export again and again."""
    return ALIKED.from_pretrained(NAME, top_k=300, weights=weights_dir)


def options(image, **changes):
    return ExportOptions(height=image.shape[0], width=image.shape[1], **changes)


@pytest.mark.parametrize(
    ("selection", "sampling", "precision", "changes"),
    [
        ({"top_k": 300}, "gridsample", "fp32", {}),
        ({"top_k": 300}, "gridsample", "fp16", {}),
        ({"top_k": 300}, "gridsample", "fp32", {"opset": 17, "deform_conv": "gridsample"}),
        ({"top_k": 300}, "gather", "fp16", {"opset": 17, "deform_conv": "gather"}),
        ({"top_k": 300}, "gather", "fp32", {"opset": 18, "deform_conv": "gather"}),
        ({"top_k": 300}, "gridsample", "fp32", {"dynamic": True}),
        ({"top_k": 300}, "gridsample", "fp32", {"deform_conv": "native"}),
        ({"scores_th": 0.2, "n_limit": 500}, "gridsample", "fp32", {"uint8_input": True}),
        ({"top_k": 5000}, "gridsample", "fp32", {}),  # more than one TopK of TensorRT can return
        ({"top_k": 200}, "gridsample", "fp32", {"io": "colmap"}),
        (
            {"top_k": 200},
            "gridsample",
            "fp32",
            {"io": "colmap", "deform_conv": "native"},
        ),
        ({"top_k": 200}, "gather", "fp32", {"io": "colmap", "opset": 17, "deform_conv": "gather"}),
        ({"top_k": 200}, "gridsample", "fp32", {"io": "opencv"}),
    ],
)
def test_an_exported_file_gives_the_features_of_pytorch(
    selection, sampling, precision, changes, photograph, weights_dir, tmp_path
):
    exported = ALIKED.from_pretrained(NAME, **selection, weights=weights_dir, precision=precision)
    exported.form = Form(sampling)
    reference = ALIKED.from_pretrained(NAME, **selection, weights=weights_dir)
    path, settings = tmp_path / "model.onnx", options(photograph, **changes)
    export_onnx(exported, path, settings)
    verdict = verify_onnx(path, reference, precision, settings, [("photograph", photograph)])
    assert verdict.passed, verdict.text
    if settings.io == "default":
        assert read_source(path).precision == precision.upper()


# torch.export, which writes the native operator, takes most of a minute where sizes stay symbolic:
# once here, and once in COLMAP's file above, whose input is float.
@pytest.mark.parametrize(
    "changes",
    [
        {"deform_conv": "native", "uint8_input": True},
        {"opset": 17},
        {"opset": 17, "uint8_input": True},
    ],
)
def test_one_dynamic_file_serves_three_sizes_and_a_batch(changes, photograph, model, tmp_path):
    path = tmp_path / "dynamic.onnx"
    export_onnx(model, path, options(photograph, dynamic=True, **changes))
    assert read_source(path).precision == "FP32"
    assert not [finding for finding in check_file(path) if finding.severity == "error"]
    extract = ONNXRuntimeExtractor(Spec(NAME, top_k=300, device="cpu", model_path=path))
    for height, width in ((233, 311), (96, 128), (150, 77)):
        image = photograph[:height, :width].copy()
        verdict = judge({"": compare_features(model(image), extract(image))}, FP32)
        assert verdict.passed, verdict.text
    images = np.stack((photograph, photograph[::-1]))
    outputs = extract.infer(extract.to_device(images))
    for i, image in enumerate(images):
        rows = (outputs[name].numpy()[i] for name in ("keypoints", "descriptors", "scores"))
        alone = extract(image.copy())
        for together, one in zip(
            rows, (alone.keypoints, alone.descriptors, alone.scores), strict=True
        ):
            np.testing.assert_allclose(together, one, atol=2e-4)  # a float32 step of x is 3e-5


def test_a_file_that_is_not_what_was_asked_for_is_refused(photograph, model, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(model, path, options(photograph))

    def refused(words, image=None, **changes):
        with pytest.raises(InputError, match=words):
            extract = ONNXRuntimeExtractor(
                Spec(**{"model": NAME, "top_k": 300, "device": "cpu", "model_path": path} | changes)
            )
            extract(image)

    refused("holds aliked-t16, not aliked-n16; pass --model aliked-t16", model="aliked-n16")
    refused("gives 300 keypoints", top_k=301)
    refused("not exported for --top_k 0 --scores_th 0.2", top_k=0)
    refused("was exported for 311x233", image=photograph[:100])
    export_onnx(model, path, options(photograph, dynamic=True))
    refused("which has room for 256 keypoints", image=photograph[:20, :20].copy())


def test_colmap_limits_act_when_the_file_runs(photograph, model, tmp_path):
    path = tmp_path / "colmap.onnx"
    export_onnx(model, path, options(photograph, io="colmap"))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {tensor.name: (tensor.type, tensor.shape) for tensor in session.get_inputs()}
    assert inputs == {
        "image": ("tensor(float)", [1, 3, "height", "width"]),
        "max_keypoints": ("tensor(int64)", []),
        "min_score": ("tensor(float)", []),
    }
    assert [tensor.name for tensor in session.get_outputs()] == [
        "keypoints",
        "descriptors",
        "scores",
    ]

    def run(height, width, max_keypoints, min_score):
        image = photograph[:height, :width].transpose(2, 0, 1)[None].astype(np.float32) / 255
        limits = {
            "max_keypoints": np.array(max_keypoints),
            "min_score": np.array(min_score, np.float32),
        }
        return session.run(None, {"image": image, **limits})

    keypoints, descriptors, scores = run(224, 288, 50, 0)
    assert keypoints.shape == (1, 50, 2)
    assert descriptors.shape == (1, 50, 64)
    assert scores.shape == (1, 50)
    assert np.abs(keypoints).max() <= 1
    few = run(96, 160, 10**6, 0.5)[2]
    assert 0 < few.shape[1] < run(96, 160, 10**6, 0.1)[2].shape[1]
    for none in (run(96, 160, 100, 1.0), run(96, 160, 0, 0)):
        assert [rows.shape for rows in none] == [(1, 0, 2), (1, 0, 64), (1, 0)]


def test_images_without_a_keypoint_prove_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "open_exported", lambda *_: model)
    for image in (np.zeros((5, 5, 3), np.uint8), np.full((64, 64, 3), 128, np.uint8)):
        with pytest.raises(InputError, match="prove nothing"):
            verify_onnx(tmp_path, model, "fp32", options(image), [("flat", image)])


def test_threads_export_one_after_the_other_and_leave_the_model_alone(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, inside, before = ALIKED(NAME, top_k=10).eval(), [], Form()

    def exporter(graph, *_):
        inside.append(graph)
        time.sleep(0.05)
        assert graph is inside[-1]  # nobody else has begun meanwhile
        assert graph.model.form.exported
        assert model.form == before
        raise InputError("enough")

    monkeypatch.setattr(onnx_export, "export_standard", exporter)
    image = np.zeros((64, 64, 3), np.uint8)

    def export(name: str) -> None:
        with pytest.raises(InputError, match="enough"):
            export_onnx(model, tmp_path / name, options(image))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(export, "abcd"))
    assert len(inside) == 4
    assert not list(tmp_path.iterdir())


def test_an_older_opencv_cannot_check_its_file(model, tmp_path, monkeypatch):
    monkeypatch.delattr(cv2, "ALIKED", raising=False)
    with pytest.raises(InputError, match="install OpenCV 5"):
        verify.open_exported(tmp_path, model, ExportOptions(64, 64, io="opencv"))


def test_threshold_mode_has_a_score_to_cut_on(photograph, weights_dir, tmp_path):
    model = ALIKED.from_pretrained(NAME, top_k=0, scores_th=0.2, n_limit=500, weights=weights_dir)
    path = tmp_path / "threshold.onnx"
    export_onnx(model, path, options(photograph))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = photograph.transpose(2, 0, 1)[None].astype(np.float32) / 255
    scores, nms_scores = session.run(["scores", "nms_scores"], {"image": image})
    assert scores.shape == nms_scores.shape == (1, 500)
    assert ((nms_scores > 0.2) | (nms_scores == 0)).all()
    assert (np.diff(nms_scores) <= 0).all()
    assert ((scores > 0) == (nms_scores > 0)).all()


def run_script(*arguments):
    """The script's exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert_pytorch_to_onnx.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.run(script.main, script.parser())
    return exited.value.code


def test_the_script_writes_a_checked_file_and_its_manifest(weights_dir, tmp_path, capsys):
    path = tmp_path / "new" / "t16.onnx"
    status = run_script(
        *(FRAMES, "--model", NAME, "--weights", weights_dir, "--model_output", path),
        *("--opset_version", 17, "--verbose", "--top_k", 500, "--num_images", 2),
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "within the FP32 tolerance" in printed
    assert "keypoints in common  100.000%" in printed
    manifest = json.loads((tmp_path / "new" / "t16.onnx.json").read_text())
    assert manifest["model"] == NAME
    assert manifest["opset"] == 17
    assert len(manifest["weights"]["sha256"]) == 64
    assert sorted(p.name for p in path.parent.iterdir()) == ["t16.onnx", "t16.onnx.json"]
    onnx.checker.check_model(path, full_check=True)


def test_a_wrong_file_is_kept_as_rejected_and_the_old_one_stays(
    weights_dir, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "t16.onnx"
    path.write_bytes(b"an earlier, good file")
    wrong = Verdict(["image: keypoints in common 0.5 < 0.998"], "outside the FP32 tolerance")
    monkeypatch.setattr(script, "verify_onnx", lambda *_: wrong)
    status = run_script(
        *(FRAMES, "--model", NAME, "--weights", weights_dir, "--model_output", path),
        *("--num_images", 1),
    )
    assert status == 1
    assert "outside the FP32 tolerance" in capsys.readouterr().out
    assert path.read_bytes() == b"an earlier, good file"
    assert (tmp_path / "t16.onnx.rejected").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "nowhere"),
        (["{tmp}/empty"], "no image"),
        (["{tmp}/two_sizes"], "has 40x30 pixels but"),
        ([FRAMES, "--opset_version", "20"], "nearest neighbour"),
        ([FRAMES, "--opset_version", "16"], "17, 18 or 19"),
        ([FRAMES, "--opset_version", "18", "--deform_conv", "native"], "no DeformConv"),
        ([FRAMES, "--model", "aliked-n17"], "unknown model"),
        ([FRAMES, "--top_k", "1000000"], "more than a 640x480 image can give"),
        ([FRAMES, "--top_k", "0"], "pass --scores_th"),
        ([FRAMES, "--top_k", "0", "--scores_th", "0.2", "--n_limit", "0"], "n_limit"),
        ([FRAMES, "--model", "aliked-n16"], "pass --model aliked-t16"),
        ([FRAMES, "--model_output", "{tmp}/file/model.onnx"], "cannot write"),
        ([FRAMES, "--model_output", "{tmp}/model.pt"], "name of an .onnx file"),
        ([FRAMES, "--io", "colmap", "--uint8_input"], "leave out --uint8_input"),
        ([FRAMES, "--io", "colmap", "--top_k", "0", "--scores_th", "0.2"], "leave out --top_k 0"),
        ([FRAMES, "--io", "opencv", "--dynamic"], "leave out --dynamic"),
        ([FRAMES, "--io", "opencv", "--amp"], "leave out --precision fp16"),
        ([FRAMES, "--io", "opencv", "--deform_conv", "native"], "leave out --deform_conv native"),
        ([FRAMES, "--amp", "--precision", "fp32"], "--amp means --precision fp16, not fp32"),
        ([FRAMES, "--portable", "--deform_conv", "native"], "means --deform_conv gather"),
        ([FRAMES, "--portable", "--sampling", "gridsample"], "means --sampling gather"),
        ([FRAMES, "--n_limit", "20"], "--n_limit"),
        ([FRAMES, "--model_output", "{tmp}/" + "n" * 240 + ".onnx"], "is too long"),
        ([FRAMES, "--model_output", "{tmp}/" + "é" * 120 + ".onnx"], "is too long"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(
    arguments, words, weights_dir, tmp_path, capsys
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "two_sizes").mkdir()
    cv2.imwrite(str(tmp_path / "two_sizes" / "1.png"), np.zeros((30, 30, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "two_sizes" / "2.png"), np.zeros((30, 40, 3), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    defaults = ["--model", NAME, "--weights", f"{weights_dir}/{NAME}.pth"]
    defaults += ["--model_output", f"{tmp_path}/model.onnx"]
    assert run_script(*defaults, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
