"""The way from files to a store of features, without a network."""

import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from aliked import extraction
from aliked.colmap import read_exif
from aliked.errors import InputError
from aliked.extraction import (
    Job,
    Photo,
    Pipeline,
    Tally,
    as_stored,
    extract,
    missing,
    read_mask,
    unmasked,
)
from aliked.features import Features
from aliked.images import find_images, load_image, read_header
from aliked.lanes import DecodingLane, Lane
from aliked.store import FeatureStore
from aliked.video import frames, is_video
from tests.helpers.photos import STORED, TURNED, Brightest, noise, write_photo


@pytest.fixture
def extractor(monkeypatch) -> Brightest:
    """In place of every backend."""
    extractor = Brightest()
    monkeypatch.setattr(extraction, "create_extractor", lambda name, spec: extractor)
    return extractor


def run(folder: Path, output: Path, **options) -> tuple[FeatureStore, Tally]:
    job = Job(folder, **options)
    with FeatureStore.open(output, job.key()) as store:
        tally = extract(job, store)
    return FeatureStore.open(output, job.key()), tally


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "big.tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_and_header_are_those_stored_whatever_exif_says(tmp_path, suffix, orientation):
    image = cv2.resize(noise(1, 8, 6), (80, 60))
    path = tmp_path / f"photo.{suffix}"
    if suffix == "big.tif":
        tags = {0x112: orientation}
        Image.fromarray(image).save(path, tiffinfo=tags, big_tiff=True)
        assert path.read_bytes().startswith(b"II+")
    else:
        write_photo(path, image, t0x112=orientation)
    assert read_header(path) == (80, 60, orientation)
    found = load_image(path, stored=orientation).astype(int)
    assert found.shape == image.shape
    assert np.abs(found - image).mean() < (6 if suffix == "jpg" else 0.01)  # 60 where turned


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_features_are_of_the_upright_image_and_keypoints_in_the_stored_one(
    tmp_path, extractor, suffix, orientation
):
    """As in COLMAP, which turns an image for its extractor, but not where it is mirrored."""
    upright = noise(2)
    stored = STORED[orientation](upright)
    write_photo(tmp_path / f"photos/a.{suffix}", stored, t0x112=orientation)
    store, _ = run(tmp_path / "photos", tmp_path / "f.h5")
    mirrored = orientation in (2, 4, 5, 7)
    expected = extractor._one(stored if mirrored else upright)
    found = store.read(f"a.{suffix}")
    np.testing.assert_array_equal(found.descriptors, expected.descriptors)
    x, y = found.keypoints.astype(int).T
    ex, ey = expected.keypoints.astype(int).T
    seen = stored if mirrored else TURNED[orientation](stored)
    np.testing.assert_array_equal(stored[y, x], seen[ey, ex])
    assert store.size(f"a.{suffix}") == stored.shape[1::-1]


@pytest.mark.parametrize("turns", range(4))
def test_keypoints_of_a_smaller_upright_image_go_back_to_the_large_stored_one(turns):
    """The corners of both images are the same points, half a pixel outside the first centres."""
    width, height = (300, 200)
    size = (width, height) if turns % 2 == 0 else (height, width)
    extracted = (size[0] // 2, size[1] // 2)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32) * extracted - 0.5
    features = Features(corners, np.ones(4, np.float32), np.ones((4, 2), np.float32))
    photo = Photo("a", (width, height), lambda: None, turns)
    found = as_stored(features, photo, extracted).keypoints
    order = {0: [0, 1, 2, 3], 1: [1, 3, 0, 2], 2: [3, 2, 1, 0], 3: [2, 0, 3, 1]}[turns]
    stored = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * (width, height) - 0.5
    np.testing.assert_allclose(found, stored[order], atol=1e-4)


def test_large_images_are_made_smaller_and_small_ones_left(tmp_path, extractor):
    write_photo(tmp_path / "p/large.png", noise(1, 200, 100))
    write_photo(tmp_path / "p/small.png", noise(2, 60, 40))
    write_photo(tmp_path / "p/tall.png", noise(3, 50, 200), t0x112=6)
    store, _ = run(tmp_path / "p", tmp_path / "f.h5", max_size=100)
    assert sorted(extractor.seen) == [(1, 25, 100, 3), (1, 40, 60, 3), (1, 50, 100, 3)]
    smaller = cv2.resize(noise(1, 200, 100), (100, 50), interpolation=cv2.INTER_AREA)
    expected = (extractor._one(smaller).keypoints + 0.5) * 2 - 0.5
    np.testing.assert_allclose(store.read("large.png").keypoints, expected)
    assert store.size("large.png") == (200, 100)


def test_images_of_one_size_share_batches(tmp_path, extractor):
    for i in range(7):
        write_photo(tmp_path / f"p/{i}.png", noise(i, *((64, 48) if i % 2 else (48, 64))))
    run(tmp_path / "p", tmp_path / "f.h5", batch_size=2)
    assert sorted(extractor.seen) == [
        (1, 48, 64, 3),
        (2, 48, 64, 3),
        (2, 64, 48, 3),
        (2, 64, 48, 3),
    ]


def test_batches_are_those_of_the_whole_folder_when_a_run_goes_on(tmp_path, extractor):
    """So that what an extractor rounds differently in another batch is the same after a kill."""
    for i in range(7):
        write_photo(tmp_path / f"p/{i}.png", noise(i))
    job = Job(tmp_path / "p", batch_size=3)
    whole, _ = run(tmp_path / "p", tmp_path / "whole.h5", batch_size=3)
    first = FeatureStore.open(tmp_path / "f.h5", job.key())
    batches = missing(job, first, Tally())
    Pipeline(job, first).run_batches([next(batches)])  # 0, 1, 2
    first.write("4.png", whole.read("4.png"), whole.size("4.png"))  # of an unfinished batch
    first.flush()
    extractor.seen.clear()
    _, tally = run(tmp_path / "p", tmp_path / "f.h5", batch_size=3)
    assert extractor.seen == [(3, 48, 64, 3), (1, 48, 64, 3)] and tally.images == 3
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_bad_files_are_named_skipped_and_counted(tmp_path, extractor):
    folder = tmp_path / "p"
    write_photo(folder / "deep/er/good.png", noise(1))
    write_photo(folder / "good.png", noise(2))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    whole = write_photo(folder / "cut.jpg", noise(3, 200, 100)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    write_photo(folder / "tiny.png", noise(4, 4, 4))
    store, tally = run(folder, tmp_path / "f.h5")
    assert store.names() == ["deep/er/good.png", "good.png"]
    assert tally.images == 2
    bad = sorted(sentence.split(" ")[0] for sentence in tally.skipped)
    assert bad == [str(folder / name) for name in ("cut.jpg", "empty.jpg", "text.png", "tiny.png")]
    with pytest.raises(InputError, match=r"(cut|empty|text|tiny)\.(jpg|png)"):
        run(folder, tmp_path / "strict.h5", strict=True)


def test_a_run_that_leaves_out_bad_files_is_over_when_it_goes_on(tmp_path, extractor):
    """Nothing is extracted or written, not even the file anew, for a batch that has one of them."""
    whole = write_photo(tmp_path / "p/cut.jpg", noise(1)).read_bytes()
    write_photo(tmp_path / "p/good.jpg", noise(2))
    (tmp_path / "p/cut.jpg").write_bytes(whole[:-9])
    run(tmp_path / "p", tmp_path / "f.h5")
    before, seen = (tmp_path / "f.h5").stat(), len(extractor.seen)
    store, tally = run(tmp_path / "p", tmp_path / "f.h5")
    assert (store.names(), len(tally.skipped), tally.images) == (["good.jpg"], 1, 0)
    assert len(extractor.seen) == seen
    assert (tmp_path / "f.h5").stat().st_ino == before.st_ino
    (tmp_path / "p/cut.jpg").write_bytes(whole)
    store, tally = run(tmp_path / "p", tmp_path / "f.h5")
    assert (store.names(), tally.images) == (["cut.jpg", "good.jpg"], 1)


def test_a_file_whose_header_lies_is_bad(tmp_path, extractor):
    path = write_photo(tmp_path / "p/a.png", noise(1, 64, 48))
    write_photo(tmp_path / "p/b.png", noise(2, 64, 48))
    data = bytearray(path.read_bytes())
    data[16:20] = (65).to_bytes(4, "big")
    path.write_bytes(data)
    store, tally = run(tmp_path / "p", tmp_path / "f.h5")
    assert store.names() == ["b.png"] and len(tally.skipped) == 1 and "a.png" in tally.skipped[0]


PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
NO_SIZES = {
    "cut.png": PNG_HEAD[:10],
    "flat.png": PNG_HEAD + struct.pack(">II5xI", 9, 0, 0),
    "flat.jpg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 0, 9, 3),
    "large.png": PNG_HEAD + struct.pack(">II5xI", 2**31 - 1, 2**31 - 1, 0),
}


@pytest.mark.parametrize("name", NO_SIZES)
def test_a_file_whose_header_has_no_possible_size_is_bad(tmp_path, extractor, name):
    write_photo(tmp_path / "p/good.png", noise(1))
    (tmp_path / "p" / name).write_bytes(NO_SIZES[name])
    store, tally = run(tmp_path / "p", tmp_path / "f.h5")
    assert store.names() == ["good.png"]
    assert len(tally.skipped) == 1 and f"{name} is truncated" in tally.skipped[0]


def test_a_header_is_read_of_images_that_pillow_takes_for_an_attack(tmp_path, monkeypatch):
    """Some telephones have 200 million pixels."""
    path = write_photo(tmp_path / "photo.jpg", noise(1), t0x112=6, t0x110="a telephone")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_header(path) == (64, 48, 6)
    assert read_exif(path)[0x110] == "a telephone"
    assert Image.MAX_IMAGE_PIXELS == 1000


class DecodingOnTheProcessor(DecodingLane):
    """As the one of a GPU, which takes all JPEGs that are whole but one of them."""

    def __init__(self, extractor, half=False, threads=1):
        Lane.__init__(self, extractor, half)
        self.decoded = 0

    buffer, _features = Lane.buffer, Lane._features

    def decode(self, files, shapes):
        images = [cv2.imdecode(np.frombuffer(f, np.uint8), IMREAD_STORED) for f in files]
        found = [
            i if i is not None and i.shape == s else None
            for i, s in zip(images, shapes, strict=True)
        ]
        self.decoded += sum(image is not None for image in found)
        return [None, *(i if i is None else i[..., ::-1] for i in found[1:])]

    def image(self, pixels):
        return pixels

    def stack(self, images):
        return np.stack([np.rot90(image, turns) for image, turns in images])


IMREAD_STORED = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def test_files_that_the_gpu_decodes_give_the_same_features(tmp_path, extractor, monkeypatch):
    """Turned ones and masks too; what it cannot decode OpenCV does, or says why not."""
    monkeypatch.setattr(extraction, "DecodingLane", DecodingOnTheProcessor)
    folder = tmp_path / "p"
    for i in range(6):
        image = noise(i) if i < 4 else noise(i, 48, 64)
        write_photo(folder / f"{i}.jpg", image, t0x112=1 if i < 4 else 6)
    write_photo(folder / "large.jpg", noise(7, 200, 100))
    write_photo(folder / "other.png", noise(8))
    (folder / "2.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-200])
    options = {"backend": "fused", "max_size": 100, "batch_size": 2}
    expected, ours = run(folder, tmp_path / "f.h5", max_size=100, batch_size=2)
    found, theirs = run(folder, tmp_path / "g.h5", decoder="nvimgcodec", **options)
    assert theirs.skipped == ours.skipped and "2.jpg is truncated" in ours.skipped[0]
    assert found.names() == expected.names() and len(found) == 7
    for name in found.names():
        for field, values in vars(expected.read(name)).items():
            np.testing.assert_array_equal(getattr(found.read(name), field), values)


def test_a_decoder_that_cannot_be_made_is_not_replaced_by_another(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no JPEG extension")

    names = SimpleNamespace(HW_GPU_ONLY=0, HYBRID_CPU_GPU=1)
    fake = SimpleNamespace(BackendKind=names, Backend=lambda kind: kind, Decoder=refuse)
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=fake))
    extractor = SimpleNamespace(device="cpu", torch_device=SimpleNamespace(index=0))
    with pytest.raises(InputError, match=r"no decoder of JPEGs here \(no JPEG extension\)"):
        DecodingLane(extractor)


def test_masks_are_those_of_colmap(tmp_path, extractor):
    """By both of its names; black where no keypoint may be; of the image as stored."""
    extractor.count = 64 * 48
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[10:20, 30:] = 1  # anything but black
    for name in ("a.png", "b.jpg", "turned.png"):
        write_photo(tmp_path / f"p/{name}", noise(1), t0x112=6 if name == "turned.png" else 1)
    write_photo(tmp_path / "p/missing.png", noise(1))
    write_photo(tmp_path / "m/a.png.png", mask)
    write_photo(tmp_path / "m/b.png", mask)
    write_photo(tmp_path / "m/turned.png.png", mask)
    write_photo(tmp_path / "p/other.png", noise(1))
    write_photo(tmp_path / "m/other.png", mask[:, :60])
    store, tally = run(tmp_path / "p", tmp_path / "f.h5", masks=tmp_path / "m")
    for name in ("a.png", "b.jpg", "turned.png"):
        places = {tuple(point) for point in store.read(name).keypoints.tolist()}
        assert places == {(x, y) for x in range(30, 64) for y in range(10, 20)}
    assert store.names() == ["a.png", "b.jpg", "turned.png"]
    assert sorted("no mask" in s for s in tally.skipped) == [False, True]
    assert any("64x48 as stored" in sentence for sentence in tally.skipped)


def test_a_keypoint_counts_for_the_pixel_that_colmap_takes_it_for():
    """int(x + 0.5) of our coordinates: COLMAP's have their origin at the pixel's corner."""
    mask = np.array([[0, 255]], np.uint8)
    x = np.array([-0.6, 0.0, 0.49, 0.5, 1.49, 1.5], np.float32)
    features = Features(np.stack([x, 0 * x], axis=1), x, x[:, None])
    np.testing.assert_array_equal(unmasked(features, mask).scores, np.float32([0.5, 1.49]))


def test_a_mask_may_be_grey_or_have_another_suffix_than_the_image(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((48, 64), 7, np.uint8))
    photo = Photo("a.jpeg", (64, 48), lambda: None)
    np.testing.assert_array_equal(read_mask(tmp_path, photo), np.full((48, 64), 7))


def test_an_image_whose_mask_would_have_too_long_a_name_has_the_other(tmp_path):
    photo = Photo(f"{'a' * 251}.jpg", (64, 48), lambda: None)
    with pytest.raises(InputError, match="has no mask"):
        read_mask(tmp_path, photo)
    cv2.imwrite(str(tmp_path / f"{'a' * 251}.png"), np.full((48, 64), 7, np.uint8))
    np.testing.assert_array_equal(read_mask(tmp_path, photo), np.full((48, 64), 7))


def test_images_are_found_in_folders_below_in_natural_order(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.JPG", ".hidden/1.png", "b/.x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["a.JPG", "b/2.png", "b/10.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in"):
        find_images(tmp_path / "empty")
    with pytest.raises(InputError, match=r"cannot list .*nowhere \(No such file"):
        find_images(tmp_path / "nowhere")


@pytest.fixture
def clip(tmp_path) -> Path:
    """Ten grey frames, each brighter."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for i in range(10):
        writer.write(np.full((48, 64, 3), 20 * i + 10, np.uint8))
    writer.release()
    return path


def test_frames_of_a_video_by_number(tmp_path, clip, extractor):
    found = {name: image.mean() for name, image in frames(clip, every=3, limit=3)}
    assert list(found) == ["clip.avi/000000", "clip.avi/000003", "clip.avi/000006"]
    np.testing.assert_allclose(list(found.values()), [10, 70, 130], atol=3)
    assert len(list(frames(clip))) == 10
    store, _ = run(clip, tmp_path / "f.h5", every=4)
    assert store.names() == ["clip.avi/000000", "clip.avi/000004", "clip.avi/000008"]


@pytest.mark.parametrize("every", [1, 3])
def test_a_video_that_ends_long_before_its_container_says_is_named(clip, capsys, every):
    """A whole one is not, nor one of which more frames were not asked for."""
    list(frames(clip, every))
    pieces = clip.read_bytes().split(b"00dc")  # so begins each frame, and is named in the header
    clip.write_bytes(b"00dc".join(pieces[:7]))
    list(frames(clip, every, limit=-(-5 // every)))
    assert not capsys.readouterr().err
    assert len(list(frames(clip, every))) == -(-5 // every)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{clip} ends after 5 of the 10 frames")


def test_what_is_no_video_is_refused(tmp_path, capfd):
    (tmp_path / "clip.mp4").write_text("no video")
    with pytest.raises(InputError, match="no video that OpenCV can read"):
        next(frames(tmp_path / "clip.mp4"))
    assert not capfd.readouterr().err  # FFmpeg has a line of its own about it
    odd = tmp_path / os.fsdecode(b"\xff.mp4")
    odd.write_text("no video")
    with pytest.raises(InputError, match=r"the name of the video .*dcff\.mp4' is not UTF-8"):
        next(frames(odd))
    with pytest.raises(InputError, match="there is no video"):
        next(frames(tmp_path / "nowhere.mp4"))
    with pytest.raises(InputError, match="camera 97 gives no image"):
        next(frames("97"))


@pytest.mark.parametrize("name", ["2024", "frames_of.mp4"])
def test_a_folder_may_be_named_as_a_camera_or_a_video(tmp_path, extractor, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert is_video(name) and not is_video("²")
    write_photo(tmp_path / name / "a.png", noise(1))
    assert not is_video(name)
    assert run(Path(name), tmp_path / "f.h5")[0].names() == ["a.png"]


def test_too_little_memory_is_said_in_a_sentence(tmp_path, extractor, monkeypatch):
    def fail(images):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(extractor, "extract_batch", fail)
    write_photo(tmp_path / "p/a.png", noise(1))
    with pytest.raises(InputError, match="not enough memory for 1 images of 64x48"):
        run(tmp_path / "p", tmp_path / "f.h5")


def test_what_else_an_extractor_raises_comes_up(tmp_path, extractor, monkeypatch):
    def fail(images):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(extractor, "extract_batch", fail)
    write_photo(tmp_path / "p/a.png", noise(1))
    with pytest.raises(RuntimeError, match="a mistake"):
        run(tmp_path / "p", tmp_path / "f.h5")


def test_the_share_of_each_stage_is_of_the_time_that_its_threads_have():
    tally = Tally(images=10, wall=2.0)
    tally.busy.update(decode=4.0, extract=1.0, write=0.5)
    tally.threads.update(decode=4, extract=1, write=1)
    assert tally.shares() == "decode 50%, extract 50%, write 25%"
    assert tally.rate == 5
    assert (tally + tally).shares() == tally.shares() and (tally + tally).images == 20
