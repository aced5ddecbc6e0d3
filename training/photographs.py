"""The photographs that come inside the packages scikit-image and scikit-learn."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from aliked.errors import InputError, how_to_install

SKIMAGE, SKLEARN = "skimage/data", "sklearn/datasets/images"

TRAINING = (
    *(
        f"{SKIMAGE}/{name}"
        for name in (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "cell.png",
            "chelsea.png",
            "clock_motion.png",
            "coins.png",
            "color.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "page.png",
            "retina.jpg",
            "rocket.jpg",
            "text.png",
        )
    ),
    f"{SKLEARN}/china.jpg",
    f"{SKLEARN}/flower.jpg",
)
# Only validation sees these: two views of one room, and a still life.
HELD_OUT = (
    f"{SKIMAGE}/motorcycle_left.png",
    f"{SKIMAGE}/motorcycle_right.png",
    f"{SKIMAGE}/coffee.png",
)
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def load_photograph(name: str) -> np.ndarray:
    """One of the names above as uint8 [H, W, 3] RGB; `InputError` where its package is missing."""
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)  # finds the folder without importing the package
    folders = list(spec.submodule_search_locations) if spec else []
    for folder in folders:
        path = Path(folder) / inside
        if path.is_file():
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
    raise InputError(
        f"the photograph {name} is not here; {how_to_install(package)} "
        f"({PACKAGES[package]} carries it)"
    )
