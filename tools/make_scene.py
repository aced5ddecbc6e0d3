"""Make a scene for the evaluation of relative poses: photographs in a yard, seen from all over it.

Floor, walls, boards and boxes are rectangles with photographs on them, so that every view's depth
and pose are exact by construction.

usage: python -m tools.make_scene
"""

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from aliked import cli
from aliked.files import whole_file
from evaluation.scene import FILE, Faces, Scene, cast, write_scene
from tools.make_assets import PROJECT
from tools.scene_contents import contents, faces_of
from tools.scene_rendering import expose, pyramid, render

FOCAL_LENGTH = 1.2  # in widths of a view: about 45 degrees across
EYE = ([-3.0, -2.6, 0.2], [3.0, -0.8, 2.4])  # metres: where cameras are, from and to
TARGET = ([-1.4, -1.5, 4.5], [1.4, -0.4, 6.5])  # metres: what they look at, from and to
ROLL = 12  # degrees about the viewing direction, standard deviation
NEAREST = 1.2  # metres: nothing is closer to a camera
MOST_SKY = 0.03  # of a view, where there is nothing
# Points all over a view, at distance 1.
FIELD_OF_VIEW = np.stack(np.mgrid[-0.42:0.42:15j, -0.31:0.31:11j], axis=-1).reshape(-1, 2)
OVERLAP = (0.2, 0.95)  # of the pairs to evaluate
WEBP_QUALITY = 80


def look(eye: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """World to camera [4, 4] of a camera at `eye` that sees `target` in its middle.

    `roll` in degrees, about the viewing direction.
    """
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross([0, 1, 0], forward)
    right /= np.linalg.norm(right)
    upright = np.stack([right, np.cross(forward, right), forward])
    rotation = cv2.Rodrigues(np.array([0, 0, np.radians(roll)]))[0] @ upright
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ eye
    return pose


def random_poses(count: int, generator: np.random.Generator, faces: Faces) -> np.ndarray:
    """Cameras in front of the scene, none of them close to anything, [count, 4, 4]."""
    poses = []
    while len(poses) < count:
        eye, target = generator.uniform(*EYE), generator.uniform(*TARGET)
        pose = look(eye, target, generator.normal(0, ROLL))
        depth = cast(faces.seen_from(pose), np.eye(3), FIELD_OF_VIEW).depth
        if depth.min() > NEAREST and np.isinf(depth).mean() < MOST_SKY:
            poses.append(pose)
    return np.array(poses)


def plan(folder: Path, size: tuple[int, int], views: int, seed: int, faces: Faces) -> Scene:
    """The scene with its views and the pairs that overlap."""
    width, height = size
    focal = FOCAL_LENGTH * width
    scene = Scene(
        folder=folder,
        size=size,
        intrinsics=np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]),
        faces=faces,
        names=tuple(f"{index:06d}.webp" for index in range(views)),
        poses=random_poses(views, np.random.default_rng(seed), faces),
        pairs=(),
    )
    low, high = OVERLAP
    pairs = combinations(range(views), 2)
    chosen = tuple(pair for pair in pairs if low <= scene.overlap(*pair) <= high)
    return replace(scene, pairs=chosen)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(
        prog="python -m tools.make_scene",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--output", type=Path, default=PROJECT / "assets/scene_640x480", help="folder")
    p.add_argument("--views", type=cli.whole(2), default=24, metavar="N", help="number of views")
    p.add_argument("--seed", type=cli.seed, default=0, help="of the poses, the light and the noise")
    p.add_argument(
        "--size", type=cli.whole(5), nargs=2, default=(640, 480), metavar=("W", "H"), help="pixels"
    )
    return p


def main(args: argparse.Namespace) -> None:
    """Render every view, then write what is known about them."""
    rectangles = contents()
    scene = plan(args.output, tuple(args.size), args.views, args.seed, faces_of(rectangles))
    pyramids = [pyramid(item.texture) for item in rectangles]
    for view, name in enumerate(tqdm(scene.names, unit="view", disable=None)):
        image = expose(render(scene, view, pyramids), np.random.default_rng([args.seed, view]))
        with whole_file(args.output / name) as partial:
            cv2.imwrite(str(partial), image, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])
    write_scene(scene, args.output / FILE)
    print(f"{args.views} views and {len(scene.pairs)} pairs in {args.output}")


if __name__ == "__main__":
    cli.run(main, parser())
