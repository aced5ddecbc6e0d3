"""What stands in the synthetic scene: rectangles with photographs on them.

Lengths are in metres; x points right, y down and z away from the viewer, the floor is at y = 0. The
photographs come with scikit-image (`assets/README.md`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from evaluation.scene import Faces
from tools.make_assets import Print, ground, lay, photograph

TEXELS = 400  # per metre on floor and walls: one per pixel at 1.9 m


@dataclass(frozen=True)
class Surface:
    """A floor or a wall with prints on it, as `make_assets` paints them."""

    canvas_size: tuple[int, int]  # width, height, texels
    ground: str  # a grey 512x512 texture in scikit-image's data folder
    tint: tuple[float, float, float]  # of the ground: blue, green, red
    prints: tuple[Print, ...]


@dataclass(frozen=True)
class Board:
    """A photograph standing on the floor."""

    file: str
    x: float  # of the foot's middle
    z: float
    width: float
    turn: float  # degrees about the vertical: 0 faces the viewer
    lift: float  # of its lower edge above the floor


@dataclass(frozen=True)
class Box:
    """A box on the floor with a photograph on each side that can be seen."""

    files: tuple[str, str, str, str, str]  # top and four sides
    x: float
    z: float
    size: tuple[float, float, float]  # width, height, depth
    turn: float


WIDTH, DEPTH, HEIGHT = 9.0, 8.0, 4.5  # of the yard

FLOOR = Surface(
    (int(WIDTH * TEXELS), int(DEPTH * TEXELS)),
    "gravel.png",
    (0.92, 1.00, 1.08),
    (
        Print("retina.jpg", 1500, 1900, 520, 24),
        Print("chelsea.png", 2250, 1500, 440, -15),
    ),
)
BACK = Surface(
    (int(WIDTH * TEXELS), int(HEIGHT * TEXELS)),
    "brick.png",
    (0.80, 0.92, 1.25),
    (
        Print("hubble_deep_field.jpg", 700, 1050, 700, 3),
        Print("astronaut.png", 1420, 1180, 480, -2),
        Print("rocket.jpg", 2180, 980, 560, 0),
        Print("coffee.png", 2880, 1240, 540, 4),
    ),
)
SIDE = Surface(
    (int(DEPTH * TEXELS), int(HEIGHT * TEXELS)),
    "grass.png",
    (1.05, 1.02, 0.95),
    (
        Print("camera.png", 900, 1150, 480, 2),
        Print("chelsea.png", 1650, 1250, 440, -3),
        Print("retina.jpg", 2450, 1050, 520, 0),
    ),
)
BOARDS = (
    Board("chelsea.png", -1.7, 4.6, 1.1, 28, 0.25),
    Board("rocket.jpg", 1.9, 5.2, 1.5, -35, 0.3),
    Board("camera.png", 0.2, 6.4, 1.2, 8, 0.9),
    Board("astronaut.png", 3.3, 3.6, 1.0, -62, 0.2),
    Board("coffee.png", -3.3, 3.2, 1.2, 58, 0.2),
)
BOXES = (
    Box(
        ("coffee.png", "astronaut.png", "brick.png", "chelsea.png", "camera.png"),
        -0.5, 3.9, (0.9, 0.8, 0.9), 32,
    ),
    Box(
        ("camera.png", "hubble_deep_field.jpg", "gravel.png", "coffee.png", "grass.png"),
        1.0, 3.2, (0.6, 0.5, 0.7), -20,
    ),
    Box(
        ("chelsea.png", "rocket.jpg", "brick.png", "retina.jpg", "astronaut.png"),
        -2.2, 6.0, (0.8, 1.5, 0.8), 15,
    ),
    Box(
        ("grass.png", "camera.png", "coffee.png", "brick.png", "hubble_deep_field.jpg"),
        2.6, 6.5, (1.1, 1.1, 0.8), -12,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Textured:
    """A rectangle and what is on it."""

    corner: np.ndarray  # [3] of the texture's top left
    edge_a: np.ndarray  # [3] along its rows
    edge_b: np.ndarray  # [3] along its columns
    texture: np.ndarray  # float32 [H, W, 3] BGR in [0, 1]


def about_vertical(degrees: float) -> np.ndarray:
    """Rotation matrix of a turn."""
    return cv2.Rodrigues(np.array([0, np.radians(degrees), 0]))[0]


def painted(surface: Surface) -> np.ndarray:
    """The texture of a floor or a wall."""
    canvas = ground(surface)
    for item in surface.prints:
        canvas = lay(canvas, item)
    return canvas


def yard() -> Iterator[Textured]:
    """Floor, back wall and the two side walls. The floor is at y = 0."""
    left, right = -WIDTH / 2, WIDTH / 2
    across, down, away = np.diag([WIDTH, HEIGHT, DEPTH])
    yield Textured(np.array([left, 0, DEPTH]), across, -away, painted(FLOOR))
    yield Textured(np.array([left, -HEIGHT, DEPTH]), across, down, painted(BACK))
    wall = painted(SIDE)
    yield Textured(np.array([left, -HEIGHT, 0]), away, down, wall)
    yield Textured(np.array([right, -HEIGHT, DEPTH]), -away, down, wall[:, ::-1] * [1.0, 0.9, 0.8])


def standing(board: Board) -> Textured:
    """A board at its place."""
    texture = photograph(board.file)[:, ::-1]  # mirrored, unlike the same one on a wall
    height = board.width * texture.shape[0] / texture.shape[1]
    across = about_vertical(board.turn) @ [board.width, 0, 0]
    corner = np.array([board.x, -board.lift - height, board.z]) - across / 2
    return Textured(corner, across, np.array([0, height, 0]), texture)


def sides(box: Box) -> Iterator[Textured]:
    """Top and sides of a box at its place."""
    width, height, depth = box.size
    turn = about_vertical(box.turn)
    middle = np.array([box.x, 0, box.z])
    x, y, z = turn @ [width, 0, 0], np.array([0, height, 0]), turn @ [0, 0, depth]
    edges = ((x, -z, -y + z / 2 - x / 2), (x, y, -y - x / 2 - z / 2), (z, y, -y + x / 2 - z / 2))
    edges += ((-x, y, -y + x / 2 + z / 2), (-z, y, -y - x / 2 + z / 2))
    for file, (edge_a, edge_b, corner) in zip(box.files, edges, strict=True):
        yield Textured(middle + corner, edge_a, edge_b, photograph(file))


def contents() -> list[Textured]:
    """All rectangles of the scene."""
    rectangles = [*yard(), *map(standing, BOARDS)]
    for box in BOXES:
        rectangles += sides(box)
    return rectangles


def faces_of(rectangles: list[Textured]) -> Faces:
    """Their geometry."""
    columns = zip(*((item.corner, item.edge_a, item.edge_b) for item in rectangles), strict=True)
    return Faces(*map(np.array, columns))
