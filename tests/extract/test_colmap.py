"""What COLMAP finds in a database of ours: compared with its own rules, and mapped."""

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aliked import colmap as module
from aliked.backends import Spec
from aliked.colmap import (
    Cameras,
    exhaustive_pairs,
    in_colmap,
    read_pairs,
    sequential_pairs,
    write_features,
    write_matches,
)
from aliked.errors import InputError
from aliked.extraction import Job, extract
from aliked.features import Features
from aliked.matching import MutualMatcher, match_mutual
from aliked.store import FeatureStore
from tests.helpers.photos import noise, write_photo

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
ROOT = Path(__file__).resolve().parents[2]
SCENE = ROOT / "assets/scene_640x480"
KEY = {"model": "a"}
PHONE = {"t0x10f": "Maker", "t0x110": "Phone", "t0x920a": 4.0, "t0xa405": 28}


def features(seed: int, count: int = 30) -> Features:
    random = np.random.default_rng(seed)
    descriptors = random.normal(size=(count, 128)).astype(np.float32)
    return Features(
        (random.random((count, 2)) * 60).astype(np.float32),
        random.random(count, np.float32),
        descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True),
    )


def stored(folder: Path, names: list[str], size=(64, 48)) -> FeatureStore:
    path = folder.with_suffix(".h5")
    with FeatureStore.open(path, KEY) as store:
        for seed, name in enumerate(names):
            if name not in store:
                store.write(name, features(seed), size)
    return FeatureStore.open(path, KEY)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photographs of one phone, one of it turned, and two that say nothing."""
    folder = tmp_path / "photos"
    write_photo(folder / "a/1.jpg", noise(1), **PHONE)
    write_photo(folder / "a/2.jpg", noise(2), **PHONE, t0x112=6)
    write_photo(folder / "b/1.png", noise(3))
    write_photo(folder / "b/2.png", noise(4))
    return folder


NAMES = ["a/1.jpg", "a/2.jpg", "b/1.png", "b/2.png"]


@pytest.fixture
def database(tmp_path, photos) -> Path:
    path = tmp_path / "database.db"
    write_features(path, stored(photos, NAMES), photos, "aliked-n16rot", Cameras())
    return path


def read_all(path: Path) -> dict:
    """All that COLMAP reads from a database."""
    with pycolmap.Database.open(path) as db:
        images = {image.name: image for image in db.read_all_images()}
        return {
            "images": {n: (i.image_id, i.camera_id, i.frame_id) for n, i in images.items()},
            "keypoints": {n: db.read_keypoints(i.image_id).tolist() for n, i in images.items()},
            "descriptors": {
                n: db.read_descriptors(i.image_id).data.tolist() for n, i in images.items()
            },
            "matches": [array.tolist() for array in db.read_all_matches()[1]],
            "cameras": [str(camera) for camera in db.read_all_cameras()],
            "frames": len(db.read_all_frames()),
            "rigs": len(db.read_all_rigs()),
            "priors": [str(prior) for prior in db.read_all_pose_priors()],
        }


def test_features_are_in_the_form_of_colmaps_own_extractor(database, photos):
    store = stored(photos, NAMES)
    with pycolmap.Database.open(database) as db:
        assert [image.name for image in db.read_all_images()] == NAMES
        for image in db.read_all_images():
            expected = store.read(image.name)
            keypoints = db.read_keypoints(image.image_id)
            np.testing.assert_array_equal(keypoints[:, :2], expected.keypoints + 0.5)
            np.testing.assert_array_equal(keypoints[:, 2:], np.tile([1, 0, 0, 1], (30, 1)))
            descriptors = db.read_descriptors(image.image_id)
            assert descriptors.type == pycolmap.FeatureExtractorType.ALIKED_N16ROT
            rows = pycolmap.FeatureDescriptorsFloat.from_bytes(descriptors).data
            np.testing.assert_array_equal(rows, expected.descriptors)


def test_descriptors_of_a_model_that_colmap_does_not_have_bear_no_name_of_another(tmp_path, photos):
    path = tmp_path / "n16.db"
    write_features(path, stored(photos, NAMES), photos, "aliked-n16", Cameras())
    with pycolmap.Database.open(path) as db:
        assert db.read_descriptors(1).type == pycolmap.FeatureExtractorType.UNDEFINED


def test_an_image_without_keypoints_is_written_matched_and_found_again(tmp_path, photos):
    """One behind a mask that is all black, for example."""
    path, store = tmp_path / "d.db", stored(photos, NAMES)
    store.write(NAMES[0], features(0, count=0), (64, 48))
    for _ in range(2):
        write_features(path, store, photos, "aliked-n32", Cameras())
        write_matches(path, store, exhaustive_pairs(NAMES), MutualMatcher(-1))
    with pycolmap.Database.open(path) as db:
        counts = [len(db.read_descriptors(image.image_id).data) for image in db.read_all_images()]
        matched = [len(db.read_matches(1, other)) for other in (2, 3, 4)]
    assert counts == [0, 30, 30, 30] and matched == [0, 0, 0]


@pytest.mark.parametrize("mode", ["AUTO", "SINGLE", "PER_FOLDER", "PER_IMAGE"])
def test_cameras_and_priors_are_those_that_colmap_imports(tmp_path, photos, mode):
    ours, theirs = tmp_path / "ours.db", tmp_path / "theirs.db"
    names = {"AUTO": "auto", "SINGLE": "single", "PER_FOLDER": "folder", "PER_IMAGE": "image"}
    write_features(ours, stored(photos, NAMES), photos, "aliked-n32", Cameras(names[mode]))
    pycolmap.Database.open(theirs).close()
    pycolmap.import_images(theirs, photos, pycolmap.CameraMode.__members__[mode])
    found, expected = read_all(ours), read_all(theirs)
    assert found["cameras"] == expected["cameras"]
    assert len(found["cameras"]) == {"AUTO": 3, "SINGLE": 1, "PER_FOLDER": 2, "PER_IMAGE": 4}[mode]
    for name, numbers in expected["images"].items():
        assert found["images"][name] == numbers
    assert (found["frames"], found["rigs"]) == (expected["frames"], expected["rigs"])


@pytest.mark.parametrize(
    "odd",
    [
        {"t0x920a": "4.0 mm"},
        {"t0x920a": float("nan")},
        {"t0xa405": (28, 28)},
        {"t0x10f": "", "t0xa405": 28},
    ],
)
def test_exif_that_is_not_as_it_should_be_says_nothing(tmp_path, odd):
    names = ["1.jpg", "2.jpg"]
    for i, name in enumerate(names):
        write_photo(tmp_path / "p" / name, noise(i), **{"t0x10f": "Maker", "t0x110": "Phone"} | odd)
    write_features(
        tmp_path / "d.db", stored(tmp_path / "p", names), tmp_path / "p", "aliked-n32", Cameras()
    )
    with pycolmap.Database.open(tmp_path / "imported.db"):
        pass
    pycolmap.import_images(tmp_path / "imported.db", tmp_path / "p")
    assert read_all(tmp_path / "d.db")["cameras"] == read_all(tmp_path / "imported.db")["cameras"]


def test_exif_gives_the_place_and_the_direction_down(tmp_path):
    """As COLMAP's own extraction writes them."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    tags = Image.Exif()
    tags[0x112] = 8
    tags.get_ifd(0x8825).update(
        {1: "S", 2: (33.0, 30.0, 36.0), 3: "E", 4: (151.0, 15.0, 0.0), 5: b"\0", 6: 12.5}
    )
    Image.fromarray(noise(1)).save(folder / "a.jpg", exif=tags)
    write_features(tmp_path / "d.db", stored(folder, ["a.jpg"]), folder, "aliked-n32", Cameras())
    with pycolmap.Database.open(tmp_path / "d.db") as db:
        (prior,) = db.read_all_pose_priors()
        (image,) = db.read_all_images()
    np.testing.assert_allclose(prior.position, [-33.51, 151.25, 12.5])
    np.testing.assert_array_equal(prior.gravity, [-1, 0, 0])
    assert prior.corr_data_id == image.data_id
    assert prior.coordinate_system == pycolmap.PosePriorCoordinateSystem.WGS84


def test_a_run_that_was_killed_goes_on_and_gives_the_same_database(tmp_path, photos, monkeypatch):
    whole, killed = tmp_path / "whole.db", tmp_path / "killed.db"
    store = stored(photos, NAMES)
    pairs = list(exhaustive_pairs(NAMES))
    matcher = MutualMatcher(-1)
    write_features(whole, store, photos, "aliked-n32", Cameras())
    write_matches(whole, store, pairs, matcher)

    count = 0

    def kill():
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(killed, store, photos, "aliked-n32", Cameras(), kill)
    write_features(killed, store, photos, "aliked-n32", Cameras())
    count = 0
    with pytest.raises(KeyboardInterrupt):
        write_matches(killed, store, pairs, matcher, kill)
    assert write_matches(killed, store, pairs, matcher) == len(pairs)
    assert read_all(killed) == read_all(whole)
    assert write_matches(killed, store, pairs, matcher) == 0
    assert len(read_all(whole)["matches"]) == 6


def test_a_matcher_is_given_every_image_once_with_its_size(database, photos):
    class Sizes(MutualMatcher):
        seen: list = []  # noqa: RUF012

        def prepare(self, features, size):
            self.seen.append(size)
            return super().prepare(features, size)

    write_matches(database, stored(photos, NAMES), exhaustive_pairs(NAMES), Sizes(-1))
    assert Sizes.seen == [(64, 48)] * len(NAMES)


def test_another_database_is_refused_and_left_as_it_is(tmp_path, database, photos):
    before = read_all(database)
    with pytest.raises(InputError, match=r"has an image a/2\.jpg that is not among"):
        write_features(
            database, stored(tmp_path / "less", NAMES[:1]), photos, "aliked-n16rot", Cameras()
        )
    other = stored(tmp_path / "other", NAMES[::-1])
    with pytest.raises(InputError, match=r"has other features of a/1\.jpg"):
        write_features(database, other, photos, "aliked-n16rot", Cameras())
    with pytest.raises(InputError, match=r"has other features of a/1\.jpg"):
        write_features(database, stored(photos, NAMES), photos, "aliked-n32", Cameras())
    assert read_all(database) == before
    (tmp_path / "text.db").write_text("no database" * 1000)
    with contextlib.closing(sqlite3.connect(tmp_path / "music.db")) as foreign:
        foreign.execute("CREATE TABLE songs (title)")
        for name, reason in {"text.db": "", "music.db": "its tables are another program's"}.items():
            with pytest.raises(InputError, match=f"cannot be used as a COLMAP database .*{reason}"):
                write_features(tmp_path / name, other, photos, "aliked-n16", Cameras())
        assert len(foreign.execute("SELECT name FROM sqlite_master").fetchall()) == 1


@pytest.mark.parametrize(
    ("made", "resumed"),
    [
        (Cameras(), Cameras(model="PINHOLE")),
        (Cameras(), Cameras("single")),
        (Cameras("single"), Cameras()),
        (Cameras("folder"), Cameras("image")),
        (Cameras("image"), Cameras("folder")),
    ],
)
def test_cameras_of_other_options_are_refused_and_left(tmp_path, photos, made, resumed):
    store, path = stored(photos, NAMES), tmp_path / "d.db"
    write_features(path, store, photos, "aliked-n32", made)
    before = read_all(path)
    with pytest.raises(InputError, match=r"with another camera .*; pass the --camera_mode"):
        write_features(path, store, photos, "aliked-n32", resumed)
    (photos / "a/2.jpg").unlink()  # and with it its EXIF
    write_features(path, store, photos, "aliked-n32", made)
    assert read_all(path) == before


def test_images_of_two_sizes_cannot_share_a_camera(tmp_path, photos):
    with FeatureStore.open(tmp_path / "f.h5", KEY) as store:
        store.write("b/1.png", features(1), (64, 48))
        store.write("b/2.png", features(2), (48, 64))
    with pytest.raises(InputError, match="48x64 pixels, but its camera 64x48"):
        write_features(tmp_path / "d.db", store, photos, "aliked-n16", Cameras("folder"))
    with pytest.raises(InputError, match="no camera model 'FISH'"):
        Cameras(model="FISH")


def test_pairs_of_every_order(tmp_path, monkeypatch):
    names = [f"{i}.jpg" for i in range(7)]
    monkeypatch.setattr(module, "BLOCK", 3)
    found = list(exhaustive_pairs(names))
    assert len(found) == len({frozenset(pair) for pair in found}) == 21
    assert sequential_pairs(["10.jpg", "9.jpg", "8.jpg"], 1) == [
        ("8.jpg", "9.jpg"),
        ("9.jpg", "10.jpg"),
    ]
    path = tmp_path / "pairs.txt"
    path.write_text("# first second\n0.jpg 1.jpg\n\n1.jpg 0.jpg\n2.jpg 1.jpg\n")
    assert read_pairs(path, names) == [("0.jpg", "1.jpg"), ("2.jpg", "1.jpg")]
    path.write_bytes(b"\xef\xbb\xbf0.jpg 1.jpg\r\n")  # as editors on Windows write it
    assert read_pairs(path, names) == [("0.jpg", "1.jpg")]
    for text, reason in {
        "0.jpg\n": "line 1 .* is not two names",
        "0.jpg 0.jpg\n": "line 1 .* is not two names",
        "0.jpg 1.jpg\n0.jpg 9.jpg\n": r"line 2 .* names 9\.jpg, which is not among",
        "\n": "there is no pair",
    }.items():
        path.write_text(text)
        with pytest.raises(InputError, match=reason):
            read_pairs(path, names)
    with pytest.raises(InputError, match="cannot read the pairs"):
        read_pairs(tmp_path / "nowhere.txt", names)


def test_a_database_in_use_is_refused_before_colmap_aborts(database, photos):
    with contextlib.closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=r"cannot be used .*locked\); close what has it open"):
            write_features(database, stored(photos, NAMES), photos, "aliked-n16rot", Cameras())


def test_colmap_leaves_the_signal_that_stops_a_script_alone():
    code = """
import os, signal
from aliked import cli, colmap
def main(args):
    colmap.Cameras()
    os.kill(os.getpid(), signal.SIGTERM)
cli.run(main, cli.Parser(), [])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


def test_a_full_disk_is_found_before_a_transaction(database, photos, monkeypatch):
    before = read_all(database)
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: free)
    with pytest.raises(InputError, match="has 0 MiB left, and the next rows need 1; make room"):
        write_matches(database, stored(photos, NAMES), exhaustive_pairs(NAMES), MutualMatcher(-1))
    new = database.with_name("new.db")
    with pytest.raises(InputError, match="has 0 MiB left"):
        write_features(new, stored(photos, NAMES), photos, "aliked-n16rot", Cameras())
    assert read_all(database) == before and not new.exists()


@pytest.mark.parametrize("counts", [(200, 150), (0, 5), (5, 0), (1, 1)])
def test_tensors_are_matched_as_arrays_are(counts):
    import torch

    first, second = (features(seed, count).descriptors for seed, count in enumerate(counts))
    for limit in (-1, 0.2):
        found = match_mutual(torch.from_numpy(first), torch.from_numpy(second), limit)
        np.testing.assert_array_equal(found.numpy(), match_mutual(first, second, limit))


def test_keypoints_have_colmaps_origin():
    found = in_colmap(Features(np.zeros((1, 2), np.float32), np.ones(1), np.ones((1, 1))))
    np.testing.assert_array_equal(found, [[0.5, 0.5, 1, 0, 0, 1]])


def test_the_shipped_scene_is_reconstructed(tmp_path):
    """All 24 views of a yard 8 m deep within 1 degree and 5 cm, half within 0.3 and 1 cm.

    Measured over six seeds: at most 0.5 degrees and 2 cm.
    """
    scene = json.loads((SCENE / "scene.json").read_text())
    names = [view["file"] for view in scene["views"]]
    database = tmp_path / "database.db"
    job = Job(SCENE, spec=Spec(device="cpu", top_k=2000))
    with FeatureStore.open(tmp_path / "features.h5", job.key()) as store:
        extract(job, store)
    cameras = Cameras("single", "SIMPLE_PINHOLE")
    write_features(database, store, SCENE, job.spec.model, cameras)
    pairs = [(names[i], names[j]) for i, j in scene["pairs"]]
    write_matches(database, store, pairs, MutualMatcher(0.6))

    pycolmap.logging.minloglevel = 2
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.max_num_trials = 1000  # a tenth of the time, and enough here
    verification.ransac.random_seed = 0
    mapping = pycolmap.IncrementalPipelineOptions(random_seed=0, num_threads=1)
    mapping.mapper.abs_pose_max_error = 4  # COLMAP's 12 px are for larger photographs
    pycolmap.geometric_verification(database, two_view_geometry_options=verification)
    maps = pycolmap.incremental_mapping(database, SCENE, tmp_path / "sparse", mapping)

    assert len(maps) == 1 and maps[0].num_reg_images() == 24
    truth = {view["file"]: np.array(view["pose"]) for view in scene["views"]}
    turn, shift = pose_errors(maps[0], truth)
    assert np.median(list(turn.values())) < 0.3 and np.median(list(shift.values())) < 0.01
    assert max(turn.values()) < 1 and max(shift.values()) < 0.05
    (camera,) = maps[0].cameras.values()
    assert abs(camera.params[0] / scene["intrinsics"][0][0] - 1) < 0.01


def pose_errors(reconstruction, truth: dict[str, np.ndarray]) -> tuple[dict, dict]:
    """Degrees and metres between every view and its true pose, after the best similarity."""
    found = {i.name: i.cam_from_world().matrix() for i in reconstruction.images.values()}
    names = sorted(found)
    centres = np.array([-found[n][:, :3].T @ found[n][:, 3] for n in names])
    true = np.array([-truth[n][:3, :3].T @ truth[n][:3, 3] for n in names])
    a, b = centres - centres.mean(0), true - true.mean(0)
    u, spread, vt = np.linalg.svd(b.T @ a)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation, scale = u @ sign @ vt, np.trace(np.diag(spread) @ sign) / (a**2).sum()
    shift = np.linalg.norm(scale * a @ rotation.T - b, axis=1)
    turn = {}
    for name in names:
        between = found[name][:, :3] @ rotation.T @ truth[name][:3, :3].T
        turn[name] = np.degrees(np.arccos(np.clip((np.trace(between) - 1) / 2, -1, 1)))
    return turn, dict(zip(names, shift, strict=True))
