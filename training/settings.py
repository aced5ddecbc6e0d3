"""Everything that a training run can be told, read from one TOML file."""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from aliked.errors import InputError

# Divided by, or of which there has to be one.
POSITIVE = {
    *("steps", "batch_pixels", "log_every", "validate_every", "height", "width"),
    *("ramp", "detected", "temperature", "pairs", "top_k"),
}
# Far more points than an image has maxima take memory with their square.
IN_SIDES, MOST_SIDES = {"detected", "random"}, 4


@dataclass(frozen=True)
class Run:
    """How long, how much at a time, and how often to report."""

    model: str
    seed: int
    steps: int
    image_sizes: list[int]  # pixels, both sides, multiples of 32; a step has one of them
    batch_pixels: int  # pairs of a step x side^2; at least one pair
    log_every: int  # steps
    validate_every: int  # steps


@dataclass(frozen=True)
class Pool:
    """How many images of which kind, and their size in pixels."""

    height: int
    width: int
    photographs: int
    blended: int
    drawn: int


@dataclass(frozen=True)
class Geometry:
    """Limits of the random homographies, reached once `ramp` of the training is over."""

    ramp: float
    start: float  # the share of the limits that training starts with
    rotation: float  # degrees
    scale: float  # octaves
    stretch: float  # octaves, of one axis against the other
    perspective: float  # change of the denominator from the centre to an edge
    translation: float  # of half the side


@dataclass(frozen=True)
class Appearance:
    """Limits of the photometric changes, of values in [0, 1]."""

    contrast: float  # octaves
    gamma: float  # octaves
    brightness: float
    colour: float  # of each channel's gain
    grey: float  # how often the colour is taken away
    shading: float
    blur: float  # pixels, standard deviation
    noise: float  # standard deviation
    jpeg: float  # how often


@dataclass(frozen=True)
class Losses:
    """Weights of the losses, and what they count with."""

    reprojection: float
    dispersity: float
    reliability: float
    descriptor: float
    detected: float  # keypoints per image, in sides of the image: with 0.5, 160 in 320x320
    random: float  # points per pair, likewise
    match_radius: float  # pixels: keypoints closer than this are one point seen twice
    exclusion_radius: float  # pixels: points closer than this are no wrong matches
    temperature: float  # of similarities, in the softmax over wrong and right matches


@dataclass(frozen=True)
class Optimiser:
    """AdamW with a linear warm-up and a cosine decay, and the average of the weights."""

    learning_rate: float
    final_learning_rate: float
    warm_up: float  # share of the training
    weight_decay: float
    max_gradient: float  # norm
    average_decay: float


@dataclass(frozen=True)
class Validation:
    """What the matching score is measured on."""

    pairs: int
    image_sizes: list[int]  # pixels, both sides; pairs take turns
    top_k: int


@dataclass(frozen=True)
class Settings:
    """One training run."""

    run: Run
    pool: Pool
    validation_pool: Pool
    geometry: Geometry
    appearance: Appearance
    losses: Losses
    optimiser: Optimiser
    validation: Validation


def load_settings(path: Path, smoke: bool = False) -> Settings:
    """The settings in a TOML file; with `smoke` those of its table `smoke` replace the others.

    Raises `InputError` where the file cannot be read, has a key too many or too few, or a value
    that cannot be trained with.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the settings {path}: {error}") from error
    small = tables.pop("smoke", {}) if smoke else {}
    tables.pop("smoke", None)
    kinds = {field.name: field.type for field in fields(Settings)}
    try:
        settings = Settings(
            **{name: kinds[name](**table | small.get(name, {})) for name, table in tables.items()}
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not fit training/settings.py: {error}") from error
    for table in fields(Settings):
        part = getattr(settings, table.name)
        for field in fields(part):
            value = getattr(part, field.name)
            if wrong := complaint(field.name, field.type, value):
                raise InputError(f"{field.name} of [{table.name}] in {path} is {value!r}; {wrong}")
    return settings


def complaint(name: str, kind: type, value: object) -> str | None:
    """What to give for a setting in place of `value`; None where it will do."""
    if name == "image_sizes":
        return None if are_image_sizes(value) else "give a list of multiples of 32"
    if kind is str:
        return None if isinstance(value, str) else "give a text"
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return "give a whole number" if kind is int else "give a number"
    if not 0 <= value < math.inf:
        return "give a number from 0"
    if value == 0 and name in POSITIVE:
        return "give more than 0"
    if name in IN_SIDES and value > MOST_SIDES:
        return f"give at most {MOST_SIDES}: it is in sides of the image"
    return None


def are_image_sizes(sizes: object) -> bool:
    """Whether `sizes` is a list of sides that training can make images of."""
    return (
        isinstance(sizes, list)
        and len(sizes) > 0
        and all(isinstance(size, int) and size > 0 and size % 32 == 0 for size in sizes)
    )
