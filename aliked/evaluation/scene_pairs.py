"""The synthetic scene as a data set of posed pairs."""

from functools import partial
from pathlib import Path

import numpy as np

from aliked.evaluation.images import Image
from aliked.evaluation.pose_data import Motion, PoseData, View, posed_pair
from aliked.evaluation.scene import Scene, read_scene
from aliked.images import load_image

OVERLAPS = (0.2, 0.4, 0.6, 0.95)  # limits of the groups


def scene_data(folder: Path) -> PoseData:
    """The pairs of the scene in `folder`, in groups of similar overlap."""
    scene = read_scene(folder)
    views = [
        View(Image(name, partial(load_image, scene.folder / name)), scene.intrinsics, pose)
        for name, pose in zip(scene.names, scene.poses, strict=True)
    ]
    return PoseData(
        scene.folder.name,
        [
            posed_pair(
                f"{Path(scene.names[first]).stem}-{Path(scene.names[second]).stem}",
                group(scene, first, second),
                Motion(views[first], views[second], partial(scene.project, first, second)),
            )
            for first, second in scene.pairs
        ],
    )


def group(scene: Scene, first: int, second: int) -> str:
    """How much two views overlap, in words."""
    index = int(np.searchsorted(OVERLAPS[1:-1], scene.overlap(first, second), side="right"))
    return f"overlap {OVERLAPS[index]:.0%} to {OVERLAPS[index + 1]:.0%}".replace("%", " %")
