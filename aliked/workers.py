"""One extraction shared by several processes: one for each GPU of a machine, or Ray's on many.

All of them put features into one store, each batch of images whole or not at all. When one is
killed, another does what it left.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aliked.cli import keep_sigterm
from aliked.errors import InputError, how_to_install
from aliked.extraction import (
    Job,
    Photo,
    Pipeline,
    Report,
    Tally,
    available_cores,
    missing,
)
from aliked.features import Features
from aliked.store import FeatureStore, arrays_of, image_bytes, journal_line, put_images
from aliked.threads import keep_freed_memory

RESTARTS = 3  # of a worker that was killed; more is no accident
MANY_IMAGES = 2000  # from which several processes on a GPU are worth their start
WAITING = 4  # batches of a worker that wait for their places in the file
CORES = 4  # that one process keeps busy: Python runs one of its threads at a time


def devices_of(job: Job, images: int, processes: int | None = None) -> list[str]:
    """The device of each process: `processes` of them, or as many as the images are worth.

    That is one for each GPU; where there are many images and one GPU is faster than what a process
    can give it, one for every few cores.
    """
    import torch

    gpus = torch.cuda.device_count() if job.spec.device == "auto" else 0
    count = processes or max(1, gpus)
    on_gpu = torch.cuda.is_available() and job.spec.device != "cpu"
    if not processes and on_gpu and job.backend == "fused" and images >= MANY_IMAGES:
        count *= max(1, available_cores() // count // CORES)
    return [f"cuda:{i % gpus}" if gpus > 1 else job.spec.device for i in range(count)]


def threads_of_each(processes: int) -> int:
    """How many threads decode in each of so many processes."""
    return max(1, available_cores() // processes)


def extract_in_processes(
    job: Job, store: FeatureStore, devices: list[str], report: Report
) -> Tally:
    """Extract what `store` does not have, a process for each of `devices`; the caller closes it.

    They write the file anew. So one that is finished and lacks no more batches than there are
    devices, whose images may all be bad, is this process's own to go on with. `InputError` where
    one of a worker's stops it, or the same worker is killed again and again.
    """
    if store.is_closed():
        found = Tally()  # the bad files: the folder is read once
        left = list(itertools.islice(missing(job, store, found), len(devices) + 1))
        if len(left) <= len(devices):
            pipeline = Pipeline(job, store, report)
            pipeline.begin().skipped += found.skipped
            pipeline.run_batches(left)
            return pipeline.tally
    with contextlib.closing(Team(job, store, devices)) as team:
        return team.run(report)


# Messages between the processes. A batch is known by its number in the order of the folder.


class Ask(NamedTuple):
    """A worker to the team: it has room for a batch."""


class Batch(NamedTuple):
    """The team to a worker: images to extract."""

    number: int
    photos: list[Photo]


class Enough(NamedTuple):
    """The team to a worker, or to the file: there is nothing more to do."""


class Opened(NamedTuple):
    """The file to all: it has been made, here."""

    path: Path


class Take(NamedTuple):
    """The team to the file: copy this batch, which the store has already."""

    number: int
    names: list[str]


class Place(NamedTuple):
    """A worker to the file: where is this batch, which is extracted, to be written?"""

    number: int
    names: list[str]
    nbytes: list[int]  # that each image takes


class Placed(NamedTuple):
    """The file to a worker: write the batch from this byte on, one image behind the other."""

    number: int
    at: int


class Written(NamedTuple):
    """A worker to the file: a batch is written."""

    number: int
    line: bytes  # for the journal


class Done(NamedTuple):
    """A worker to the team: all that it had is written."""


class Finished(NamedTuple):
    """The file to the team: it is complete, and in its place."""


class Stopped(NamedTuple):
    """Any process to the team: it cannot go on."""

    error: InputError | OSError


@dataclass
class Worker:
    """A worker process, as the team knows it."""

    index: int  # of its job
    process: multiprocessing.Process
    ours: Connection  # for batches and progress
    file: Connection  # for places in the file, passed on to the process of the file
    batches: deque[Batch] = field(default_factory=deque)  # that it has and has not written yet
    asking: set[int] = field(default_factory=set)  # numbers of batches whose places it waits for
    again: deque[Batch] = field(default_factory=deque)  # batches of a killed one before it


class Team:
    """The processes of one machine. Each asks for a batch when it has room for one.

    One more process owns the file: it gives each batch a place in it, in the order of the folder,
    and the workers write there themselves.
    """

    def __init__(self, job: Job, store: FeatureStore, devices: list[str]):
        threads = job.threads or threads_of_each(len(devices))
        self.job = job
        self.jobs = [
            replace(job, threads=threads, spec=replace(job.spec, device=device), names=None)
            for device in devices
        ]
        self.store = store
        self.tally = Tally()  # of this process, which finds bad headers while it deals
        self.tallies = [Tally() for _ in devices]
        self.deaths: Counter[int] = Counter()
        self.workers: dict[int, Worker] = {}  # that are not done
        self._leaving: list[multiprocessing.Process] = []  # done; leaving CUDA takes a second
        self._todo = self._batches()
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._grower, self._file = self._process(_grow, self.jobs[0], store.path)
        self._opened: Opened | None = None
        self._finished = False
        self._post: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._poster = threading.Thread(target=self._forward, daemon=True)
        self._poster.start()
        for index in range(len(devices)):
            self._start(index)

    def run(self, report: Report) -> Tally:
        """Wait for all of them, and until the file is in its place."""
        started = time.perf_counter()
        while self.workers:
            speakers: dict[Connection, Worker | None] = {self._file: None}
            for worker in self.workers.values():
                speakers |= {worker.ours: worker, worker.file: worker}
            for ready in wait(list(speakers)):
                if not ready.closed:  # while another message was handled
                    self._receive(ready, speakers[ready])
            self.tally.wall = time.perf_counter() - started
            report(self._together())
        self._post.put(Enough())
        while not self._finished:
            self._receive(self._file, None)
        return self._together()

    def close(self) -> None:
        """End those that are still running."""
        working = (worker.process for worker in self.workers.values())
        processes = [self._grower, *self._leaving, *working]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        self._post.put(None)
        self._poster.join()
        self._file.close()
        for worker in self.workers.values():
            worker.ours.close()
            worker.file.close()

    def _together(self) -> Tally:
        return sum(self.tallies, self.tally)

    def _batches(self) -> Iterator[Batch]:
        """The batches that are to be extracted; the others go into the file as they are."""

        def bad(error: InputError) -> None:
            if self.job.strict:
                raise error
            self.tally.skipped.append(str(error))

        for number, photos in enumerate(self.job.batches(bad)):
            names = [photo.name for photo in photos]
            if any(name not in self.store for name in names):
                yield Batch(number, photos)
            else:
                self._post.put(Take(number, names))

    def _process(self, target: Callable, *args: Any) -> tuple[multiprocessing.Process, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(*args, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _start(self, index: int) -> None:
        file, theirs = self._context.Pipe()
        process, ours = self._process(_work, self.jobs[index], theirs)
        theirs.close()
        self.workers[index] = Worker(index, process, ours, file)
        if self._opened is not None:
            _send(file, self._opened)

    def _receive(self, speaker: Connection, worker: Worker | None) -> None:
        """Receive and handle a message of a worker, or of the file (None), or its end."""
        try:
            said = speaker.recv()
        except (EOFError, OSError) as error:
            self._disconnected(speaker, worker, error)
        else:
            self._handle(said, worker)

    def _handle(self, said: Any, worker: Worker | None) -> None:
        """Handle a message."""
        match said:
            case Ask():
                self._deal(worker)
            case Tally():
                self.tallies[worker.index] = said
            case Opened():
                self._opened = said
                for each in self.workers.values():
                    _send(each.file, said)
            case Place():
                worker.asking.add(said.number)
                self._post.put(said)
            case Placed():  # whoever asked may have been killed: nobody else is to get it
                for each in self.workers.values():
                    if said.number in each.asking:
                        each.asking.remove(said.number)
                        _send(each.file, said)
            case Written():
                worker.batches.popleft()
                self._post.put(said)
            case Done():
                with contextlib.suppress(EOFError, OSError):  # it may have left already
                    while worker.file.poll():
                        self._handle(worker.file.recv(), worker)
                self._leave(worker)
                self._leaving.append(worker.process)
            case Finished():
                self._finished = True
            case Stopped():
                raise said.error

    def _deal(self, worker: Worker) -> None:
        # Batches of a killed worker come first: the file waits for them.
        batch = worker.again.popleft() if worker.again else next(self._todo, Enough())
        if isinstance(batch, Batch):
            worker.batches.append(batch)
        _send(worker.ours, batch)

    def _forward(self) -> None:
        """Pass messages on to the file, in a thread: if dealing waited for it, both might wait."""
        with contextlib.suppress(OSError):  # it has ended: see `_disconnected`
            while (said := self._post.get()) is not None:
                self._file.send(said)

    def _disconnected(self, speaker: Connection, worker: Worker | None, error: Exception) -> None:
        """Replace a worker that has ended too early; raise `InputError` if the file's has."""
        if worker is None:
            raise InputError(
                "the process that writes the file was killed; what was extracted is kept: find "
                "out why, and pass --resume"
            ) from error
        if speaker is worker.file:  # what it sent before on the other connection comes first
            while self.workers.get(worker.index) is worker:
                self._receive(worker.ours, worker)
            return
        self._leave(worker)
        worker.process.join()
        if worker.process.exitcode != 0:
            self._replace(worker)

    def _leave(self, worker: Worker) -> None:
        del self.workers[worker.index]
        worker.ours.close()
        worker.file.close()

    def _replace(self, worker: Worker) -> None:
        """Start another in place of one that was killed, unless that happens again and again."""
        self.deaths[worker.index] += 1
        if self.deaths[worker.index] > RESTARTS:
            device, status = self.jobs[worker.index].spec.device, worker.process.exitcode
            raise InputError(
                f"the process on {device} ended {self.deaths[worker.index]} times with status "
                f"{status}; what was extracted is kept: find out why, and pass --resume"
            )
        self._start(worker.index)
        self.workers[worker.index].again = worker.batches + worker.again


def _send(to: Connection, said: NamedTuple) -> None:
    """Send a message to a worker; that one has ended is found when it is listened to."""
    with contextlib.suppress(OSError):
        to.send(said)


@contextlib.contextmanager
def _errors_to(theirs: Connection) -> Iterator[None]:
    """Send what stops a process to its parent."""
    try:
        yield
    except (EOFError, KeyboardInterrupt):  # the parent has ended; the parent says so
        pass
    except (InputError, OSError) as error:
        _send(theirs, Stopped(error))


def _work(job: Job, file: Connection, theirs: Connection) -> None:
    """A worker process: batches as long as there are any, into the file that grows."""
    keep_freed_memory()
    if job.backend == "fused":
        import torch

        torch.set_num_threads(1)  # small weights are packed on cores that other processes want
    with _errors_to(theirs):
        writer = Writer(file)

        def batches() -> Iterator[list[Photo]]:
            theirs.send(Ask())
            while isinstance(said := theirs.recv(), Batch):
                writer.numbers.append(said.number)
                yield said.photos
                theirs.send(Ask())

        def report(tally: Tally) -> None:
            theirs.send(replace(tally, cores=tally.cores + Counter(put=writer.worked)))

        pipeline = Pipeline(job, writer, report)
        pipeline.run_batches(batches())
        writer.finish()
        report(pipeline.tally)
        theirs.send(Done())


class Writer:
    """What a worker has in place of a store: it writes batches to their places in the file.

    Some wait for these, since places are given in the order of the folder.
    """

    def __init__(self, file: Connection):
        self.numbers: deque[int] = deque()  # of the batches, in the order in which they come
        self.worked = 0.0  # seconds of a core that putting them took
        self._images: dict[str, list[np.ndarray]] = {}
        self._file, self._sending, self._descriptor = file, threading.Lock(), None
        self._thread = ThreadPoolExecutor(1, "aliked-place")
        self._waiting: deque[Future] = deque()

    def __contains__(self, name: str) -> bool:
        """Whether this is written already: never, since the file is written anew."""
        return False

    def write(self, name: str, features: Features, size: tuple[int, int]) -> None:
        """Take the features of an image of the batch."""
        self._images[name] = arrays_of(features, size)

    def checkpoint(self) -> None:
        """Have the batch written, once it has its place."""
        number, images = self.numbers.popleft(), self._images
        self._images = {}
        self._send(Place(number, list(images), [image_bytes(one) for one in images.values()]))
        self._waiting.append(self._thread.submit(self._put, number, images))
        self._wait(WAITING)

    def finish(self) -> None:
        """Return when all batches are written."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _put(self, number: int, images: dict[str, list[np.ndarray]]) -> None:
        """Write a batch once its place is known; places come in the order of the questions."""
        if self._descriptor is None:
            self._descriptor = os.open(self._file.recv().path, os.O_WRONLY)
        at, before = self._file.recv().at, time.thread_time()
        spots = put_images(self._descriptor, at, images)
        self.worked += time.thread_time() - before
        self._send(Written(number, journal_line(spots)))

    def _send(self, said: NamedTuple) -> None:
        with self._sending:
            self._file.send(said)


def _grow(job: Job, path: Path, theirs: Connection) -> None:
    """The process that owns the file: in the parent this would hold up the dealing."""
    with _errors_to(theirs), FeatureStore.open(path, job.key()).grow() as file:
        theirs.send(Opened(file.path))
        waiting: dict[int, Take | Place] = {}
        placed: dict[int, tuple[Place, Placed]] = {}  # what is not written yet
        following = 0  # the batch that is next
        while not isinstance(said := theirs.recv(), Enough):
            match said:
                case Written(number, line):
                    del placed[number]
                    file.note(line)
                case Place() if said.number in placed:  # asked again for one that was killed
                    before, answer = placed[said.number]
                    if before != said:
                        raise InputError(
                            "a batch of a process that was killed came out otherwise; pass --resume"
                        )
                    theirs.send(answer)
                case Place() | Take():
                    waiting[said.number] = said
            while following in waiting:
                match waiting.pop(following):
                    case Take(names=names):
                        file.take(names)
                    case Place(number, names, nbytes) as place:
                        places = [file.place(*one) for one in zip(names, nbytes, strict=True)]
                        answer = Placed(number, places[0] if places else 0)
                        placed[number] = place, answer
                        theirs.send(answer)
                following += 1
        file.finish()
        theirs.send(Finished())


SHARD_BATCHES = 4  # that a worker does between two checkpoints


def extract_with_ray(
    job: Job, store: FeatureStore, address: str, processes: int | None, report: Report
) -> Tally:
    """Extract what `store` does not have on all GPUs of a Ray cluster; the caller closes it.

    The store and the images lie in a file system that every machine sees under the same name.
    `address` is a cluster's, "auto" for the one that this machine belongs to, or "local" for one of
    this machine alone. Ray Data starts an actor for each GPU, or `processes` of them on processors,
    and gives the shards of one that dies to another. `InputError` where Ray is missing, cannot be
    reached, or a worker's stops it.
    """
    ray = _ray()
    total = Tally()
    job = _from_any_folder(job)
    shards = _shards(job, store, total)
    if not shards:
        return total
    with _cluster(ray, address):
        started = time.perf_counter()
        gpus = int(ray.cluster_resources().get("GPU", 0)) if job.spec.device != "cpu" else 0
        actors = min(processes or gpus or 1, len(shards))
        results = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            ShardWorker,
            fn_constructor_args=(replace(job, names=None), store.path.resolve()),
            batch_size=1,
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(size=actors),
        )
        for row in results.iter_rows():
            shard = pickle.loads(row["tally"])
            total += shard
            total.wall = time.perf_counter() - started
            total.threads = Counter({stage: actors * n for stage, n in shard.threads.items()})
            report(total)
    return total


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """A connection to a Ray cluster; `InputError` where it cannot be had, or gives up."""
    try:
        with keep_sigterm():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}); start one, or pass --ray local"
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from error
        reason = str(error).strip().rpartition("\n")[2]  # above it is how that was reached
        raise InputError(
            f"the Ray cluster gave up ({reason[:300]}); what was extracted is kept: find "
            "out why, and pass --resume"
        ) from error
    finally:
        ray.shutdown()


def _from_any_folder(job: Job) -> Job:
    """The same job for processes that were started in other folders, as those of a cluster are."""
    paths = {name: getattr(job.spec, name) for name in ("weights", "model_path")}
    spec = replace(job.spec, **{name: _absolute(path) for name, path in paths.items()})
    return replace(job, images=_absolute(job.images), masks=_absolute(job.masks), spec=spec)


def _absolute(path: Path | None) -> Path | None:
    return path and Path(path).absolute()


class ShardWorker:
    """What Ray Data starts on every GPU and gives one shard, some batches, after the other."""

    def __init__(self, job: Job, path: Path):
        self.job, self.store = job, FeatureStore.open(path, job.key())
        self.pipeline = Pipeline(job, self.store)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[bytes]]:
        """Extract shards; a `Tally` for each. They are on the disk on return."""
        return {"tally": [pickle.dumps(self._extract(pickle.loads(s))) for s in rows["shard"]]}

    def _extract(self, batches: list[list[Photo]]) -> Tally:
        tally = self.pipeline.begin()
        self.pipeline.run_batches(batches)
        self.store.flush()
        return tally


def _shards(job: Job, store: FeatureStore, total: Tally) -> list[dict[str, bytes]]:
    """The batches that are still to be done, some of them in a row; bad files into `total`."""
    batches = list(missing(job, store, total))
    return [
        {"shard": pickle.dumps(batches[at : at + SHARD_BATCHES])}
        for at in range(0, len(batches), SHARD_BATCHES)
    ]


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray with its data library ({error}); {how_to_install('ray')}"
        ) from error
    return ray
