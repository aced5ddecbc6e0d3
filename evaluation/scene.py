"""A scene of textured rectangles, whose depth is exact at every point of every view.

`scene.json` beside the pictures has the rectangles, the camera and the views. Nothing is looked up
in a depth map: a pixel's ray is cut with the rectangles."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from aliked.errors import InputError
from aliked.files import read_file, write_text
from aliked.images import read_header

FILE = "scene.json"
CURE = "restore the folder, or render it again with `python -m tools.make_scene`"
GRID = (32, 24)  # points in x and y at which the overlap of two views is measured
ROTATION_TOLERANCE = 1e-3  # how far R R^T may be from 1: lists have four digits or so
SAME_SURFACE = 1e-6  # relative difference of depth between a point and the surface it lies on


@dataclass(frozen=True)
class Faces:
    """Rectangles in space. Lengths in metres."""

    corner: np.ndarray  # [F, 3]
    edge_a: np.ndarray  # [F, 3] from the corner along one side
    edge_b: np.ndarray  # [F, 3] along the other one, perpendicular to it

    def seen_from(self, pose: np.ndarray) -> "Faces":
        """The rectangles in the coordinates of a camera, `pose` [4, 4] world to camera."""
        rotation, translation = pose[:3, :3], pose[:3, 3]
        corner = self.corner @ rotation.T + translation
        return Faces(corner, self.edge_a @ rotation.T, self.edge_b @ rotation.T)


@dataclass(frozen=True)
class Hits:
    """The first rectangle along each ray."""

    face: np.ndarray  # [N] int64, -1 where the ray meets none
    depth: np.ndarray  # [N] metres along the optical axis, inf where it meets none
    a: np.ndarray  # [N] place on the rectangle in [0, 1], along `edge_a`
    b: np.ndarray  # [N] along `edge_b`


@dataclass(frozen=True)
class Scene:
    """Rectangles and the views of them; all views have the same pinhole camera."""

    folder: Path
    size: tuple[int, int]  # of a view: width, height, pixels
    intrinsics: np.ndarray  # [3, 3] pixels, centre of the top-left pixel = (0, 0)
    faces: Faces
    names: tuple[str, ...]  # of the views' files
    poses: np.ndarray  # [V, 4, 4] world to camera, metres
    pairs: tuple[tuple[int, int], ...]  # views to evaluate with each other

    def cast(self, view: int, points: np.ndarray) -> Hits:
        """What is seen in a view at pixels [N, 2], (x, y)."""
        return cast(self.faces.seen_from(self.poses[view]), self.intrinsics, points)

    def project(self, first: int, second: int, points: np.ndarray) -> np.ndarray:
        """Where pixels [N, 2] of view `first` are in view `second`, [N, 2].

        NaN where the point is hidden in the second view or outside it, or where there is nothing.
        """
        depth = self.cast(first, points).depth
        with np.errstate(invalid="ignore"):  # infinite depth, where the ray meets nothing
            space = rays(self.intrinsics, points) * depth[:, None]
            move = self.poses[second] @ np.linalg.inv(self.poses[first])
            space = space @ move[:3, :3].T + move[:3, 3]
            found = space @ self.intrinsics.T
            found = found[:, :2] / np.where(found[:, 2:] > 0, found[:, 2:], np.nan)
            visible = self._inside(found)
            seen = self.cast(second, found[visible]).depth
            visible[visible] = np.abs(seen / space[visible, 2] - 1) < SAME_SURFACE
        return np.where(visible[:, None], found, np.nan)

    def centre(self, view: int) -> np.ndarray:
        """Where a view's camera stands, [3] metres."""
        return -self.poses[view, :3, :3].T @ self.poses[view, :3, 3]

    def overlap(self, first: int, second: int) -> float:
        """The part of a view that the other one sees as well, of both the smaller, in [0, 1]."""
        points = self.grid()
        seen = [
            np.isfinite(self.project(*views, points)[:, 0]).mean()
            for views in ((first, second), (second, first))
        ]
        return float(min(seen))

    def grid(self) -> np.ndarray:
        """Pixels spread evenly over a view, [N, 2]."""
        x, y = (
            (np.arange(n) + 0.5) * side / n - 0.5 for n, side in zip(GRID, self.size, strict=True)
        )
        return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)

    def _inside(self, points: np.ndarray) -> np.ndarray:
        """Which pixels [N, 2] a view has; [N] bool."""
        return ((points >= -0.5) & (points <= np.array(self.size) - 0.5)).all(axis=1)


def rays(intrinsics: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Viewing rays of pixels [N, 2] in camera coordinates, [N, 3], of length 1 along z."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    return homogeneous @ np.linalg.inv(intrinsics).T


def cast(faces: Faces, intrinsics: np.ndarray, points: np.ndarray) -> Hits:
    """Cut the rays of pixels [N, 2] with rectangles in camera coordinates."""
    directions = rays(intrinsics, np.asarray(points, np.float64))
    count = len(directions)
    hits = Hits(np.full(count, -1), np.full(count, np.inf), np.zeros(count), np.zeros(count))
    for index, (corner, edge_a, edge_b) in enumerate(
        zip(faces.corner, faces.edge_a, faces.edge_b, strict=True)
    ):
        normal = np.cross(edge_a, edge_b)
        # In a plane the reciprocal of the depth is a linear function of the pixel; 0 at infinity.
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = normal @ corner / (directions @ normal)
            a = (depth * (directions @ edge_a) - corner @ edge_a) / (edge_a @ edge_a)
            b = (depth * (directions @ edge_b) - corner @ edge_b) / (edge_b @ edge_b)
            nearer = (depth > 0) & (depth < hits.depth)
            nearer &= (a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)
        for place, value in ((hits.depth, depth), (hits.a, a), (hits.b, b)):
            place[nearer] = value[nearer]
        hits.face[nearer] = index
    return hits


Row3 = tuple[float, float, float]
Row4 = tuple[float, float, float, float]
Length = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Index = Annotated[int, msgspec.Meta(ge=0)]


class FaceFile(msgspec.Struct, forbid_unknown_fields=True):
    """A rectangle as `scene.json` has it."""

    corner: Row3
    edges: tuple[Row3, Row3]


class ViewFile(msgspec.Struct, forbid_unknown_fields=True):
    """A view as `scene.json` has it."""

    file: str
    pose: tuple[Row4, Row4, Row4, Row4]


class SceneFile(msgspec.Struct, forbid_unknown_fields=True):
    """What `scene.json` holds."""

    size: tuple[Length, Length]
    intrinsics: tuple[Row3, Row3, Row3]
    faces: Annotated[list[FaceFile], msgspec.Meta(min_length=1)]
    views: Annotated[list[ViewFile], msgspec.Meta(min_length=2)]
    pairs: list[tuple[Index, Index]]
    units: str = ""


def read_scene(folder: Path) -> Scene:
    """The scene of a folder; `InputError` where `scene.json` or a picture is missing or damaged."""
    path = Path(folder) / FILE
    try:
        data = msgspec.json.decode(read_file(path), type=SceneFile)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the scene in {path} ({error}); {CURE}") from error
    faces = np.array([[face.corner, *face.edges] for face in data.faces], np.float64)
    scene = Scene(
        folder=path.parent,
        size=data.size,
        intrinsics=checked_intrinsics(str(path), np.array(data.intrinsics, np.float64)),
        faces=Faces(*faces.swapaxes(0, 1)),
        names=tuple(view.file for view in data.views),
        poses=np.array(
            [checked_pose(f"{view.file} in {path}", np.array(view.pose)) for view in data.views]
        ),
        pairs=tuple(data.pairs),
    )
    _check_faces(path, scene.faces)
    _check_pairs(path, scene)
    _check_pictures(path, scene)
    return scene


def check_relative(where: str, name: str) -> None:
    """Raise `InputError` where the name of an image leads out of the data set's folder."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where} has {name[:80]!r} where an image of its own folder should be")


def checked_intrinsics(where: str, intrinsics: np.ndarray) -> np.ndarray:
    """Return intrinsics [3, 3]; `InputError` where they are not those of a pinhole camera."""
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    if not np.isfinite(intrinsics).all() or min(fx, fy) <= 0:
        raise InputError(
            f"{where} has a focal length of {min(fx, fy):g}; give pixels above 0, as in "
            "`fx fy cx cy`"
        )
    if not np.array_equal(intrinsics[2], [0, 0, 1]) or intrinsics[1, 0] != 0:
        raise InputError(
            f"{where} has intrinsics that are not [[fx, s, cx], [0, fy, cy], [0, 0, 1]]"
        )
    return intrinsics


def checked_pose(where: str, pose: np.ndarray) -> np.ndarray:
    """Return a pose [4, 4]; `InputError` where it is not a rotation and a translation."""
    rotation = pose[:3, :3]
    off = np.abs(rotation @ rotation.T - np.eye(3)).max()
    rigid = off < ROTATION_TOLERANCE and np.linalg.det(rotation) > 0
    if not rigid or not np.isfinite(pose).all() or not np.array_equal(pose[3], [0, 0, 0, 1]):
        raise InputError(
            f"the pose of {where} is no rotation and translation: it is scaled, mirrored, or not a "
            "number; replace it"
        )
    return pose


def _check_faces(path: Path, faces: Faces) -> None:
    areas = np.linalg.norm(np.cross(faces.edge_a, faces.edge_b), axis=1)
    sides = np.linalg.norm(faces.edge_a, axis=1) * np.linalg.norm(faces.edge_b, axis=1)
    with np.errstate(invalid="ignore"):
        right = (areas > 0) & (areas >= (1 - ROTATION_TOLERANCE) * sides)
    if not right.all() or not all(np.isfinite(array).all() for array in vars(faces).values()):
        raise InputError(f"a face in {path} is no rectangle; {CURE}")


def _check_pairs(path: Path, scene: Scene) -> None:
    if np.max(scene.pairs, initial=-1) >= len(scene.names):
        raise InputError(f"{path} pairs views that it does not have; {CURE}")
    for first, second in scene.pairs:
        if first == second:
            raise InputError(f"{path} pairs view {first} with itself; {CURE}")
        if np.allclose(*(scene.centre(view) for view in (first, second)), rtol=0, atol=1e-9):
            raise InputError(
                f"{path} pairs views {first} and {second}, which have one place, so that their "
                f"motion has no direction; {CURE}"
            )
    for what, entries in (("pair", scene.pairs), ("view", scene.names)):
        if len(set(entries)) < len(entries):
            raise InputError(f"{path} has a {what} twice; {CURE}")


def _check_pictures(path: Path, scene: Scene) -> None:
    for name in scene.names:
        check_relative(str(path), name)
    missing = [name for name in scene.names if not (path.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{path.parent} lacks {len(missing)} of its {len(scene.names)} views, such as "
            f"{missing[0]}; {CURE}"
        )
    for name in scene.names:
        header = read_header(path.parent / name)
        if (header.width, header.height, header.orientation) != (*scene.size, 1):
            turned = "" if header.orientation == 1 else ", turned by EXIF,"
            raise InputError(
                f"{path.parent / name} has {header.width}x{header.height} pixels{turned} and "
                f"{path} says {scene.size[0]}x{scene.size[1]}; {CURE}"
            )


def write_scene(scene: Scene, path: Path) -> None:
    """Write `scene.json`, whole or not at all."""
    corners, edges_a, edges_b = (
        array.tolist() for array in (scene.faces.corner, scene.faces.edge_a, scene.faces.edge_b)
    )
    data = {
        "units": "metres; pixels with the centre of the top-left one at (0, 0)",
        "size": list(scene.size),
        "intrinsics": scene.intrinsics.tolist(),
        "faces": [
            {"corner": corner, "edges": [a, b]}
            for corner, a, b in zip(corners, edges_a, edges_b, strict=True)
        ],
        "views": [
            {"file": name, "pose": pose.tolist()}
            for name, pose in zip(scene.names, scene.poses, strict=True)
        ],
        "pairs": [list(pair) for pair in scene.pairs],
    }
    write_text(path, json.dumps(data, indent=1) + "\n")
