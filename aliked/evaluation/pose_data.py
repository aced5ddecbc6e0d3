"""Pairs of images with known relative pose, whichever data set they come from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from aliked.evaluation.images import Image
from aliked.evaluation.pairs import Pair


@dataclass(frozen=True, eq=False)
class View:
    """An image with its camera."""

    image: Image
    intrinsics: np.ndarray  # [3, 3] pixels before resizing, centre of the top-left one = (0, 0)
    pose: np.ndarray  # [4, 4] world to camera

    @property
    def loaded_intrinsics(self) -> np.ndarray:
        """[3, 3] in pixels of the image as features are extracted from it."""
        return self.image.to_loaded @ self.intrinsics


@dataclass(frozen=True, eq=False)
class Motion:
    """What is known of a pair."""

    first: View
    second: View
    # From pixels [N, 2] of the first view to where they are in the second, NaN where they are
    # hidden there. Known where depth is.
    project: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def relative_pose(self) -> np.ndarray:
        """[4, 4] first camera to second camera."""
        return self.second.pose @ np.linalg.inv(self.first.pose)

    @property
    def intrinsics(self) -> tuple[np.ndarray, np.ndarray]:
        """[3, 3] of both images as features are extracted from them."""
        return self.first.loaded_intrinsics, self.second.loaded_intrinsics


@dataclass(frozen=True)
class PoseData:
    """A data set."""

    name: str
    pairs: Sequence[Pair]  # the truth of each is a `Motion`
    parameters: dict = field(default_factory=dict)  # by which the pairs were chosen

    @property
    def images(self) -> list[Image]:
        """Every image once, in the order of the pairs."""
        images = (image for pair in self.pairs for image in (pair.first, pair.second))
        return list({image.name: image for image in images}.values())


def posed_pair(name: str, group: str, motion: Motion) -> Pair:
    """A pair of views."""
    return Pair(name, group, motion.first.image, motion.second.image, motion)
