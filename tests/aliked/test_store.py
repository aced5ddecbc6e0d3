"""The file that features are kept in: what comes back, what a kill leaves, what is refused."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from aliked import store as module
from aliked.errors import InputError
from aliked.features import Features
from aliked.store import FeatureStore, arrays_of, image_bytes, journal_line, put_images

KEY = {"model": "aliked-n16", "weights": "12ab", "top_k": 50}
SIZE = (640, 480)


def features(seed: int, keypoints: int = 50) -> Features:
    random = np.random.default_rng(seed)
    shapes = (keypoints, 2), keypoints, (keypoints, 8)
    return Features(*(random.random(shape, np.float32) for shape in shapes))


def assert_same(found: Features, expected: Features) -> None:
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(found, name), values)
        assert getattr(found, name).dtype == np.float32


@pytest.fixture
def path(tmp_path) -> Path:
    """A store of three images."""
    path = tmp_path / "features.h5"
    with FeatureStore.open(path, KEY) as store:
        for i in range(3):
            store.write(f"day/{i}.jpg", features(i), SIZE)
    return path


@pytest.mark.parametrize("compression", [None, "lzf", "gzip"])
@pytest.mark.parametrize("keypoints", [0, 50])
def test_features_come_back_as_they_were(tmp_path, compression, keypoints):
    path = tmp_path / "features.h5"
    with FeatureStore.open(path, KEY, compression) as store:
        store.write("a/b.jpg", features(1, keypoints), SIZE)
        assert_same(store.read("a/b.jpg"), features(1, keypoints))  # still in memory
        store.flush()
        assert_same(store.read("a/b.jpg"), features(1, keypoints))  # in a part
    again = FeatureStore.open(path, KEY)
    assert_same(again.read("a/b.jpg"), features(1, keypoints))
    assert again.size("a/b.jpg") == SIZE
    assert again.names() == ["a/b.jpg"] and "a/b.jpg" in again and "b.jpg" not in again
    assert [file.name for file in tmp_path.iterdir()] == ["features.h5"]


def test_the_layout_is_the_one_that_hloc_reads(path):
    """What hloc/utils/io.py and match_features.py ask of a file of features."""
    names = []
    with h5py.File(path, "r", libver="latest") as file:
        file.visititems(
            lambda _, item: (
                names.append(item.parent.name.strip("/"))
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
        assert set(names) == {"day/0.jpg", "day/1.jpg", "day/2.jpg"}
        group = file["day/1.jpg"]
        assert group["descriptors"].shape == (8, 50)  # [D, N]
        np.testing.assert_array_equal(group["descriptors"][()].T, features(1).descriptors)
        np.testing.assert_array_equal(group["keypoints"][()], features(1).keypoints)
        np.testing.assert_array_equal(group["scores"][()], features(1).scores)
        assert group["image_size"][()].tolist() == [640, 480]


def test_what_is_written_again_replaces_the_older(path):
    with FeatureStore.open(path, KEY) as store:
        store.write("day/1.jpg", features(8), SIZE)
        store.write("day/1.jpg", features(9), SIZE)
    store = FeatureStore.open(path, KEY)
    assert_same(store.read("day/1.jpg"), features(9))
    assert_same(store.read("day/2.jpg"), features(2))
    assert len(store) == 3


WRITER = """
import sys, time
from pathlib import Path
from aliked import store
from tests.aliked.test_store import KEY, SIZE, features
store.PART_BYTES = 4000  # two images
s = store.FeatureStore.open(Path(sys.argv[1]), KEY)
for i in range(int(sys.argv[2]), 9):
    if f"{i}.jpg" not in s:
        s.write(f"{i}.jpg", features(i), SIZE)
        print(i, flush=True)
    if i == int(sys.argv[3]):
        time.sleep(60)
s.close()
"""


def writer(path: Path, first: int, stop: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(stop)]
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_and_gives_the_bytes_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole.h5", tmp_path / "killed.h5"
    assert writer(whole, 0, -1).wait() == 0
    process = writer(killed, 0, 6)
    while process.stdout.readline() != "6\n":
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    assert FeatureStore.open(killed, KEY).names() == [f"{i}.jpg" for i in range(6)]  # whole parts
    again = writer(killed, 0, -1)
    assert again.communicate()[0].split() == ["6", "7", "8"]
    assert killed.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.h5", "killed.h5"}


def test_two_processes_fill_one_store(tmp_path):
    path = tmp_path / "features.h5"
    first, second = (FeatureStore.open(path, KEY) for _ in range(2))
    first.write("a.jpg", features(1), SIZE)
    second.write("b.jpg", features(2), SIZE)
    second.flush()
    first.close()
    assert FeatureStore.open(path, KEY).names() == ["a.jpg", "b.jpg"]


def test_a_file_grows_by_others_and_has_the_same_bytes(tmp_path):
    """In the order that its images are placed in; killed, the next run has what was written."""
    order = ["b.jpg", "c.jpg", "a.jpg"]
    whole, path = tmp_path / "whole.h5", tmp_path / "features.h5"
    with FeatureStore.open(whole, KEY) as store:
        for i, name in enumerate(("a.jpg", "b.jpg", "c.jpg", "z.jpg")):
            store.write(name, features(i), SIZE)
        store.arrange(["missing.jpg", *order])

    def fill(file, name, written=True):
        arrays = arrays_of(features(ord(name[0]) - ord("a")), SIZE)
        at = file.place(name, image_bytes(arrays))
        with open(file.path, "r+b") as other:
            spots = put_images(other.fileno(), at, {name: arrays})
        file.note(journal_line(spots) if written else b"")

    killed = FeatureStore.open(path, KEY).grow()
    fill(killed, "c.jpg")
    fill(killed, "b.jpg")
    fill(killed, "a.jpg", written=False)
    with open(killed.path.with_suffix(".journal"), "ab") as journal:
        journal.write(b'{"a.jpg": [[')
    store = FeatureStore.open(path, KEY)
    assert store.names() == ["b.jpg", "c.jpg"] and not path.exists()
    assert_same(store.read("c.jpg"), features(2))
    store.write("z.jpg", features(25), SIZE)
    store.write("z.jpg", features(3), SIZE)
    store.flush()
    with FeatureStore.open(path, KEY).grow() as file:
        file.take(order[:2])
        fill(file, "a.jpg")
        file.finish()
    assert path.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.h5", "features.h5"}
    with pytest.raises(KeyboardInterrupt), FeatureStore.open(path, KEY).grow() as file:
        raise KeyboardInterrupt
    assert not list((tmp_path / "features.h5.parts").iterdir())


def test_a_file_that_got_no_image_is_none(tmp_path):
    """As where several processes had bad images only."""
    with FeatureStore.open(tmp_path / "features.h5", KEY).grow() as file:
        file.note(journal_line({}))
        file.finish()
    assert not list(tmp_path.iterdir())


def test_a_file_takes_no_more_space_than_it_has_bytes(tmp_path):
    """More was allocated while it grew, so that writing finds it."""
    path, arrays = tmp_path / "features.h5", arrays_of(features(1, 5000), SIZE)
    with FeatureStore.open(path, KEY).grow() as file, open(file.path, "r+b") as other:
        for name in map(str, range(20)):
            put_images(other.fileno(), file.place(name, image_bytes(arrays)), {name: arrays})
        growing = file.path.stat()
        if growing.st_blocks:  # a file system that says what space it has given
            assert 512 * growing.st_blocks > growing.st_size + 2**20
        file.finish()
    status = path.stat()
    assert 512 * status.st_blocks < status.st_size + 2**17


@pytest.mark.parametrize("locks", [True, False])
def test_images_are_put_in_while_no_other_process_does_in_writes_of_any_length(
    tmp_path, monkeypatch, locks
):
    """Where the file system has locks: they are for speed alone."""
    images = {f"{i}.jpg": arrays_of(features(i, 3 * i), SIZE) for i in range(4)}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    flock, pwritev = fcntl.flock, os.pwritev

    def no_flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def write_some(descriptor, pieces, offset):
        if locks:
            with pytest.raises(BlockingIOError):
                flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return pwritev(descriptor, [b"".join(pieces)[:1000]], offset)

    with open(whole, "wb") as file:
        spots = put_images(file.fileno(), 100, images)
    with open(parted, "wb") as file, open(parted, "rb") as second:
        other = second.fileno()
        monkeypatch.setattr(os, "pwritev", write_some)
        if not locks:
            monkeypatch.setattr(fcntl, "flock", no_flock)
        assert put_images(file.fileno(), 100, images) == spots
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as nobody holds it any more
    assert parted.read_bytes() == whole.read_bytes()
    for name, arrays in images.items():
        for (offset, _, kind), array in zip(spots[name], arrays, strict=True):
            found = np.fromfile(whole, kind, array.size, offset=offset)
            assert np.array_equal(found, array.ravel())


@pytest.mark.parametrize("count", [0, 1, 9, 257, 8200])  # leaves of 8 names, nodes of 32 of these
def test_hdf5_reads_and_goes_on_with_a_file_of_any_number_of_images(tmp_path, count):
    """As hloc does: groups go in and out, arrays get attributes."""
    path = tmp_path / "features.h5"
    images = {f"folder {i % 3}/é/{i}.jpg" if i % 7 else f"{i}.jpg": i for i in range(count)}
    with FeatureStore.open(path, KEY).grow() as file, open(file.path, "r+b") as other:
        for name, i in images.items():
            arrays = arrays_of(features(i, i % 3), (i, 1))
            put_images(other.fileno(), file.place(name, image_bytes(arrays)), {name: arrays})
        file.finish()
    with h5py.File(path, "a") as file:
        for folder in ("", "folder 1/", "new/"):
            for i in range(100):
                file[f"{folder}{i}-new/keypoints"] = np.zeros((3, 2))
        for name in list(images)[::50]:
            file[name]["keypoints"].attrs["uncertainty"] = 1.0
        for name in list(images)[1::50]:
            del file[name], images[name]
    with h5py.File(path) as file:
        names: list[str] = []
        file.visit(names.append)
        found = {name.removesuffix("/scores") for name in names if name.endswith("/scores")}
        assert found == set(images)
        assert sum(name.endswith("-new") for name in names) == 300
        for name, i in list(images.items())[:: 1 + count // 50]:
            arrays = arrays_of(features(i, i % 3), (i, 1))
            for field, values in zip(module.ARRAYS, arrays, strict=True):
                assert np.array_equal(file[name][field], values)
                assert file[name][field].dtype == values.dtype


def test_hdf5_finds_names_of_any_script_and_length_beyond_4_gb(tmp_path):
    """Its order is that of their bytes, which it searches by."""
    names = ["Z", "a/é", "e\u0301", "~", "é", "日本/語", "\uffff", "\U0001f600", " ", "\n", "\x7f"]
    names += ["n" * 70_000, "/".join(["folder" * 40] * 40), *(f"é{i}" for i in range(100))]
    store = FeatureStore.open(tmp_path / "f.h5", KEY)
    for i, name in enumerate(names):
        store.write(name, features(i, i % 3), SIZE)
    store.flush()
    with store.grow() as file:
        file._end = 2**33  # a hole is before it
        file.finish()
    found = FeatureStore.open(tmp_path / "f.h5", KEY)
    assert found.names() == sorted(names)
    for i, name in enumerate(names):
        assert_same(found.read(name), features(i, i % 3))


def test_what_is_compressed_is_arranged_too(tmp_path):
    names = ["b.jpg", "none.jpg", "a.jpg"]
    with FeatureStore.open(tmp_path / "f.h5", KEY, "lzf") as store:
        store.arrange(names)
        for i, name in enumerate(names):
            store.write(name, features(i, 0 if i == 1 else 50), SIZE)
    store = FeatureStore.open(tmp_path / "f.h5", KEY)
    for i, name in enumerate(names):
        assert_same(store.read(name), features(i, 0 if i == 1 else 50))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["a.jpg/scores"].compression == "lzf"


@pytest.mark.parametrize("compression", [None, "lzf"])
@pytest.mark.parametrize("counts", [(0, 50), (50, 0), (50, 50)])  # those of none stay as they are
def test_an_image_cannot_have_the_name_of_a_folder(tmp_path, compression, counts):
    store = FeatureStore.open(tmp_path / "f.h5", KEY, compression)
    store.write("a/b", features(1, counts[0]), SIZE)
    store.write("a", features(2, counts[1]), SIZE)
    with pytest.raises(InputError, match="a is an image and a folder of others; rename it"):
        store.close()
    assert FeatureStore.open(tmp_path / "f.h5", KEY).names() == ["a", "a/b"]


def test_half_precision_is_kept_and_read_as_float32(tmp_path):
    path, full = tmp_path / "f.h5", features(1)
    half = Features(full.keypoints, full.scores, full.descriptors.astype(np.float16))
    with FeatureStore.open(path, KEY) as store:
        store.write("a.jpg", half, SIZE)
        rounded = Features(full.keypoints, full.scores, half.descriptors.astype(np.float32))
        assert_same(store.read("a.jpg"), rounded)
        store.flush()
        assert_same(store.read("a.jpg"), rounded)
    assert_same(FeatureStore.open(path, KEY).read("a.jpg"), rounded)
    with h5py.File(path) as file:
        assert file["a.jpg/descriptors"].dtype == np.float16
        assert file["a.jpg/keypoints"].dtype == np.float32


@pytest.mark.parametrize("length", [0, 5, 900, -1, -300])
def test_a_damaged_part_is_refused(tmp_path, length):
    store = FeatureStore.open(tmp_path / "f.h5", KEY)
    store.write("a.jpg", features(1), SIZE)
    store.flush()
    (part,) = (tmp_path / "f.h5.parts").iterdir()
    part.write_bytes(part.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cannot read the features in .*part"):
        FeatureStore.open(tmp_path / "f.h5", KEY)


def test_an_error_keeps_what_was_written(tmp_path):
    path = tmp_path / "features.h5"
    with pytest.raises(KeyboardInterrupt), FeatureStore.open(path, KEY) as store:
        store.write("a.jpg", features(1), SIZE)
        raise KeyboardInterrupt
    assert not path.exists()
    assert_same(FeatureStore.open(path, KEY).read("a.jpg"), features(1))


def test_features_of_another_key_are_refused(path):
    with pytest.raises(InputError, match=r"other features \(top_k 50, not 60\)"):
        FeatureStore.open(path, KEY | {"top_k": 60})
    with FeatureStore.open(path.with_name("other.h5"), KEY) as store:
        store.write("a.jpg", features(1), SIZE)
        store.flush()
        with pytest.raises(InputError, match=r"other features \(weights 12ab, not 34\)"):
            FeatureStore.open(path.with_name("other.h5"), KEY | {"weights": "34"})


@pytest.mark.parametrize("length", [0, 1, 500, 5000, -1, -300])
def test_a_truncated_file_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"cannot read the features in .*features\.h5"):
        FeatureStore.open(path, KEY)


def test_a_foreign_file_is_refused(tmp_path):
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["day/1.jpg/keypoints"] = np.zeros((3, 2))
    with pytest.raises(InputError, match="is no file of ALIKED features"):
        FeatureStore.open(foreign, KEY)
    for attribute in (3, np.zeros(4), b"aliked", h5py.Empty("f")):
        with h5py.File(foreign, "a") as file:
            file.attrs["format"] = attribute
        with pytest.raises(InputError, match="is no file of ALIKED features"):
            FeatureStore.open(foreign, KEY)
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "folder.h5").mkdir()
    for name in ("text.h5", "folder.h5"):
        with pytest.raises(InputError, match=r"cannot read the features in .*; name another file"):
            FeatureStore.open(tmp_path / name, KEY)


DAMAGE = {
    "shorter scores": ("scores", np.zeros(49, np.float32)),
    "keypoints of three numbers": ("keypoints", np.zeros((50, 3), np.float32)),
    "descriptors of more keypoints": ("descriptors", np.zeros((8, 51), np.float32)),
    "flat descriptors": ("descriptors", np.zeros(50, np.float32)),
    "a single number": ("scores", np.float32(1)),
    "text": ("scores", np.array([b"x"] * 50)),
    "whole numbers": ("keypoints", np.zeros((50, 2), np.int64)),
    "NaN": ("descriptors", np.full((8, 50), np.nan, np.float32)),
    "a size of one number": ("image_size", np.zeros(1, np.int64)),
    "a size of fractions": ("image_size", np.zeros(2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_arrays_that_are_no_features_are_refused(path, damage):
    field, values = DAMAGE[damage]
    with h5py.File(path, "a") as file:
        del file[f"day/1.jpg/{field}"]
        file[f"day/1.jpg/{field}"] = values
    store = FeatureStore.open(path, KEY)
    with pytest.raises(InputError, match=r"cannot read the features in .*features\.h5"):
        store.read("day/1.jpg")
    assert_same(store.read("day/2.jpg"), features(2))


def test_a_file_that_claims_more_than_it_has_takes_no_memory(path):
    with h5py.File(path, "a") as file:
        del file["day/1.jpg/scores"]
        file["day/1.jpg"].create_dataset("scores", (2**40,), np.float32, chunks=(1024,))
    with pytest.raises(InputError, match="claims 1099511627776 values"):
        FeatureStore.open(path, KEY).read("day/1.jpg")


def test_a_link_to_another_file_is_not_followed(path, tmp_path):
    with h5py.File(path, "a") as file:
        file["linked.jpg"] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "/day")
    assert FeatureStore.open(path, KEY).names() == ["day/0.jpg", "day/1.jpg", "day/2.jpg"]


@pytest.mark.parametrize(
    "name", ["", "/etc/1.jpg", "../1.jpg", "a//b", "a/./b", "a\0b", "\udce9.jpg"]
)
def test_a_name_that_is_no_relative_path_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot name an image"):
        FeatureStore.open(tmp_path / "f.h5", KEY).write(name, features(1), SIZE)


def test_an_image_in_a_folder_with_the_name_of_a_field(tmp_path):
    path = tmp_path / "features.h5"
    with FeatureStore.open(path, KEY) as store:
        store.write("day/keypoints/1.jpg", features(1), SIZE)
        store.write("image_size/scores.jpg", features(2), SIZE)
    assert FeatureStore.open(path, KEY).names() == ["day/keypoints/1.jpg", "image_size/scores.jpg"]


def test_the_key_is_kept_as_json(path):
    with h5py.File(path) as file:
        assert json.loads(file.attrs["key"]) == KEY
        assert file.attrs["format"] == module.FORMAT


def test_what_a_kill_left_half_written_is_no_part_and_goes(tmp_path):
    """The scratch file of a part is hidden, and names the process that wrote it."""
    path, ended = tmp_path / "features.h5", subprocess.Popen(["true"])
    ended.wait()
    parts = tmp_path / "features.h5.parts"
    parts.mkdir()
    for pid in (ended.pid, os.getpid()):
        (parts / f".{pid}-12ab.u2xn.partial.part").write_bytes(b"half a file")
    with FeatureStore.open(path, KEY) as store:
        store.write("0.jpg", features(0), SIZE)
    assert FeatureStore.open(path, KEY).names() == ["0.jpg"]
    assert [file.name for file in parts.iterdir()] == [f".{os.getpid()}-12ab.u2xn.partial.part"]


def test_a_journal_whose_first_line_the_disk_had_no_room_for_says_nothing(tmp_path):
    path, parts = tmp_path / "features.h5", tmp_path / "features.h5.parts"
    parts.mkdir()
    (parts / "1-ab.growing").write_bytes(bytes(100))
    (parts / "1-ab.journal").write_bytes(b'{"format": "ali')
    with FeatureStore.open(path, KEY) as store:
        assert not store.names()
        store.write("0.jpg", features(0), SIZE)
    assert FeatureStore.open(path, KEY).names() == ["0.jpg"]
    assert [file.name for file in tmp_path.iterdir()] == ["features.h5"]


def test_a_part_that_points_nowhere_is_refused(path):
    store = FeatureStore.open(path, KEY)
    store.write("a.jpg", features(0), (64, 48))
    store.flush()
    (part,) = path.with_name(f"{path.name}.parts").glob("*.part")
    raw = part.read_bytes()
    at = len(raw) - 8 - int.from_bytes(raw[-8:], "little")
    index = json.loads(raw[at:-8])
    index["images"]["a.jpg"][0][0] = 2**70
    text = json.dumps(index).encode()
    part.write_bytes(raw[:at] + text + len(text).to_bytes(8, "little"))
    with pytest.raises(InputError, match="cannot read the features in"):
        FeatureStore.open(path, KEY).read("a.jpg")
