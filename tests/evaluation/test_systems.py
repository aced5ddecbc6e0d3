"""Features that are extracted once and kept, and the systems that they are of."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from aliked.configs import Selection
from aliked.errors import InputError
from aliked.features import Features
from aliked.images import load_image
from aliked.matching import match_mutual
from benchmark.process import TaskFailed
from evaluation import systems
from evaluation.homography import Homography
from evaluation.pairs import MUTUAL, Dataset, Image, RatioMatcher, Resize
from evaluation.runner import make_record, open_features
from evaluation.systems import (
    Baseline,
    Machine,
    System,
    SystemFeatures,
    features_key,
    open_matchers,
    systems_from,
)
from tests.helpers.small_models import write_small_model
from tests.helpers.textures import texture

KEY = {"system": {"model": "m", "backend": "b", "precision": "fp32"}, "weights": "12"}
FRAMES = Path(__file__).resolve().parents[2] / "assets" / "sequence_640x480"


class Extractor:
    """Made-up features, counted; it can give up after some images."""

    def __init__(self, keypoints: int = 5, last: int | None = None):
        self.keypoints, self.last, self.calls = keypoints, last, 0

    def __call__(self, image: np.ndarray) -> Features:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        random = np.random.default_rng(int(image.sum()))
        shapes = (self.keypoints, 2), self.keypoints, (self.keypoints, 8)
        return Features(*(random.random(shape, np.float32) for shape in shapes))


def image(seed: int, resize: Resize | None = None) -> Image:
    """A texture."""
    return Image(f"{seed}.png", lambda: texture(32, 48, seed), resize)


def test_features_come_back_as_they_were(tmp_path):
    store = SystemFeatures(tmp_path, KEY, Extractor)
    assert store.extract([image(1), image(2)]) == 2
    expected, found = Extractor()(image(2).load()), store.read(image(2))
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(found, name), values)
        assert getattr(found, name).dtype == values.dtype


def test_nothing_is_extracted_twice_and_then_no_extractor_is_opened(tmp_path):
    SystemFeatures(tmp_path, KEY, Extractor).extract([image(1), image(2)])

    def refuse():
        raise AssertionError("opened")

    assert SystemFeatures(tmp_path, KEY, refuse).extract([image(2), image(1)]) == 0


def keyed(system, machine) -> str:
    """What `features_key` says of a system on a machine."""
    return json.dumps(features_key(system, machine), sort_keys=True)


def test_whatever_decides_the_features_is_in_their_key(tmp_path, monkeypatch):
    """One part changed after the other: another name for the file, so that nothing stale is read"""
    weights, others = tmp_path / "aliked-t16.pth", tmp_path / "others.pth"
    monkeypatch.setattr(systems, "find_weights", lambda name, path: path)
    weights.write_bytes(b"weights")
    others.write_bytes(b"other weights")
    model = write_small_model(tmp_path / "model.onnx")
    machine = Machine("cuda:0", {"gpu": "Some GPU"}, {"torch": "1"}, {}, weights)
    system = System("fused", "cuda", "aliked-t16", "fp16", 500, None, None)
    onnx = System("onnxruntime", "cuda", "aliked-t16", "fp16", 500, None, None)
    keys = {
        "as it is": keyed(system, machine),
        "precision": keyed(replace(system, precision="fp32"), machine),
        "top_k": keyed(replace(system, top_k=600), machine),
        "threshold": keyed(replace(system, top_k=0, scores_th=0.2, n_limit=500), machine),
        "backend": keyed(replace(system, backend="pytorch"), machine),
        "model": keyed(replace(system, model="aliked-n16"), machine),
        "versions": keyed(system, replace(machine, versions={"torch": "2"})),
        "GPU": keyed(system, replace(machine, facts={"gpu": "Another GPU"})),
        "weights": keyed(system, replace(machine, weights=others)),
        "a file": keyed(onnx, replace(machine, model_path=model)),
        "no file": keyed(onnx, machine),
    }
    assert len(set(keys.values())) == len(keys)
    weights.write_bytes(b"weights trained on")
    assert keyed(system, machine) != keys["as it is"]
    model.write_bytes(model.read_bytes() + b" ")
    assert keyed(onnx, replace(machine, model_path=model)) != keys["a file"]
    monkeypatch.setattr(systems, "code_digest", lambda *files: "another version of the code")
    weights.write_bytes(b"weights")
    assert keyed(system, machine) != keys["as it is"]


def test_the_code_of_a_key_is_the_packages_and_that_of_the_baselines(monkeypatch):
    seen = []
    monkeypatch.setattr(systems, "code_digest", lambda *files: seen.extend(files) or "digest")
    (sift,) = systems_from(["sift"], [], "cpu", Selection(500))
    assert features_key(sift, MACHINE)["code"] == "digest"
    assert seen == [Path(systems.__file__)]


@pytest.mark.parametrize(
    "key",
    [
        KEY | {"weights": "34"},
        KEY | {"system": KEY["system"] | {"precision": "fp16"}},
        KEY | {"system": KEY["system"] | {"backend": "c"}},
    ],
)
def test_another_system_or_other_weights_have_features_of_their_own(tmp_path, key):
    SystemFeatures(tmp_path, KEY, Extractor).extract([image(1)])
    assert SystemFeatures(tmp_path, key, Extractor).extract([image(1)]) == 1


def test_features_under_the_name_of_another_system_are_refused(tmp_path):
    SystemFeatures(tmp_path, KEY, Extractor).extract([image(1)])
    other = KEY | {"weights": "34"}
    SystemFeatures(tmp_path, other, Extractor).extract([image(1)])
    first, second = sorted(tmp_path.glob("*.h5"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match=r"has other features \(weights"):
        for key in (KEY, other):
            SystemFeatures(tmp_path, key, Extractor)


def test_a_resized_image_is_another_image(tmp_path):
    store = SystemFeatures(tmp_path, KEY, Extractor)
    assert store.extract([image(1), image(1, Resize("short", 16))]) == 2


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    images = [image(seed) for seed in range(5)]
    with pytest.raises(KeyboardInterrupt):
        SystemFeatures(tmp_path, KEY, lambda: Extractor(last=3)).extract(images)
    assert not list(tmp_path.rglob("*.partial*"))
    rest = Extractor()
    assert SystemFeatures(tmp_path, KEY, lambda: rest).extract(images) == 2
    assert rest.calls == 2


def test_an_image_without_keypoints_can_be_kept(tmp_path):
    store = SystemFeatures(tmp_path, KEY, lambda: Extractor(keypoints=0))
    store.extract([image(1)])
    assert len(store.read(image(1))) == 0
    none = store.read(image(1))
    assert MUTUAL.match(none, none, (64, 48), (64, 48)).indices.shape == (0, 2)


@pytest.fixture(scope="module")
def frames():
    """Two frames of a shipped sequence, at half their size."""
    paths = (FRAMES / "000000.jpg", FRAMES / "000003.jpg")
    return [cv2.resize(load_image(path), (320, 240)) for path in paths]


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_a_baseline_gives_the_best_k_at_unit_length(name, frames):
    found = Baseline(name, 100)(frames[0])
    assert len(found) == 100 and list(found.scores) == sorted(found.scores, reverse=True)
    assert np.linalg.norm(found.descriptors, axis=1) == pytest.approx(np.ones(100), abs=1e-5)


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_a_baseline_finds_nothing_in_an_image_without_texture(name):
    assert len(Baseline(name, 100)(np.full((64, 64, 3), 90, np.uint8))) == 0


def test_orb_is_matched_by_its_hamming_distance(frames):
    """The distances of our matches are those that OpenCV's own matcher finds."""
    first, second = (Baseline("orb", 300)(frame) for frame in frames)
    bits = [np.packbits(f.descriptors > 0, axis=1) for f in (first, second)]
    expected = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(*bits)
    expected = {(m.queryIdx, m.trainIdx) for m in expected}
    found = match_mutual(first.descriptors, second.descriptors, -1)
    ours = {tuple(pair) for pair in found.tolist()}
    # Where two keypoints are equally near, each matcher takes the one that it comes to first.
    assert len(ours & expected) > 0.9 * max(len(ours), len(expected)) > 50
    for i, j in ours:
        nearest = cv2.norm(bits[0][i], bits[1][j], cv2.NORM_HAMMING)
        assert nearest == min(cv2.norm(bits[0][i], other, cv2.NORM_HAMMING) for other in bits[1])


def test_systems_are_every_runtime_with_every_model_and_each_baseline_once():
    texts = ["pytorch", "pytorch:fp16", "sift"]
    found = systems_from(texts, ["aliked-t16", "aliked-n32"], "cpu", Selection(500))
    assert [str(system) for system in found] == [
        "pytorch (CPU) fp32 aliked-t16",
        "pytorch (CPU) fp32 aliked-n32",
        "pytorch (CPU) fp16 aliked-t16",
        "pytorch (CPU) fp16 aliked-n32",
        "OpenCV sift",
    ]


def test_every_system_is_matched_by_every_matcher_and_a_baseline_by_those_that_it_has():
    matchers = ["mutual", "ratio", "lightglue"]
    found = systems_from(["pytorch", "sift"], ["aliked-n16"], "cpu", Selection(500), matchers)
    assert [str(system) for system in found] == [
        "pytorch (CPU) fp32 aliked-n16",
        "pytorch (CPU) fp32 aliked-n16 + ratio test",
        "pytorch (CPU) fp32 aliked-n16 + LightGlue",
        "OpenCV sift",
        "OpenCV sift + ratio test",
    ]
    with pytest.raises(InputError, match=r"64 long.*aliked-n16 or aliked-n16rot or aliked-n32"):
        systems_from(["pytorch"], ["aliked-t16"], "cpu", Selection(500), matchers)


def test_matchers_share_the_features(tmp_path):
    system = systems_from(["sift"], [], "cpu", Selection(500))[0]
    both = [system, replace(system, matcher="ratio")]
    features = open_features(tmp_path, both, MACHINE)
    assert features[both[0]] is features[both[1]]


def test_lightglue_matches_in_the_precision_of_the_system(monkeypatch):
    monkeypatch.setattr(systems.LightGlue, "from_pretrained", lambda *arguments: arguments[2])
    texts, matchers = ["pytorch:fp32", "pytorch:fp16"], ["mutual", "lightglue"]
    found = systems_from(texts, ["aliked-n16"], "cpu", Selection(500), matchers)
    assert list(open_matchers(found, MACHINE).values()) == [MUTUAL, "fp32", MUTUAL, "fp16"]


def test_the_ratio_test_keeps_what_is_clearly_nearest():
    """The second of the first image is 4.8 degrees from one and 5 degrees from another."""
    features = []
    for angles in np.radians([0, 90, 45]), np.radians([10, 95, 60, 85.2]):
        rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        features.append(Features(np.zeros_like(rows), np.ones(len(rows), np.float32), rows))
    sizes = (640, 480), (640, 480)
    assert MUTUAL.match(*features, *sizes).indices.tolist() == [[0, 0], [1, 3], [2, 2]]
    assert RatioMatcher().match(*features, *sizes).indices.tolist() == [[0, 0], [2, 2]]
    for count in (0, 1):  # nothing, and nothing second to it
        few = Features(*(rows[:count] for rows in vars(features[1]).values()))
        assert len(RatioMatcher().match(features[0], few, *sizes)) == count


def test_a_baseline_has_as_many_keypoints_as_the_others_may_have():
    model, orb = systems_from(["pytorch", "orb"], ["aliked-t16"], "cpu", Selection(0, 0.2, 4000))
    assert (model.top_k, model.scores_th, model.n_limit) == (0, 0.2, 4000)
    assert orb.top_k == 4000


@pytest.mark.parametrize("text", ["abacus", "pytorch:fp64", "pytorch-amp:fp32", "surf"])
def test_an_unknown_system_is_named(text):
    with pytest.raises(InputError, match=text.partition(":")[0]):
        systems_from([text], ["aliked-t16"], "cpu", Selection(500))


MACHINE = Machine(
    "cpu", {"cpu": "Some CPU"}, {"onnxruntime": "1"}, {"tensorrt": "it is not installed"}
)


def test_a_runtime_that_runs_files_gets_one_for_each_image_size(tmp_path, monkeypatch, weights_dir):
    """The files are stand-ins, since exporting takes long; the runtime is the real one."""
    made_for = []

    def make(builds):
        (build,) = builds
        size = dict(zip(("height", "width"), build.shape[1:], strict=True))
        made_for.append(size)
        write_small_model(build.path, **size, top_k=20)
        return {build.path: 0.0}

    monkeypatch.setattr(systems, "build_files", make)
    monkeypatch.setattr(systems, "cached_path", lambda row, *_: tmp_path / f"{row.size}.onnx")
    (system,) = systems_from(["onnxruntime-cpu"], ["aliked-t16"], "cpu", Selection(20))
    extractor = systems.open_system(system, replace(MACHINE, weights=weights_dir))
    for height, width in ((32, 48), (40, 56), (32, 48)):
        assert len(extractor(texture(height, width))) == 20
    assert made_for == [{"width": 48, "height": 32}, {"width": 56, "height": 40}]


def test_a_runtime_whose_file_cannot_be_made_says_why(monkeypatch, weights_dir):
    failed = TaskFailed("no kernel for it")
    monkeypatch.setattr(systems, "build_files", lambda builds: {b.path: failed for b in builds})
    (system,) = systems_from(["onnxruntime-cpu"], ["aliked-t16"], "cpu", Selection(20))
    extractor = systems.open_system(system, replace(MACHINE, weights=weights_dir))
    with pytest.raises(InputError, match="cannot be made: no kernel for it"):
        extractor(texture(32, 48))


def test_a_users_model_file_is_used_for_every_size(tmp_path):
    path = write_small_model(tmp_path / "dynamic.onnx", top_k=20, dynamic=True)
    (system,) = systems_from(["onnxruntime-cpu"], ["aliked-t16"], "cpu", Selection(20))
    extractor = systems.open_system(system, replace(MACHINE, model_path=path))
    assert [len(extractor(texture(*size))) for size in ((32, 48), (40, 56))] == [20, 20]


def test_a_system_that_cannot_run_here_is_a_record_that_says_why(tmp_path):
    (system,) = systems_from(["tensorrt"], ["aliked-t16"], "cuda", Selection(20))
    task = Homography(Dataset("data", []), None, 0)
    record = make_record(system, SystemFeatures(tmp_path, KEY, Extractor), MUTUAL, task, MACHINE)
    assert (record["status"], record["reason"]) == ("not run", "it is not installed")
