"""Small image sets with known homographies, as files."""

from pathlib import Path

import cv2
import numpy as np

from tests.helpers.textures import texture

MARGIN = 16  # px that the second image may be moved by


def moved(dx: float, dy: float) -> np.ndarray:
    """The homography of a shift."""
    return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.0]])


def write_matrix(path: Path, homography: np.ndarray) -> None:
    """As HPatches has it: three rows of three numbers."""
    path.write_text("\n".join(" ".join(map(str, row)) for row in homography) + "\n")


def write_scene(folder: Path, shifts: list[tuple[int, int]], seed: int = 0) -> Path:
    """An HPatches scene: windows of one texture, the second and further ones moved."""
    folder.mkdir(parents=True)
    big = cv2.GaussianBlur(texture(120 + 2 * MARGIN, 160 + 2 * MARGIN, seed), (0, 0), 1.2)
    for number, (dx, dy) in enumerate([(0, 0), *shifts], 1):
        y, x = MARGIN - dy, MARGIN - dx
        cv2.imwrite(str(folder / f"{number}.ppm"), big[y : y + 120, x : x + 160])
        if number > 1:
            write_matrix(folder / f"H_1_{number}", moved(dx, dy))
    return folder


def write_sequence(folder: Path, shifts: list[tuple[int, int]], seed: int = 0) -> Path:
    """The same as a sequence: frames, and all homographies in one file."""
    write_scene(folder, shifts, seed)
    matrices = [np.eye(3), *(moved(dx, dy) for dx, dy in shifts)]
    np.savetxt(folder / "homographies.txt", np.concatenate(matrices), header="by hand")
    for path in folder.glob("H_1_*"):
        path.unlink()
    return folder
