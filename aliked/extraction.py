"""From a folder of photographs to a store of features: decoding, kernels and writing overlap.

Images of one size make a batch. Which images share one depends on the folder alone, not on which
thread is first nor on what an earlier run has done: a run that was killed and resumed, or shared by
several processes, gives the same features to the last bit.
"""

import contextlib
import functools
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from aliked.backends import Spec, create_extractor
from aliked.errors import InputError
from aliked.features import MIN_SIDE, Extractor, Features
from aliked.files import read_file, real_path, sha256
from aliked.images import (
    MOST_BYTES,
    find_images,
    load_image,
    one_opencv_thread,
    quiet_opencv,
    read_header,
)
from aliked.lanes import DecodingLane, FusedLane, Lane
from aliked.store import FeatureStore
from aliked.video import frames, is_video
from aliked.weights import find_weights

BATCH_PIXELS = 32 * 640 * 480  # of a batch where no size is asked for: enough to do for any GPU
MAX_BATCH = 32
DECODERS = ("opencv", "nvimgcodec")
TURNS = {3: 2, 6: 3, 8: 1}  # EXIF orientation to quarter turns, as in COLMAP; mirrored ones stay


@dataclass(frozen=True)
class Photo:
    """One image to be extracted, its pixels not in memory yet."""

    name: str
    size: tuple[int, int]  # width and height as stored
    load: Callable[..., np.ndarray]  # uint8 [height, width, 3] RGB as stored, perhaps in `out`
    turns: int = 0  # quarter turns, counter-clockwise, that make it upright
    jpeg: Path | None = None  # its file, where that is its kind


@dataclass(frozen=True)
class Job:
    """What to extract and how: all that another process needs to do a part of it."""

    images: Path  # a folder, a video, or the number of a camera
    backend: str = "pytorch"
    spec: Spec = field(default_factory=Spec)
    max_size: int | None = None  # longest side in pixels; larger images are made smaller
    masks: Path | None = None  # a folder with a mask for every image, as COLMAP has it
    batch_size: int | None = None
    threads: int | None = None  # that decode
    lanes: int = 1  # extractors that take turns, so that one computes while another copies
    every: int = 1  # frame of a video
    max_frames: int | None = None
    strict: bool = False  # the first bad file ends it
    half: bool = False  # descriptors in float16
    decoder: str = "opencv"  # or "nvimgcodec", of JPEGs on the GPU
    names: Sequence[str] | None = None  # of all images, where the folder has been searched

    def key(self) -> dict:
        """What the features depend on besides the image, as a store of features keeps it."""
        spec = self.spec
        mode = {"top_k": spec.top_k}
        if spec.top_k <= 0:
            mode = {"scores_th": spec.scores_th, "n_limit": spec.n_limit, "strict": spec.strict}
        if spec.model_path is None:
            file = {"weights": sha256(find_weights(spec.model, spec.weights))}
        else:
            file = {"model_path": sha256(spec.model_path)}
        return {
            "model": spec.model,
            "backend": self.backend,
            # A file has its own.
            "precision": spec.precision if spec.model_path is None else None,
            "max_size": self.max_size,
            "masks": self.masks and str(real_path(self.masks)),
        } | (mode | file | self._unusual())

    def _unusual(self) -> dict:
        """Settings that a key has only where they are unusual, so that older keys hold."""
        decoder = {} if self.decoder == DECODERS[0] else {"decoder": self.decoder}
        return decoder | ({"descriptors": "fp16"} if self.half else {})

    def extracted_size(self, photo: Photo) -> tuple[int, int]:
        """Width and height of what the extractor sees: upright, at most `max_size` long."""
        width, height = photo.size if photo.turns % 2 == 0 else photo.size[::-1]
        scale = self.max_size / max(width, height) if self.max_size else 1
        if scale >= 1:
            return width, height
        return max(1, round(width * scale)), max(1, round(height * scale))

    def batches(self, bad: Callable[[InputError], None]) -> Iterator[list[Photo]]:
        """All images in batches of one size, in the order in which the batches get full."""
        waiting: dict[tuple[int, int], list[Photo]] = {}
        for photo in self._photos(bad):
            size = self.extracted_size(photo)
            batch = waiting.setdefault(size, [])
            batch.append(photo)
            if len(batch) >= self._batch_size(size):
                yield waiting.pop(size)
        yield from waiting.values()

    def _batch_size(self, size: tuple[int, int]) -> int:
        if self.batch_size:
            return self.batch_size
        if self.spec.model_path is not None:  # it may be made for one image
            return 1
        return max(1, min(MAX_BATCH, BATCH_PIXELS // (size[0] * size[1])))

    def _photos(self, bad: Callable[[InputError], None]) -> Iterator[Photo]:
        if is_video(self.images):
            for name, image in frames(self.images, self.every, self.max_frames):
                yield Photo(name, image.shape[1::-1], lambda out=None, image=image: image)
            return
        for name in self.names or find_images(self.images):
            try:
                yield _photo(self.images, name)
            except InputError as error:
                bad(error)


def _photo(folder: Path, name: str) -> Photo:
    path = folder / name
    if name.encode(errors="replace").decode() != name:
        raise InputError(f"the name of {str(path)!r} is not UTF-8; rename it")
    width, height, orientation = read_header(path)
    load = functools.partial(load_image, path, orientation)  # which other processes can be sent
    jpeg = path if path.suffix.lower() in (".jpg", ".jpeg") else None
    return Photo(name, (width, height), load, TURNS.get(orientation, 0), jpeg)


@dataclass
class Tally:
    """How far a run is, and where its time went."""

    images: int = 0
    keypoints: int = 0
    skipped: list[str] = field(default_factory=list)  # a sentence for each bad file
    wall: float = 0.0  # seconds
    busy: Counter = field(default_factory=Counter)  # seconds of each stage, of all its threads
    cores: Counter = field(default_factory=Counter)  # seconds of these in which a core worked
    threads: Counter = field(default_factory=Counter)  # of each stage

    def __add__(self, other: "Tally") -> "Tally":
        """Both runs as one, side by side."""
        return Tally(
            self.images + other.images,
            self.keypoints + other.keypoints,
            self.skipped + other.skipped,
            max(self.wall, other.wall),
            self.busy + other.busy,
            self.cores + other.cores,
            self.threads + other.threads,
        )

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.wall if self.wall else 0.0

    def shares(self) -> str:
        """How busy each stage is, in percent of the time that its threads have."""
        time = {stage: max(self.wall * count, 1e-9) for stage, count in self.threads.items()}
        return ", ".join(f"{s} {min(1, self.busy[s] / time[s]):.0%}" for s in time)


Report = Callable[[Tally], None]


def extract(job: Job, store: FeatureStore, report: Report = lambda tally: None) -> Tally:
    """Extract the images that `store` does not have yet into it, and leave it open.

    `report` is called as it goes on. `InputError` where there is no image at all, the extractor
    cannot run, or a file is bad and the job strict.
    """
    pipeline = Pipeline(job, store, report)
    tally = pipeline.begin()
    pipeline.run_batches(missing(job, store, tally))
    return tally


def missing(job: Job, store: FeatureStore, tally: Tally) -> Iterator[list[Photo]]:
    """The batches with an image that `store` does not have; bad files go into `tally`."""

    def bad(error: InputError) -> None:
        if job.strict:
            raise error
        tally.skipped.append(str(error))

    for batch in job.batches(bad):
        names = [photo.name for photo in batch]
        store.arrange(names)
        if any(name not in store for name in names):
            yield batch


Extracted = list[tuple[Photo, Features, np.ndarray | None]]  # with the mask


class Pipeline:
    """One process's work: threads that decode, extractors, and a thread that writes."""

    def __init__(self, job: Job, store: FeatureStore, report: Report = lambda tally: None):
        """Raise `InputError` where the extractor cannot run."""
        self.job, self.store, self.report = job, store, report
        self._lock = threading.Lock()  # of the tally
        lanes = [self._open_lane(create_extractor(job.backend, job.spec)) for _ in range(job.lanes)]
        self._buffer, self._decodes = lanes[0].buffer, isinstance(lanes[0], DecodingLane)
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for lane in lanes:
            self._lanes.put(lane)
        self.begin()

    def _open_lane(self, extractor: Extractor) -> Lane:
        job = self.job
        if job.decoder == "nvimgcodec":
            threads = max(1, (job.threads or available_cores()) // job.lanes)
            return DecodingLane(extractor, job.half, threads)
        return (FusedLane if job.backend == "fused" else Lane)(extractor, job.half)

    def begin(self) -> Tally:
        """Begin a new count, and return it."""
        decode = self.job.threads or available_cores()
        self._written = True  # the batches so far, each whole
        self.tally = Tally(threads=Counter(decode=decode, extract=self.job.lanes, write=1))
        return self.tally

    def run_batches(self, batches: Iterable[list[Photo]]) -> None:
        """Extract these batches; the features are in the store when it returns."""
        started = time.perf_counter()
        counts = self.tally.threads
        under_way: deque[tuple[int, Future]] = deque()  # images, and their writing
        with quiet_opencv(), one_opencv_thread(), _pools(counts) as (readers, lanes, writer):
            for batch in batches:
                width, height = self.job.extracted_size(batch[0])
                if self._decoded_later(batch):
                    read = [readers.submit(self._read, photo) for photo in batch]
                    extracted = lanes.submit(self._decode_and_extract, batch, read)
                else:
                    pixels = self._buffer((len(batch), height, width, 3))
                    decoded = [
                        readers.submit(self._decode, *one)
                        for one in zip(batch, pixels, strict=True)
                    ]
                    extracted = lanes.submit(self._extract, batch, pixels, decoded)
                under_way.append((len(batch), writer.submit(self._write, extracted)))
                most = 2 * counts["decode"] + (counts["extract"] + 1) * len(batch)
                while sum(images for images, _ in under_way) > most:
                    self._settle(under_way, started)
            while under_way:
                self._settle(under_way, started)

    def _settle(self, under_way: deque[tuple[int, Future]], started: float) -> None:
        """Wait for the oldest batch, and raise its errors."""
        under_way.popleft()[1].result()
        self.tally.wall = time.perf_counter() - started
        self.report(self.tally)

    def _decode(self, photo: Photo, slot: np.ndarray) -> np.ndarray | None:
        """Put the pixels that the extractor sees into `slot` [h, w, 3]; the mask, if any."""
        with self._timed("decode"):
            pixels = photo.load(out=None if photo.turns else slot)
            if pixels.shape[1::-1] != photo.size:
                raise InputError(
                    f"{photo.name} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and "
                    f"{photo.size[0]}x{photo.size[1]} in its header; replace or remove it"
                )
            if min(slot.shape[:2]) < MIN_SIDE:
                raise InputError(
                    f"{photo.name} is {slot.shape[1]}x{slot.shape[0]} pixels at --max_size "
                    f"{self.job.max_size}, and needs {MIN_SIDE}x{MIN_SIDE}; pass a larger one"
                )
            upright = np.rot90(pixels, photo.turns)
            if upright.shape != slot.shape:
                size = slot.shape[1::-1]
                cv2.resize(np.ascontiguousarray(upright), size, slot, interpolation=cv2.INTER_AREA)
            elif pixels is not slot:
                np.copyto(slot, upright)
            return None if self.job.masks is None else read_mask(self.job.masks, photo)

    def _extract(self, batch: list[Photo], pixels: np.ndarray, decoded: list[Future]) -> Extracted:
        masks = self._results(decoded)
        if not self._lacks(batch[i] for i in masks):
            return []
        with self._lane() as lane, self._timed("extract"):
            good = pixels if len(masks) == len(batch) else pixels[list(masks)]
            found = lane.extract(good)
        return [(batch[i], features, masks[i]) for i, features in zip(masks, found, strict=True)]

    def _lacks(self, photos: Iterable[Photo]) -> bool:
        """Whether any is to be extracted: a batch with a bad file is looked at by every run."""
        return any(photo.name not in self.store for photo in photos)

    def _decoded_later(self, batch: list[Photo]) -> bool:
        """Whether the extractor's device decodes these: JPEGs of just the size that it takes."""
        photo, size = batch[0], self.job.extracted_size(batch[0])
        return (
            self._decodes
            and all(photo.jpeg for photo in batch)
            and sorted(photo.size) == sorted(size)
            and min(size) >= MIN_SIDE
        )

    def _read(self, photo: Photo) -> tuple[bytes, np.ndarray | None]:
        """The bytes of a file, and the mask, if any."""
        with self._timed("decode"):
            data = read_file(photo.jpeg, MOST_BYTES)
            return data, None if self.job.masks is None else read_mask(self.job.masks, photo)

    def _decode_and_extract(self, batch: list[Photo], read: list[Future]) -> Extracted:
        files = self._results(read)
        if not self._lacks(batch[i] for i in files):
            return []
        with self._lane() as lane:
            with self._timed("extract"):
                shapes = [(*batch[i].size[::-1], 3) for i in files]
                images = lane.decode([data for data, _ in files.values()], shapes)
            pixels = {}
            for i, image in zip(files, images, strict=True):
                try:
                    turns = batch[i].turns
                    if image is None:  # whatever is wrong with it, OpenCV says so
                        image, turns = self._by_opencv(lane, batch[i]), 0
                    pixels[i] = image, turns
                except InputError as error:
                    self._bad(error)
            if not self._lacks(batch[i] for i in pixels):
                return []
            with self._timed("extract"):
                found = lane.extract(lane.stack(pixels.values()))
        return [
            (batch[i], features, files[i][1]) for i, features in zip(pixels, found, strict=True)
        ]

    def _by_opencv(self, lane: DecodingLane, photo: Photo) -> Any:
        """Decode and upload an image that the device could not; `InputError` where it is bad."""
        width, height = self.job.extracted_size(photo)
        slot = lane.buffer((height, width, 3))
        self._decode(photo, slot)
        return lane.image(slot)

    def _results(self, futures: list[Future]) -> dict[int, Any]:
        """The results of a batch by the index of each image; bad ones are counted and left out."""
        results = {}
        for index, future in enumerate(futures):
            try:
                results[index] = future.result()
            except InputError as error:
                self._bad(error)
        return results

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        lane = self._lanes.get()
        try:
            yield lane
        finally:
            self._lanes.put(lane)

    def _write(self, extracted: Future) -> None:
        # After a batch that failed none is written: which batch it is is known by their order.
        if not self._written:
            return
        self._written = False
        images = extracted.result()
        with self._timed("write"):
            for photo, features, mask in images:
                if photo.name in self.store:
                    continue
                features = as_stored(features, photo, self.job.extracted_size(photo))
                if mask is not None:
                    features = unmasked(features, mask)
                self.store.write(photo.name, features, photo.size)
                self.tally.images += 1
                self.tally.keypoints += len(features)
            self.store.checkpoint()
        self._written = True

    def _bad(self, error: InputError) -> None:
        if self.job.strict:
            raise error
        with self._lock:
            self.tally.skipped.append(str(error))

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started, worked = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.tally.busy[stage] += time.perf_counter() - started
                self.tally.cores[stage] += time.thread_time() - worked


def as_stored(features: Features, photo: Photo, extracted: tuple[int, int]) -> Features:
    """Features of the upright, perhaps smaller image, with keypoints in the image as stored.

    The centre of the top-left pixel is (0, 0) before and after: x' = (x + 0.5) s - 0.5.
    """
    width, height = photo.size
    upright = photo.size if photo.turns % 2 == 0 else (height, width)
    points = features.keypoints
    if upright != extracted:
        scale = np.array(upright, np.float32) / np.array(extracted, np.float32)
        points = (points + np.float32(0.5)) * scale - np.float32(0.5)
    if not photo.turns:
        return Features(points, features.scores, features.descriptors)
    x, y = points.T
    if photo.turns == 1:
        x, y = width - 1 - y, x
    elif photo.turns == 2:
        x, y = width - 1 - x, height - 1 - y
    elif photo.turns == 3:
        x, y = y, height - 1 - x
    return Features(np.stack([x, y], axis=1), features.scores, features.descriptors)


def read_mask(folder: Path, photo: Photo) -> np.ndarray:
    """The mask of an image, uint8 [height, width] as stored: NAME.png, or the suffix replaced.

    The same names as COLMAP's. `InputError` where there is none, or it has another size.
    """
    paths = [folder / f"{photo.name}.png", (folder / photo.name).with_suffix(".png")]
    found = next((path for path in paths if os.path.isfile(path)), None)  # also of too long a name
    if found is None:
        raise InputError(f"{photo.name} has no mask {paths[0]}; add one, white where all counts")
    mask = load_image(found, stored=1)
    if mask.shape[1::-1] != photo.size:
        raise InputError(
            f"the mask {found} has {mask.shape[1]}x{mask.shape[0]} pixels, and {photo.name} "
            f"{photo.size[0]}x{photo.size[1]} as stored; make them the same"
        )
    return mask.max(axis=2)


def unmasked(features: Features, mask: np.ndarray) -> Features:
    """The features whose keypoints lie in pixels of `mask` [H, W] that are not black."""
    x, y = np.floor(features.keypoints + 0.5).astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    kept = np.flatnonzero(inside)[mask[y[inside], x[inside]] > 0]
    return Features(*(rows[kept] for rows in vars(features).values()))


def available_cores() -> int:
    """The processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(allowed(0))


@contextlib.contextmanager
def _pools(threads: Counter) -> Iterator[list[ThreadPoolExecutor]]:
    """A pool for each stage; after an error nothing that has not begun is begun."""
    pools = [ThreadPoolExecutor(threads[stage], f"aliked-{stage}") for stage in threads]
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
