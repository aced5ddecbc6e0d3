"""Make the image sequences in `assets/`: prints of public-domain photographs, filmed from above.

Each scene is one plane, so that the motion between two frames is exactly a homography, which is
written beside the frames. The photographs come with scikit-image (`assets/README.md` names them).
"""

import argparse
import importlib.resources
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from aliked import cli  # noqa: E402
from aliked.files import whole_file, write_text  # noqa: E402

SUPERSAMPLING = 4  # samples per frame pixel and direction
FOCAL_LENGTH = 1.2  # in frame widths: about 45 degrees across
JPEG_QUALITY = 92
TILE, TILE_STEP = 512, 400  # canvas pixels; neighbouring ground tiles blend over the difference


@dataclass(frozen=True)
class Print:
    """One photograph on the ground."""

    file: str  # in scikit-image's data folder
    x: float  # centre on the canvas, pixels
    y: float
    width: int  # canvas pixels, without the white border; never more than the file has
    angle: float  # degrees, clockwise


@dataclass(frozen=True)
class Pose:
    """Where the camera looks: a point on the canvas, from how far, and how it is turned."""

    x: float  # canvas pixels
    y: float
    scale: float  # canvas pixels per frame pixel at the point looked at
    pan: float  # degrees, about the frame's vertical axis
    tilt: float  # degrees, about the frame's horizontal axis
    roll: float  # degrees, about the viewing direction


@dataclass(frozen=True)
class Scene:
    """A ground with prints on it, and the camera's way over it."""

    frame_size: tuple[int, int]  # width, height, pixels
    num_frames: int
    canvas_size: tuple[int, int]  # width, height, pixels
    ground: str  # a grey 512x512 texture in scikit-image's data folder
    tint: tuple[float, float, float]  # of the ground: blue, green, red
    prints: tuple[Print, ...]  # a later print lies on top
    path: tuple[Pose, Pose, Pose]  # control points of a quadratic Bezier curve


SCENES = {
    "sequence_640x480": Scene(
        frame_size=(640, 480),
        num_frames=12,
        canvas_size=(2300, 1800),
        ground="gravel.png",
        tint=(0.92, 1.00, 1.08),
        prints=(
            Print("hubble_deep_field.jpg", 1130, 420, 620, -7),
            Print("retina.jpg", 1870, 480, 460, 12),
            Print("camera.png", 480, 470, 440, 6),
            Print("grass.png", 1690, 1040, 400, -14),
            Print("coffee.png", 1180, 960, 560, 5),
            Print("astronaut.png", 590, 1080, 480, -9),
            Print("rocket.jpg", 1560, 1440, 560, 8),
            Print("chelsea.png", 920, 1470, 440, -4),
        ),
        path=(
            Pose(930, 760, 1.75, -4, 6, -6),
            Pose(1180, 900, 1.35, 14, 14, 4),
            Pose(1290, 1030, 1.60, 3, 20, 12),
        ),
    ),
    "sequence_1241x376": Scene(
        frame_size=(1241, 376),
        num_frames=12,
        canvas_size=(3800, 1500),
        ground="grass.png",
        tint=(0.62, 1.10, 0.88),
        prints=(
            Print("gravel.png", 520, 980, 400, 8),
            Print("camera.png", 830, 600, 440, -5),
            Print("rocket.jpg", 1260, 930, 580, 6),
            Print("chelsea.png", 1500, 530, 430, -8),
            Print("astronaut.png", 1830, 870, 470, 4),
            Print("hubble_deep_field.jpg", 2330, 620, 600, 9),
            Print("coffee.png", 2540, 1060, 520, -6),
            Print("retina.jpg", 2980, 760, 480, 3),
        ),
        path=(
            Pose(1480, 760, 1.50, 8, 16, -2),
            Pose(1800, 740, 1.20, -4, 22, 3),
            Pose(2150, 800, 1.40, -10, 14, 1),
        ),
    ),
}


def photograph(file: str) -> np.ndarray:
    """A photograph that scikit-image carries, float32 [H, W, 3] BGR in [0, 1]."""
    data = importlib.resources.files("skimage.data").joinpath(file).read_bytes()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return image.astype(np.float32) / 255


def ground(scene: Scene) -> np.ndarray:
    """The canvas without prints: the texture in different orientations, blended at the seams."""
    texture = photograph(scene.ground)
    mean = texture.mean()
    ramp = np.clip((TILE / 2 - np.abs(np.arange(TILE) - (TILE - 1) / 2)) / (TILE - TILE_STEP), 0, 1)
    weight = np.outer(ramp, ramp).astype(np.float32)[..., None]
    width, height = scene.canvas_size
    total = np.zeros((height + TILE, width + TILE, 3), np.float32)
    power = np.zeros((height + TILE, width + TILE, 1), np.float32)
    for row, y in enumerate(range(0, height, TILE_STEP)):
        for column, x in enumerate(range(0, width, TILE_STEP)):
            # Turned and mirrored, so that the ground does not visibly repeat within a frame.
            tile = np.rot90(texture, row + column)[:: -1 if row % 2 else 1]
            total[y : y + TILE, x : x + TILE] += weight * (tile - mean)
            power[y : y + TILE, x : x + TILE] += weight**2
    # Dividing by the root of the summed squares keeps the contrast where tiles overlap.
    offset = (TILE - TILE_STEP) // 2
    blended = (total / np.sqrt(power + 1e-6) + mean)[offset:, offset:][:height, :width]
    return blended * np.float32(scene.tint)


def bordered_print(item: Print) -> np.ndarray:
    """The photograph at its size on the canvas, with the white border of photographic paper."""
    image = photograph(item.file)
    height = round(image.shape[0] * item.width / image.shape[1])
    image = cv2.resize(image, (item.width, height), interpolation=cv2.INTER_AREA)
    border = item.width // 24
    return cv2.copyMakeBorder(image, *[border] * 4, cv2.BORDER_CONSTANT, value=[0.93, 0.95, 0.96])


def lay(canvas: np.ndarray, item: Print) -> np.ndarray:
    """The canvas with one more print on it, and the print's shadow."""
    image = bordered_print(item)
    height, width = image.shape[:2]
    placed = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -item.angle, 1)
    placed[:, 2] += item.x - (width - 1) / 2, item.y - (height - 1) / 2
    size = canvas.shape[1::-1]
    mask = cv2.warpAffine(np.ones((height, width), np.float32), placed, size)[..., None]
    image = cv2.warpAffine(image, placed, size, borderMode=cv2.BORDER_REPLICATE)
    shadow = cv2.GaussianBlur(np.roll(mask, (10, 8), axis=(0, 1)), (0, 0), 9)[..., None]
    return mask * image + (1 - mask) * canvas * (1 - 0.6 * shadow)


def paint(scene: Scene) -> np.ndarray:
    """The whole plane that the camera films, uint8 [H, W, 3] BGR."""
    canvas = ground(scene)
    for item in scene.prints:
        canvas = lay(canvas, item)
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def pose(path: tuple[Pose, Pose, Pose], t: float) -> Pose:
    """The camera at time t in [0, 1] of a quadratic Bezier curve."""
    first, middle, last = (np.array(list(vars(point).values())) for point in path)
    return Pose(*((1 - t) ** 2 * first + 2 * t * (1 - t) * middle + t**2 * last))


def canvas_to_frame(camera: Pose, frame_size: tuple[int, int]) -> np.ndarray:
    """The homography of a pinhole camera above the canvas, 3x3, pixel centres at integers."""
    width, height = frame_size
    focal = FOCAL_LENGTH * width  # pixels
    pan, tilt, roll = (math.radians(angle) for angle in (camera.pan, camera.tilt, camera.roll))
    rotation = (
        cv2.Rodrigues(np.array([0, 0, roll]))[0]
        @ cv2.Rodrigues(np.array([tilt, 0, 0]))[0]
        @ cv2.Rodrigues(np.array([0, pan, 0]))[0]
    )
    to_camera = rotation @ np.array([[1, 0, -camera.x], [0, 1, -camera.y], [0, 0, 0]])
    to_camera[2, 2] += focal * camera.scale  # distance to the point looked at
    intrinsics = [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]
    return np.array(intrinsics) @ to_camera


def film(canvas: np.ndarray, to_frame: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """One frame: the canvas through the homography, averaged over each pixel's area."""
    s = SUPERSAMPLING
    finer = np.array([[s, 0, (s - 1) / 2], [0, s, (s - 1) / 2], [0, 0, 1]])
    size = (s * frame_size[0], s * frame_size[1])
    samples = cv2.warpPerspective(canvas, finer @ to_frame, size, flags=cv2.INTER_LINEAR)
    return cv2.resize(samples, frame_size, interpolation=cv2.INTER_AREA)


def homography_text(names: list[str], homographies: list[np.ndarray]) -> str:
    """The frames' homographies as `numpy.loadtxt(path).reshape(-1, 3, 3)` reads them."""
    lines = [
        "# Per frame, the 3x3 homography that maps pixels (x, y, 1) of frame 0 to this frame.",
        "# The centre of the top-left pixel is (0, 0).",
    ]
    for name, homography in zip(names, homographies, strict=True):
        lines.append(f"# {name}")
        lines += [" ".join(f"{value:.17g}" for value in row) for row in homography]
    return "\n".join(lines) + "\n"


def write_scene(scene: Scene, folder: Path) -> None:
    """Write the frames and their homographies."""
    canvas = paint(scene)
    names = [f"{index:06d}.jpg" for index in range(scene.num_frames)]
    times = np.linspace(0, 1, scene.num_frames)
    cameras = [canvas_to_frame(pose(scene.path, t), scene.frame_size) for t in times]
    for name, to_frame in zip(names, cameras, strict=True):
        with whole_file(folder / name) as partial:
            frame = film(canvas, to_frame, scene.frame_size)
            cv2.imwrite(str(partial), frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    moves = [to_frame @ np.linalg.inv(cameras[0]) for to_frame in cameras[1:]]
    homographies = [np.eye(3), *(move / move[2, 2] for move in moves)]
    write_text(folder / "homographies.txt", homography_text(names, homographies))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=PROJECT / "assets", help="parent folder")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write every scene into its folder."""
    for name, scene in SCENES.items():
        write_scene(scene, args.output / name)
        print(f"{scene.num_frames} frames and their homographies in {args.output / name}")


if __name__ == "__main__":
    cli.run(main, parser())
