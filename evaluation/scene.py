"""A scene of textured rectangles, whose depth is exact at every point of every view.

`scene.json` beside the pictures has the rectangles, the camera and the views. Nothing is looked up
in a depth map: a pixel's ray is cut with the rectangles."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aliked.errors import InputError

FILE = "scene.json"
CURE = "restore the folder, or render it again with `python -m tools.make_scene`"
GRID = (32, 24)  # points in x and y at which the overlap of two views is measured
SAME_SURFACE = 1e-6  # relative difference of depth between a point and the surface it lies on


@dataclass(frozen=True)
class Faces:
    """Rectangles in space. Lengths in metres."""

    corner: np.ndarray  # [F, 3]
    edge_a: np.ndarray  # [F, 3] from the corner along one side
    edge_b: np.ndarray  # [F, 3] along the other one, perpendicular to it

    def seen_from(self, pose: np.ndarray) -> "Faces":
        """The same rectangles in the coordinates of a camera, `pose` [4, 4] world to camera."""
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


def read_scene(folder: Path) -> Scene:
    """The scene of a folder; `InputError` where `scene.json` or a picture is missing or damaged."""
    path = Path(folder) / FILE
    try:
        data = json.loads(path.read_text())
        faces = np.array([[face["corner"], *face["edges"]] for face in data["faces"]], np.float64)
        scene = Scene(
            folder=path.parent,
            size=tuple(data["size"]),
            intrinsics=np.array(data["intrinsics"], np.float64).reshape(3, 3),
            faces=Faces(*faces.reshape(-1, 3, 3).swapaxes(0, 1)),
            names=tuple(view["file"] for view in data["views"]),
            poses=np.array([view["pose"] for view in data["views"]], np.float64).reshape(-1, 4, 4),
            pairs=tuple((first, second) for first, second in data["pairs"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read the scene in {path} ({error!r}); {CURE}") from error
    if np.max(scene.pairs, initial=-1) >= len(scene.names):
        raise InputError(f"{path} pairs views that it does not have; {CURE}")
    missing = [name for name in scene.names if not (path.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{path.parent} lacks {len(missing)} of its {len(scene.names)} views, such as "
            f"{missing[0]}; {CURE}"
        )
    return scene


def write_scene(scene: Scene, path: Path) -> None:
    """Write `scene.json`."""
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
    Path(path).write_text(json.dumps(data, indent=1) + "\n")
