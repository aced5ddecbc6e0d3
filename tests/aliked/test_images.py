"""Image files as users have them: every kind that is read, every kind that is refused."""

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from aliked import images
from aliked.errors import InputError
from aliked.images import list_images, load_image, read_header, require_same_size

LOSSLESS = (".png", ".bmp", ".tif", ".tiff", ".ppm")


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return data.coffee()[100:164, 300:396]  # [64, 96, 3]


def encode(image: np.ndarray, suffix: str) -> bytes:
    """RGB, RGBA or grey pixels in the format of `suffix`."""
    order = {2: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[
        image.ndim if image.ndim == 2 else image.shape[2]
    ]
    pixels = image if image.ndim == 2 else image[..., order]
    return cv2.imencode(suffix, np.ascontiguousarray(pixels))[1].tobytes()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_files_give_their_rgb_pixels(tmp_path, photo, suffix):
    image = load_image(written(tmp_path / f"photo{suffix}", encode(photo, suffix)))
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    np.testing.assert_array_equal(image, photo)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_files_keep_the_channel_order(tmp_path, photo, suffix):
    image = load_image(written(tmp_path / f"photo{suffix}", encode(photo, suffix)))
    # Compression costs a few grey levels; this photograph is mostly red.
    assert np.abs(image.astype(float) - photo).mean() < 8
    assert np.abs(image[..., ::-1].astype(float) - photo).mean() > 20


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".pgm", ".tif"])
def test_grey_is_repeated_in_all_channels(tmp_path, photo, suffix):
    grey = photo[..., 0]
    image = load_image(written(tmp_path / f"grey{suffix}", encode(grey, suffix)))
    assert image.shape == (64, 96, 3)
    assert (image == image[..., :1]).all()
    if suffix != ".jpg":
        np.testing.assert_array_equal(image[..., 0], grey)


def test_alpha_is_dropped_and_the_colour_under_it_stays(tmp_path, photo):
    alpha = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    image = load_image(written(tmp_path / "alpha.png", encode(np.dstack([photo, alpha]), ".png")))
    np.testing.assert_array_equal(image, photo)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_to_the_nearest_of_8(tmp_path, photo, suffix):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 2**16, photo.shape, dtype=np.uint16)
    deep[0, :2] = [[0, 128, 129], [65535, 65406, 65407]]  # both sides of a half, and the ends
    image = load_image(written(tmp_path / f"deep{suffix}", encode(deep, suffix)))
    np.testing.assert_array_equal(image, np.rint(deep / 257))
    assert image[0, :2].tolist() == [[0, 0, 1], [255, 254, 255]]


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments where EXIF and XMP are."""
    parts = (b"\xff\xe1" + struct.pack(">H", len(one) + 2) + one for one in segments)
    return jpeg[:2] + b"".join(parts) + jpeg[2:]


def exif_of(*tags: tuple[int, int, int, int], order: str = "<") -> bytes:
    """EXIF with tags: number, type, how many values, and the first as 16 bits."""
    begin = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8)
    entries = b"".join(struct.pack(f"{order}HHIHH", *tag, 0) for tag in tags)
    return b"Exif\0\0" + begin + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


TURNED = (0x112, 3, 1, 6)  # turn it clockwise
XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="6"/>'


def test_exif_orientation_is_applied(tmp_path, photo):
    jpeg = encode(photo, ".jpg")
    upright = load_image(written(tmp_path / "upright.jpg", jpeg))
    image = load_image(written(tmp_path / "turned.jpg", with_segments(jpeg, exif_of(TURNED))))
    np.testing.assert_array_equal(image, np.rot90(upright, -1))


USUAL = {
    "no EXIF": [],
    "little-endian": [exif_of((0x10F, 2, 4, 0), TURNED)],
    "big-endian": [exif_of(TURNED, (0x128, 3, 1, 2), order=">")],
    "no orientation": [exif_of((0x128, 3, 1, 2))],
    "impossible": [exif_of((0x112, 3, 1, 9))],
    "60 kB of a maker's notes": [exif_of(TURNED) + bytes(60_000)],
    "XMP about something else": [XMP[:35], exif_of(TURNED)],
}
ODD = {
    "only XMP": [XMP],
    "XMP, and EXIF without": [exif_of((0x128, 3, 1, 2)), XMP],
    "twice": [exif_of((0x112, 3, 1, 3), TURNED)],
    "two EXIF": [exif_of(TURNED), exif_of((0x112, 3, 1, 3))],
    "as 32 bits": [exif_of((0x112, 4, 1, 6))],
    "cut off": [exif_of(TURNED, TURNED)[:-20]],
    "without a list": [b"Exif\0\0II*\0\xff\xff\0\0"],
    "empty": [b"Exif\0\0"],
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", [*USUAL, *ODD])
def test_a_header_says_what_pillow_reads(tmp_path, photo, monkeypatch, kind):
    jpeg = with_segments(encode(photo, ".jpg"), *(USUAL | ODD)[kind])
    path = written(tmp_path / "photo.jpg", jpeg)
    with Image.open(path) as image:
        expected = image.getexif().get(0x112, 1)
    if kind in USUAL:  # and without it, which takes several times as long
        monkeypatch.setattr(images, "_full_header", None)
    assert read_header(path) == (96, 64, expected if expected in range(1, 9) else 1)


JPEGS = {
    **{name: ("RGB", {"subsampling": name}) for name in ("4:4:4", "4:2:2", "4:2:0")},
    "progressive": ("RGB", {"progressive": True}),
    "RGB inside": ("RGB", {"keep_rgb": True}),
    "restarts": ("RGB", {"restart_marker_blocks": 2}),
    "grey": ("L", {}),
    "CMYK": ("CMYK", {}),
    "turned": ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_as_stored_has_the_pixels_of_opencv(tmp_path, photo, kind, monkeypatch):
    """simplejpeg reads it, in the memory it is given, where that is of its shape."""
    simplejpeg = pytest.importorskip("simplejpeg")
    colours, options = JPEGS[kind]
    Image.fromarray(photo[:61, :93]).convert(colours).save(tmp_path / "a.jpg", **options)
    ignored = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    expected = cv2.imread(str(tmp_path / "a.jpg"), ignored)[..., ::-1]
    calls = []

    def count(data, *args, **options):
        calls.append(options)
        return decode(data, *args, **options)

    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", count)
    out, other = np.empty_like(expected), np.empty((5, 5, 3), np.uint8)
    assert load_image(tmp_path / "a.jpg", stored=1, out=out) is out
    assert np.array_equal(out, expected)
    assert np.array_equal(load_image(tmp_path / "a.jpg", stored=1, out=other), expected)
    assert len(calls) == 2 and calls[0]["buffer"] is out and "buffer" not in calls[1]


@pytest.mark.parametrize("length", [100, 1000, -2])
def test_a_jpeg_cut_off_is_refused_by_either_library(tmp_path, photo, length):
    pytest.importorskip("simplejpeg")
    path = written(tmp_path / "a.jpg", encode(photo, ".jpg")[:length])
    with pytest.raises(InputError, match="truncated"):
        load_image(path, stored=1)


@pytest.mark.parametrize("suffix", [*LOSSLESS, ".jpg", ".webp", ".pgm"])
@pytest.mark.parametrize("missing", ["half", "the last 2 bytes"])
def test_a_truncated_file_is_named_and_refused(tmp_path, photo, suffix, missing):
    content = encode(photo[..., 0] if suffix == ".pgm" else photo, suffix)
    cut = len(content) // 2 if missing == "half" else -2
    path = written(tmp_path / f"cut{suffix}", content[:cut])
    with pytest.raises(InputError, match=rf"cut\{suffix} is truncated"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"II*\0\1"])
def test_a_file_that_is_no_image_is_named_and_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"notes\.png .*not an image"):
        load_image(written(tmp_path / "notes.png", content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png \(No such file"):
        load_image(tmp_path / "gone.png")


def test_opencv_does_not_write_about_a_bad_file(tmp_path, photo, capfd):
    path = written(tmp_path / "cut.bmp", encode(photo, ".bmp")[:500])
    with pytest.raises(InputError):
        load_image(path)
    assert capfd.readouterr().err == ""


def test_floating_point_pixels_are_refused(tmp_path, photo):
    path = written(tmp_path / "depth.tif", encode(photo.astype(np.float32), ".tif"))
    with pytest.raises(InputError, match=r"depth\.tif has float32 pixels"):
        load_image(path)


@pytest.mark.parametrize("shape", [(1, 1), (4, 100), (100, 4)])
def test_an_image_without_place_for_a_keypoint_is_refused(tmp_path, shape):
    path = written(tmp_path / "small.png", encode(np.zeros((*shape, 3), np.uint8), ".png"))
    with pytest.raises(InputError, match=rf"small\.png has {shape[1]}x{shape[0]} pixels"):
        load_image(path)


def test_the_smallest_possible_image_is_read(tmp_path):
    path = written(tmp_path / "small.png", encode(np.zeros((5, 5, 3), np.uint8), ".png"))
    assert load_image(path).shape == (5, 5, 3)


def test_names_outside_ascii_work(tmp_path, photo):
    folder = tmp_path / "Straße 東京"
    folder.mkdir()
    written(folder / "été.png", encode(photo, ".png"))
    (path,) = list_images(folder)
    assert path.name == "été.png"
    np.testing.assert_array_equal(load_image(path), photo)


def test_images_are_listed_in_natural_order(tmp_path):
    names = [
        "frame2.png",
        "frame10.PNG",
        "frame9.jpg",
        "Frame1.png",
        "1.5.png",
        "1.50.png",
        "01.5.png",
    ]
    for name in [*names, ".hidden.png", "notes.txt", "frame3.png.txt", "png"]:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to("circle.png")  # a bad file, and no reason to read none
    assert [path.name for path in list_images(tmp_path)] == [
        "01.5.png",
        "1.5.png",
        "1.50.png",
        "circle.png",
        "Frame1.png",
        "frame2.png",
        "frame9.jpg",
        "frame10.PNG",
    ]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no image in"):
        list_images(tmp_path)


def test_a_missing_folder_and_a_file_are_refused_at_once(tmp_path):
    with pytest.raises(InputError, match=r"gone .*No such file or directory"):
        list_images(tmp_path / "gone")
    (tmp_path / "file.png").touch()
    with pytest.raises(InputError, match=r"file\.png .*Not a directory"):
        list_images(tmp_path / "file.png")


def read(folder):
    """Each image with its path, when its turn comes."""
    return ((path, load_image(path)) for path in list_images(folder))


def test_images_are_passed_on_one_at_a_time(tmp_path, photo):
    written(tmp_path / "1.png", encode(photo, ".png"))
    written(tmp_path / "2.png", b"damaged")
    images = require_same_size(read(tmp_path))
    path, _ = next(images)
    assert path.name == "1.png"
    with pytest.raises(InputError, match=r"2\.png"):
        next(images)


def test_images_of_another_size_are_named_with_both_sizes(tmp_path, photo):
    written(tmp_path / "1.png", encode(photo, ".png"))
    written(tmp_path / "2.png", encode(photo, ".png"))
    assert len(list(require_same_size(read(tmp_path)))) == 2
    written(tmp_path / "3.png", encode(photo[:50], ".png"))
    with pytest.raises(InputError, match=r"3\.png has 96x50 pixels but .*1\.png has 96x64"):
        list(require_same_size(read(tmp_path)))


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for path in list_images(tmp_path):
        with pytest.raises(InputError, match=rf"{path.name} is no regular file"):
            load_image(path)


@pytest.mark.parametrize(
    ("mode", "options", "what"),
    [
        ("LAB", {}, "another space than RGB"),
        ("RGB", {"compression": "jpeg"}, "a JPEG inside"),
        ("YCbCr", {"compression": "jpeg"}, "a JPEG inside"),
        ("LAB", {"big_tiff": True}, "another space than RGB"),
    ],
)
def test_a_tiff_whose_colours_would_be_wrong_is_refused(tmp_path, photo, mode, options, what):
    Image.fromarray(photo).convert(mode).save(tmp_path / "odd.tif", **options)
    with pytest.raises(InputError, match=rf"odd\.tif is a TIFF .*{what}"):
        load_image(tmp_path / "odd.tif")


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"compression": "tiff_lzw"}), ("RGBA", {}), ("CMYK", {})],
)
def test_other_tiffs_keep_their_colours(tmp_path, photo, mode, options):
    Image.fromarray(photo).convert(mode).save(tmp_path / "usual.tif", **options)
    np.testing.assert_array_equal(load_image(tmp_path / "usual.tif"), photo)


def test_a_grey_jpeg_inside_a_tiff_has_no_colours_to_mistake(tmp_path, photo):
    Image.fromarray(photo).convert("L").save(tmp_path / "grey.tif", compression="jpeg")
    assert load_image(tmp_path / "grey.tif").shape == photo.shape


def test_images_of_formats_that_are_not_read_are_named(tmp_path, photo, capsys):
    written(tmp_path / "1.png", encode(photo, ".png"))
    for name in ("b.GIF", "a.heic", "notes.txt", ".hidden.gif"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["1.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 files passed over (a.heic, b.GIF)" in line
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match="no image in"):
        list_images(tmp_path)


def test_a_large_image_is_reduced_to_its_longer_side(tmp_path, photo):
    path = written(tmp_path / "photo.png", encode(photo, ".png"))  # 96x64
    assert load_image(path, max_size=48).shape == (32, 48, 3)
    np.testing.assert_array_equal(load_image(path, max_size=96), photo)
    tall = written(tmp_path / "tall.png", encode(photo[:, :6], ".png"))  # 6x64
    assert load_image(tall, max_size=32).shape == (32, 5, 3)  # no smaller than detection takes


def test_pixels_go_into_memory_of_their_shape_and_no_other(tmp_path, photo):
    path = written(tmp_path / "photo.png", encode(photo, ".png"))
    batch = np.zeros((3, *photo.shape), np.uint8)
    load_image(path, out=batch[1])
    np.testing.assert_array_equal(batch, np.stack([photo * 0, photo, photo * 0]))
    small = np.zeros((2, 2, 3), np.uint8)
    np.testing.assert_array_equal(load_image(path, out=small), photo)
    assert not small.any()
