"""A COLMAP database of extracted features: cameras, keypoints, descriptors and matches.

Written as COLMAP's own ALIKED extractor and matcher write it, image by image and pair by pair, each
of them whole or not at all. A run that was killed goes on where it was.
"""

import contextlib
import itertools
import math
import shutil
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from aliked.cli import keep_sigterm
from aliked.errors import InputError, first_line, missing_package
from aliked.extraction import TURNS, Job
from aliked.features import Features
from aliked.files import SANE_BYTES, as_path, open_regular, read_text, writable_folder
from aliked.images import natural, open_header
from aliked.matching import Matcher
from aliked.store import FeatureStore, Size

TYPES = {"aliked-n16rot": "ALIKED_N16ROT", "aliked-n32": "ALIKED_N32"}  # of COLMAP's own models
CAMERA_MODES = ("auto", "single", "folder", "image")
FOCAL_FACTOR = 1.2  # times the longer side: COLMAP's guess where EXIF says nothing
BLOCK = 50  # images a side of a block of pairs, whose descriptors stay in memory
CACHE_BYTES = 2**30  # of descriptors that are kept for the next pairs
ROOM_FACTOR, ROOM_BYTES = 3, 2**20  # of the disk for a transaction: rows, journal, indices
TRANSACTION = 500  # pairs that are written at once: what a kill can lose

MAKE, MODEL, EXIF, GPS = 0x10F, 0x110, 0x8769, 0x8825
FOCAL, FOCAL_35MM, ORIENTATION = 0x920A, 0xA405, 0x112
GRAVITY = {0: (0.0, 1.0, 0.0), 1: (-1.0, 0.0, 0.0), 2: (0.0, -1.0, 0.0), 3: (1.0, 0.0, 0.0)}


def _pycolmap() -> Any:
    """The module; `InputError` where it is missing."""
    try:
        with keep_sigterm():
            import pycolmap
    except ModuleNotFoundError as error:
        raise InputError(f"for a COLMAP database {missing_package(error)}") from error
    return pycolmap


@dataclass(frozen=True)
class Cameras:
    """How images share cameras, and of which of COLMAP's camera models these are."""

    mode: str = "auto"  # one for each model in EXIF, or "single", "folder", "image"
    model: str = "SIMPLE_RADIAL"

    def __post_init__(self) -> None:
        """Raise `InputError` for a mode or a camera model that does not exist."""
        if self.mode not in CAMERA_MODES:
            raise InputError(
                f"unknown camera mode {self.mode!r}; choose one of {', '.join(CAMERA_MODES)}"
            )
        models = _pycolmap().CameraModelId.__members__
        if self.model not in models or self.model == "INVALID":
            names = ", ".join(name for name in models if name != "INVALID")
            raise InputError(f"COLMAP has no camera model {self.model!r}; choose one of {names}")

    def by_name(self, name: str) -> str | None:
        """What images of one camera share in their names, or None where names do not decide."""
        if self.mode == "folder":
            return name.rpartition("/")[0]
        return "" if self.mode == "single" else None

    def check_sizes(self, job: Job) -> None:
        """Raise `InputError` where images of a job that are to share a camera have other sizes.

        Only their headers are read: the extraction, which may take hours, comes after that.
        """
        if self.by_name("") is None:
            return
        sizes: dict[str | None, Size] = {}
        for batch in job.batches(lambda bad: None):  # which the extraction names
            for photo in batch:
                first = sizes.setdefault(self.by_name(photo.name), photo.size)
                _check_size(photo.name, photo.size, first)


def _check_size(name: str, size: Size, of_camera: Size) -> None:
    if size != of_camera:
        raise InputError(
            f"{name} has {size[0]}x{size[1]} pixels, but its camera {of_camera[0]}x{of_camera[1]}; "
            "pass --camera_mode auto or image"
        )


@contextlib.contextmanager
def open_database(path: Path) -> Iterator[Any]:
    """A COLMAP database, made if it is missing; `InputError` where it is no such file."""
    colmap, path = _pycolmap(), as_path(path)
    _check_sane(path)
    writable_folder(path.parent)
    _check_room(path, ROOM_BYTES)
    level, colmap.logging.minloglevel = colmap.logging.minloglevel, 4  # it is said below
    try:
        database = colmap.Database.open(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(path, first_line(error)) from error
    finally:
        colmap.logging.minloglevel = level
    with database:
        try:
            yield database
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError) or "sqlite" not in str(error).lower():
                raise
            raise _unusable(path, first_line(error)) from error


CURES = {
    "locked": "close what has it open, and pass --resume",
    "full": "make room, and pass --resume",
}


def _unusable(path: Path, reason: str) -> InputError:
    """What is said of a database that SQLite or COLMAP refuses for that reason."""
    cure = next((cure for word, cure in CURES.items() if word in reason), "name another file")
    return InputError(f"{path} cannot be used as a COLMAP database ({reason}); {cure}")


def _check_sane(path: Path) -> None:
    """Raise `InputError` for a file that SQLite finds damaged or locked: COLMAP would abort.

    Also for another program's database, which COLMAP would put its own tables into. One that is
    not there is made.
    """
    if not path.exists():
        return
    with open_regular(path, most_bytes=None):
        pass
    address = f"{path.absolute().as_uri()}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            database.execute("BEGIN IMMEDIATE")  # an error where somebody else is writing
            database.execute("ROLLBACK")
            (page,) = database.execute("PRAGMA page_size").fetchone()
            size, verdict = path.stat().st_size, "ok"
            if size % page:
                verdict = "its end is missing"
            elif size <= SANE_BYTES:  # to read more would take minutes
                (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            names = [name for (name,) in tables]
    except (sqlite3.Error, ValueError) as error:
        raise _unusable(path, str(error)[:100]) from error
    if verdict != "ok":
        raise _unusable(path, verdict[:100])
    if names and "images" not in names:
        raise _unusable(path, "its tables are another program's")


def _check_room(path: Path, needed: int) -> None:
    """Raise `InputError` where the disk of a database has no room for so many bytes."""
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed:
        raise InputError(
            f"the disk of {path} has {free >> 20} MiB left, and the next rows need "
            f"{needed >> 20}; make room, and pass --resume"
        )


@contextlib.contextmanager
def _transaction(path: Path, database: Any, size: int) -> Iterator[None]:
    """Write about `size` bytes at once, or nothing; `InputError` where the disk has no room.

    COLMAP aborts the process where the disk fills up inside of its transaction.
    """
    _check_room(path, ROOM_FACTOR * size + ROOM_BYTES)
    with _pycolmap().DatabaseTransaction(database):
        yield


def write_features(
    path: Path,
    store: FeatureStore,
    folder: Path,
    model: str,
    cameras: Cameras,
    report: Callable[[], None] = lambda: None,
) -> None:
    """Put all images of `store`, which are below `folder`, and their features into the database.

    Images that are in the database already are compared. `InputError` where it has other images or
    other features than `store`, or images that should share a camera have other sizes.
    """
    type_name = TYPES.get(model, "UNDEFINED")
    with open_database(path) as database:
        writer = ImageWriter(database, store, folder, type_name, cameras)
        _refuse_others(path, database, store)
        for name in store.names():
            writer.write(path, name)
            report()


def _refuse_others(path: Path, database: Any, store: FeatureStore) -> None:
    for image in database.read_all_images():
        if image.name not in store:
            raise InputError(
                f"{path} has an image {image.name} that is not among those extracted; name another "
                "database"
            )


class ImageWriter:
    """Puts images with their cameras and features into one database, in COLMAP's form."""

    def __init__(
        self, database: Any, store: FeatureStore, folder: Path, type_name: str, cameras: Cameras
    ):
        self.database, self.store, self.folder, self.cameras = database, store, folder, cameras
        self.colmap = _pycolmap()
        self.type = self.colmap.FeatureExtractorType.__members__[type_name]
        self.shared: dict[Any, tuple[Any, int]] = {}  # camera and rig, by what images share
        self.owners: dict[int, Any] = {}  # the same the other way, of cameras that were there

    def write(self, path: Path, name: str) -> None:
        """Add an image, or compare it where it is there."""
        features, size = self.store.read(name), self.store.size(name)
        exif = read_exif(self.folder / name)
        shared = self._shares(name, exif, size)
        found = self.database.read_image_with_name(name)
        bytes_ = features.descriptors.nbytes + in_colmap(features).nbytes
        with _transaction(path, self.database, bytes_):
            if found is not None:
                self._compare(path, found, features)
                self._compare_camera(path, found, shared)
                return
            camera, rig_id = self._camera(name, shared, exif, size)
            image = self.colmap.Image(name=name, camera_id=camera.camera_id)
            image.image_id = self.database.write_image(image)
            frame = self.colmap.Frame()
            frame.rig_id = rig_id
            frame.add_data_id(image.data_id)
            self.database.write_frame(frame)
            prior = self._prior(exif)
            if prior is not None:
                prior.corr_data_id = image.data_id
                self.database.write_pose_prior(prior)
            self.database.write_keypoints(image.image_id, in_colmap(features))
            self.database.write_descriptors(image.image_id, self._descriptors(features))

    def _compare(self, path: Path, image: Any, features: Features) -> None:
        keypoints = self.database.read_keypoints(image.image_id)
        descriptors = self.database.read_descriptors(image.image_id)
        expected = self._descriptors(features).data.ravel()  # without rows it has no columns there
        same = (
            np.array_equal(keypoints, in_colmap(features))
            and descriptors.type == self.type
            and np.array_equal(descriptors.data.ravel(), expected)
        )
        if not same:
            raise InputError(f"{path} has other features of {image.name}; name another database")

    def _compare_camera(self, path: Path, image: Any, shared: Any) -> None:
        """Keep the camera of an image that is there for those that share it."""
        camera = self.database.read_camera(image.camera_id)
        owner = image.name if shared is None else shared
        same = camera.model_name == self.cameras.model
        # Without the file nobody knows what its EXIF said.
        if self.cameras.mode != "auto" or (self.folder / image.name).exists():
            same &= self.owners.setdefault(camera.camera_id, owner) == owner
        if same and shared is not None:
            rig = self.database.read_rig_with_sensor(camera.sensor_id)
            known, _ = self.shared.setdefault(shared, (camera, rig.rig_id))
            same = known.camera_id == camera.camera_id
        if not same:
            raise InputError(
                f"{path} has {image.name} with another camera ({camera.model_name}, number "
                f"{camera.camera_id}); pass the --camera_mode and --camera_model that it was made "
                "with, or name another database"
            )

    def _descriptors(self, features: Features) -> Any:
        """Rows of float32 as bytes, as COLMAP keeps them."""
        rows = np.ascontiguousarray(features.descriptors, np.float32)
        data = rows.view(np.uint8)  # [N, 4 D]
        return self.colmap.FeatureDescriptors(self.type, data)

    def _shares(self, name: str, exif: dict, size: tuple[int, int]) -> Any:
        """What all images of one camera have in common, or None for a camera of its own."""
        by_name = self.cameras.by_name(name)
        if by_name is not None:
            return by_name
        focal = exif.get(FOCAL_35MM) or exif.get(FOCAL)
        if self.cameras.mode == "image" or not focal or not {MAKE, MODEL} <= exif.keys():
            return None
        return exif[MAKE], exif[MODEL], float(focal), size

    def _camera(self, name: str, shared: Any, exif: dict, size: tuple[int, int]) -> tuple[Any, int]:
        """The camera of an image and its rig's number, new or shared."""
        if shared is not None and shared in self.shared:
            camera, rig_id = self.shared[shared]
            _check_size(name, size, (camera.width, camera.height))
            return camera, rig_id
        camera = self._guess(name, exif, size)
        camera.camera_id = self.database.write_camera(camera)
        rig = self.colmap.Rig()
        rig.add_ref_sensor(camera.sensor_id)
        rig_id = self.database.write_rig(rig)
        if shared is not None:
            self.shared[shared] = camera, rig_id
        return camera, rig_id

    def _guess(self, name: str, exif: dict, size: tuple[int, int]) -> Any:
        """What COLMAP takes an image's camera for."""
        if exif.get(FOCAL_35MM) or exif.get(FOCAL):  # COLMAP knows the sensors of many cameras
            options = self.colmap.ImageReaderOptions(camera_model=self.cameras.model)
            with contextlib.suppress(ValueError, RuntimeError):  # its library reads fewer formats
                return self.colmap.infer_camera_from_image(self.folder / name, options)
        return self.colmap.Camera.create_from_model_name(
            0, self.cameras.model, FOCAL_FACTOR * max(size), *size
        )

    def _prior(self, exif: dict) -> Any:
        """The place and the direction down that EXIF gives, or None."""
        if ORIENTATION not in exif and GPS not in exif:
            return None
        prior = self.colmap.PosePrior()
        orientation = exif.get(ORIENTATION)
        if orientation == 1 or orientation in TURNS:
            prior.gravity = np.array(GRAVITY[TURNS.get(orientation, 0)])
        if GPS in exif:
            prior.position = np.array(exif[GPS])
            prior.coordinate_system = self.colmap.PosePriorCoordinateSystem.WGS84
        return prior if prior.has_gravity() or prior.has_position() else None


def in_colmap(features: Features) -> np.ndarray:
    """Keypoints as COLMAP stores them, float32 [N, 6]: x, y and an affine shape, here none.

    COLMAP's origin is the corner of the top-left pixel, ours its centre.
    """
    rows = np.tile(np.array([0, 0, 1, 0, 0, 1], np.float32), (len(features), 1))
    rows[:, :2] = features.keypoints + np.float32(0.5)
    return rows


def read_exif(path: Path) -> dict[int, Any]:
    """An image's EXIF by tag, and under `GPS` (latitude, longitude, altitude) where all are there.

    Focal lengths are positive numbers and the names of maker and model text, or not there. Empty
    where there is none that can be read.
    """
    try:
        with open_header(path) as image:
            tags = image.getexif()
            found = dict(tags) | dict(tags.get_ifd(EXIF))
            position = _position(tags.get_ifd(GPS))
    except Exception:  # EXIF is whatever a camera's maker took it for, and a help only
        return {}
    found.pop(GPS, None)
    lengths, names = (FOCAL, FOCAL_35MM), (MAKE, MODEL)
    odd = [tag for tag in lengths if not _is_positive(found.get(tag))]
    odd += [tag for tag in names if not isinstance(found.get(tag), str)]
    found = {tag: value for tag, value in found.items() if tag not in odd}
    return found if position is None else found | {GPS: position}


def _is_positive(value: Any) -> bool:
    return isinstance(value, Real) and 0 < value < math.inf  # a fraction of Pillow's may be NaN


def _position(gps: dict[int, Any]) -> tuple[float, float, float] | None:
    if not {2, 4, 6} <= gps.keys():
        return None
    latitude, longitude = (
        float(np.dot([1, 1 / 60, 1 / 3600], [*map(float, gps[t])])) for t in (2, 4)
    )
    south, west = (str(gps.get(t, "")).upper() in ("S", "W") for t in (1, 3))
    below = gps.get(5) in (1, b"\x01")
    return (
        -latitude if south else latitude,
        -longitude if west else longitude,
        -float(gps[6]) if below else float(gps[6]),
    )


Pairs = Iterable[tuple[str, str]]


def exhaustive_pairs(names: Sequence[str]) -> Pairs:
    """All pairs, block by block, so that a few images at a time are needed."""
    blocks = [names[at : at + BLOCK] for at in range(0, len(names), BLOCK)]
    for i, rows in enumerate(blocks):
        yield from itertools.combinations(rows, 2)
        for columns in blocks[i + 1 :]:
            yield from itertools.product(rows, columns)


def sequential_pairs(names: Iterable[str], overlap: int) -> list[tuple[str, str]]:
    """Each image with the `overlap` ones after it, in natural order."""
    ordered = sorted(names, key=natural)
    return [
        (first, second)
        for i, first in enumerate(ordered)
        for second in ordered[i + 1 : i + 1 + overlap]
    ]


def read_pairs(path: Path, names: Container[str]) -> list[tuple[str, str]]:
    """Pairs of `names` from a file with two in a line, as COLMAP and hloc write them."""
    try:
        lines = read_text(path).splitlines()
    except InputError as error:
        raise InputError(f"cannot read the pairs: {error}") from error
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for number, line in enumerate(lines, 1):
        pair = line.split()
        if not pair or line.startswith("#"):
            continue
        if len(pair) != 2 or pair[0] == pair[1]:
            raise InputError(f"line {number} of {path} is not two names of images; correct it")
        for name in pair:
            if name not in names:
                raise InputError(
                    f"line {number} of {path} names {name}, which is not among the images; give "
                    "names as paths below the folder"
                )
        pairs.setdefault(frozenset(pair), (pair[0], pair[1]))
    if not pairs:
        raise InputError(f"there is no pair in {path}; give two names of images in a line")
    return list(pairs.values())


def write_matches(
    path: Path,
    store: FeatureStore,
    pairs: Pairs,
    matcher: Matcher,
    report: Callable[[], None] = lambda: None,
) -> int:
    """Match those pairs that the database has no matches of yet; how many these are."""
    cache = Cache(lambda name: matcher.prepare(store.read(name), store.size(name)))
    pairs, count = iter(pairs), 0
    with open_database(path) as database:
        numbers = {image.name: image.image_id for image in database.read_all_images()}
        while some := list(itertools.islice(pairs, TRANSACTION)):
            found = {}
            for first, second in some:
                ids = numbers.get(first), numbers.get(second)
                # A file that was skipped is in no pair.
                if None not in ids and not database.exists_matches(*ids):
                    matches = matcher.match_prepared(cache[first], cache[second])
                    found[ids] = matches.indices.astype(np.uint32)
                report()
            with _transaction(path, database, sum(rows.nbytes for rows in found.values())):
                for ids, rows in found.items():
                    database.write_matches(*ids, rows)
            count += len(found)
    return count


class Cache:
    """What was made of the images asked for last, by name, up to `CACHE_BYTES`."""

    def __init__(self, make: Callable[[str], Any]):
        self._make, self._kept, self._bytes = make, OrderedDict(), 0

    def __getitem__(self, name: str) -> Any:
        """What `make` returns for `name`, from memory where it is still there."""
        if name not in self._kept:
            self._kept[name] = self._make(name)
            self._bytes += self._kept[name].nbytes
            while len(self._kept) > 2 and self._bytes > CACHE_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(name)
        return self._kept[name]
