"""Pictures of textured rectangles, with every pixel averaged over its area."""

import cv2
import numpy as np

from evaluation.scene import Scene

SUPERSAMPLING = 4  # samples per pixel and direction
BAND = 32  # rows of pixels rendered at a time
LEVELS = 4  # of a texture, each half as fine as the one before
SKY = (0.93, 0.88, 0.82)  # blue, green, red
NOISE = 1.5  # standard deviation of a pixel, of 255
EXPOSURE = (0.75, 1.2)  # range of the views' brightness


def pyramid(texture: np.ndarray) -> list[np.ndarray]:
    """The texture at several resolutions, each averaged from the one before."""
    levels = [texture.astype(np.float32)]
    for _ in range(LEVELS - 1):
        height, width = levels[-1].shape[:2]
        size = (max(width // 2, 1), max(height // 2, 1))
        levels.append(cv2.resize(levels[-1], size, interpolation=cv2.INTER_AREA))
    return levels


def texture_steps(to_texture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Texels from one pixel [N, 2] to the next under a homography [3, 3], of x and y the more."""
    place = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ to_texture.T
    scale = place[:, 2:]
    texel = place[:, :2] / scale
    steps = [(to_texture[:2, axis] - texel * to_texture[2, axis]) / scale for axis in (0, 1)]
    return np.linalg.norm(steps, axis=-1).max(axis=0)


def homographies(scene: Scene, view: int, pyramids: list[list[np.ndarray]]) -> np.ndarray:
    """From pixels of a view to texels of each rectangle, [F, 3, 3]."""
    seen = scene.faces.seen_from(scene.poses[view])
    from_face = scene.intrinsics @ np.stack([seen.edge_a, seen.edge_b, seen.corner], axis=-1)
    sizes = [np.diag([*levels[0].shape[1::-1], 1.0]) for levels in pyramids]
    return np.array(sizes) @ np.linalg.inv(from_face)


def shade(
    scene: Scene, view: int, points: np.ndarray, pyramids: list[list[np.ndarray]]
) -> np.ndarray:
    """Colours at pixels [N, 2] of a view, for samples `SUPERSAMPLING` times as dense, [N, 3]."""
    hits = scene.cast(view, points)
    to_texture = homographies(scene, view, pyramids)
    colours = np.full((len(points), 3), SKY, np.float32)
    for face in np.unique(hits.face[hits.face >= 0]):
        on_face = np.flatnonzero(hits.face == face)
        steps = texture_steps(to_texture[face], points[on_face]) / SUPERSAMPLING
        wanted = np.clip(np.round(np.log2(steps)), 0, LEVELS - 1)
        for level in np.unique(wanted).astype(int):
            texture, chosen = pyramids[face][level], on_face[wanted == level]
            height, width = texture.shape[:2]
            x, y = hits.a[chosen] * width - 0.5, hits.b[chosen] * height - 0.5
            colours[chosen] = sample(texture, x, y)
    return colours


def sample(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values [N, 3] at texels (x, y) [N]; the border is repeated."""
    height, width = texture.shape[:2]
    left = np.clip(np.floor(x).astype(int), 0, width - 2)
    top = np.clip(np.floor(y).astype(int), 0, height - 2)
    fx, fy = np.clip(x - left, 0, 1)[:, None], np.clip(y - top, 0, 1)[:, None]
    upper = texture[top, left] * (1 - fx) + texture[top, left + 1] * fx
    lower = texture[top + 1, left] * (1 - fx) + texture[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def render(scene: Scene, view: int, pyramids: list[list[np.ndarray]]) -> np.ndarray:
    """A view, averaged over each pixel's area, float32 [H, W, 3] BGR in [0, 1]."""
    width, height = scene.size
    s = SUPERSAMPLING
    columns = (np.arange(width * s) + 0.5) / s - 0.5
    bands = []
    for top in range(0, height, BAND):
        rows = (np.arange(min(BAND, height - top) * s) + 0.5) / s - 0.5 + top
        points = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2)
        colours = shade(scene, view, points, pyramids)
        bands.append(colours.reshape(len(rows) // s, s, width, s, 3).mean(axis=(1, 3)))
    return np.concatenate(bands)


def expose(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """What a camera makes of it, with its own brightness and noise, uint8 [H, W, 3]."""
    bright = image * generator.uniform(*EXPOSURE) * 255
    return np.clip(np.round(bright + generator.normal(0, NOISE, image.shape)), 0, 255).astype("u1")
