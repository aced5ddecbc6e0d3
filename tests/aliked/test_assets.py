"""The shipped sequences: exact homographies, and photographs whose origin is written down."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tools import make_assets

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SIZES = {"sequence_640x480": (640, 480), "sequence_1241x376": (1241, 376)}


def frames(folder: Path) -> list[np.ndarray]:
    return [cv2.imread(str(path)) for path in sorted(folder.glob("*.jpg"))]


def homographies(folder: Path) -> np.ndarray:
    return np.loadtxt(folder / "homographies.txt").reshape(-1, 3, 3)


def shift_after_warping(first: np.ndarray, other: np.ndarray, homography: np.ndarray) -> float:
    """How far `other`, warped back by its homography, still is from `first`, in pixels."""
    size = first.shape[1::-1]
    first, other = (cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in (first, other))
    back = cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(other, homography, size, flags=back | cv2.INTER_CUBIC)
    inside = cv2.warpPerspective(np.full_like(other, 255), homography, size, flags=back)
    inside = cv2.erode(inside, np.ones((9, 9)))
    until = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 50, 1e-6)
    shift = np.eye(2, 3, dtype=np.float32)
    _, shift = cv2.findTransformECC(first, warped, shift, cv2.MOTION_TRANSLATION, until, inside, 5)
    return float(np.linalg.norm(shift[:, 2]))


@pytest.mark.parametrize("name", SIZES)
def test_frames_have_the_size_of_their_name(name: str) -> None:
    images = frames(ASSETS / name)
    assert len(images) >= 10
    assert {image.shape for image in images} == {(*SIZES[name][::-1], 3)}
    assert len(homographies(ASSETS / name)) == len(images)


@pytest.mark.parametrize("name", SIZES)
def test_homographies_agree_with_the_frames(name: str) -> None:
    images, maps = frames(ASSETS / name), homographies(ASSETS / name)
    assert np.array_equal(maps[0], np.eye(3))
    for image, homography in zip(images[1:], maps[1:], strict=True):
        # 0.001 to 0.006 pixels are measured; the limit leaves room for another JPEG decoder.
        assert shift_after_warping(images[0], image, homography) < 0.015


@pytest.mark.parametrize("name", SIZES)
def test_origin_is_the_centre_of_the_top_left_pixel(name: str) -> None:
    images, maps = frames(ASSETS / name), homographies(ASSETS / name)
    corner = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])  # as if the origin were its corner
    wrong = corner @ maps[-1] @ np.linalg.inv(corner)
    assert shift_after_warping(images[0], images[-1], wrong) > 0.03


def test_sequences_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in ASSETS.glob("sequence_*/*")) < 6_000_000


def test_every_photograph_has_its_origin_and_licence_written_down() -> None:
    readme = (ASSETS / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    for scene in make_assets.SCENES.values():
        for file in {scene.ground, *(item.file for item in scene.prints)}:
            (row,) = (row for row in rows if row.startswith(f"| `{file}`"))
            assert "| CC0 |" in row or "| public domain |" in row


@pytest.mark.parametrize("name", SIZES)
def test_the_script_makes_the_committed_files(name: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photographs")
    make_assets.write_scene(make_assets.SCENES[name], tmp_path)
    np.testing.assert_allclose(homographies(tmp_path), homographies(ASSETS / name), rtol=1e-9)
    for made, committed in zip(frames(tmp_path), frames(ASSETS / name), strict=True):
        # Identical with the same OpenCV; another one may round and compress differently.
        assert np.abs(made.astype(int) - committed).mean() < 1
