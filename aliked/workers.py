"""One extraction shared by several processes: one for each GPU of a machine, or Ray's on many.

All of them put features into one store, each batch of images whole or not at all. When one is
killed, another does what it left.
"""

import contextlib
import multiprocessing
import pickle
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

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
from aliked.store import FeatureStore
from aliked.threads import keep_freed_memory

RESTARTS = 3  # of a worker that was killed; more is no accident
MANY_IMAGES = 5000  # from which several processes on a GPU are worth their start
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


def extract_in_processes(
    job: Job, store: FeatureStore, devices: list[str], report: Report
) -> Tally:
    """Extract what `store` does not have, a process for each of `devices`; the caller closes it.

    `InputError` where one of a worker's stops it, or the same worker is killed again and again.
    """
    with contextlib.closing(Team(job, store, devices)) as team:
        return team.run(report)


Batch = tuple[int, list[Photo]]  # and which one it is, in the order of the folder


@dataclass
class Worker:
    """A process, and which batches it has that are not on the disk yet."""

    process: multiprocessing.Process
    ours: Connection
    batches: deque[Batch] = field(default_factory=deque)


class Team:
    """The processes of one machine. Each asks for a batch when it has room for one.

    What is on the disk is put into the one file while they go on, in the order of the folder.
    """

    def __init__(self, job: Job, store: FeatureStore, devices: list[str]):
        threads = job.threads or max(1, available_cores() // len(devices))
        self.jobs = [
            replace(job, threads=threads, spec=replace(job.spec, device=device))
            for device in devices
        ]
        self.store = store
        self.tally = Tally()  # of what is done here: bad headers are found while dealing
        self.tallies = [Tally() for _ in devices]
        self.deaths: Counter[int] = Counter()
        self._todo = self._batches()
        self._again: deque[Batch] = deque()  # what workers that died have left
        self._done: dict[int, list[str]] = {}
        self._arranged = 0  # batches
        self._context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._joiner = self._process(_join, self.jobs[0], store.path)
        self.workers: dict[int, Worker] = {}
        for index in range(len(devices)):
            self._start(index)

    def run(self, report: Report) -> Tally:
        """Wait for all of them."""
        started = time.perf_counter()
        while self.workers:
            by_connection = {worker.ours: index for index, worker in self.workers.items()}
            for ready in wait(list(by_connection)):
                self._hear(by_connection[ready])
            self.tally.wall = time.perf_counter() - started
            report(self._together())
        self._close_file()
        return self._together()

    def _close_file(self) -> None:
        """Wait for the one file. Where its process was killed the store's `close` writes it."""
        error = None
        with contextlib.suppress(EOFError, OSError):
            self._joiner.ours.send(None)
            error = self._joiner.ours.recv()
        if isinstance(error, str):
            raise InputError(error)
        if error is not None:
            raise error

    def close(self) -> None:
        """End those that are still running."""
        for worker in (*self.workers.values(), self._joiner):
            worker.process.terminate()
            worker.process.join()
            worker.ours.close()

    def _together(self) -> Tally:
        return sum(self.tallies, self.tally)

    def _batches(self) -> Iterator[Batch]:
        """The batches that are to be done; of those that are done only their order is kept."""

        def bad(error: InputError) -> None:
            if self.jobs[0].strict:
                raise error
            self.tally.skipped.append(str(error))

        for index, batch in enumerate(self.jobs[0].batches(bad)):
            if any(photo.name not in self.store for photo in batch):
                yield index, batch
            else:
                self._finish(index, batch)

    def _start(self, index: int) -> None:
        self.workers[index] = self._process(_work, self.jobs[index], self.store.path)

    def _process(self, target: Callable, *args: Any) -> "Worker":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(*args, theirs), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _hear(self, index: int) -> None:
        worker = self.workers[index]
        try:
            said = worker.ours.recv()
            if said is ASK:
                worker.ours.send(self._deal(worker))
                return
        except (EOFError, OSError):  # it has ended
            self._ended(index, worker)
            return
        if isinstance(said, str):
            raise InputError(said)
        if isinstance(said, OSError):
            raise said
        self.tallies[index], parts, on_disk = said
        self._to_join(parts, [])
        for _ in range(on_disk):
            self._finish(*worker.batches.popleft())

    def _deal(self, worker: Worker) -> list[Photo] | None:
        batch = self._again.popleft() if self._again else next(self._todo, None)
        if batch is None:
            return None
        worker.batches.append(batch)
        return batch[1]

    def _finish(self, index: int, batch: list[Photo]) -> None:
        """Put into the file what is complete up to here."""
        self._done[index] = [photo.name for photo in batch]
        while self._arranged in self._done:
            names = self._done.pop(self._arranged)
            self.store.arrange(names)
            self._to_join([], names)
            self._arranged += 1

    def _to_join(self, parts: list[Path], names: list[str]) -> None:
        if parts or names:
            with contextlib.suppress(OSError):  # killed: see _close_file
                self._joiner.ours.send((parts, names))

    def _ended(self, index: int, worker: Worker) -> None:
        del self.workers[index]
        worker.ours.close()
        worker.process.join()
        if worker.process.exitcode == 0:
            return
        self._again += worker.batches
        self.deaths[index] += 1
        if self.deaths[index] > RESTARTS:
            raise InputError(
                f"the process on {self.jobs[index].spec.device} ended {self.deaths[index]} times "
                f"with status {worker.process.exitcode}; what was extracted is kept: find out why, "
                "and pass --resume"
            )
        self._start(index)


SWITCH_SECONDS = 1e-4  # after which a thread gives way to another; 5e-3 is for fewer, longer steps
ASK = None  # what a worker says that has room for a batch


def _work(job: Job, path: Path, theirs: Connection) -> None:
    """A worker process: batches as long as there are any, into parts of the store."""
    keep_freed_memory()

    def batches() -> Iterator[list[Photo]]:
        theirs.send(ASK)
        while (batch := theirs.recv()) is not None:
            yield batch
            theirs.send(ASK)

    def report(tally: Tally) -> None:
        nonlocal told
        told = _tell(theirs, pipeline, told)

    told = 0
    try:
        with appending(path, job) as store:
            pipeline = Pipeline(job, store, report)
            pipeline.run_batches(batches())
            pipeline.flush()
            _tell(theirs, pipeline, told)
    except (InputError, OSError) as error:
        theirs.send(str(error) if isinstance(error, InputError) else error)
    except KeyboardInterrupt:  # the parent says so
        pass


def _join(job: Job, path: Path, theirs: Connection) -> None:
    """A process that puts parts into the one file: in the parent it would hold up the dealing."""
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        store = FeatureStore.open(path, job.key())
        while (said := theirs.recv()) is not None:
            parts, names = said
            store.adopt(parts)
            store.arrange(names)
            store.join()
        store.close()
        theirs.send(None)
    except InputError as error:
        theirs.send(str(error))
    except OSError as error:
        theirs.send(error)
    except (EOFError, KeyboardInterrupt):  # the parent has ended, and what it says is enough
        pass


def _tell(theirs: Connection, pipeline: Pipeline, told: int) -> int:
    """Send what has been done, and how much of it is on the disk that was not; all of that."""
    on_disk, parts = pipeline.on_disk, pipeline.store.flushed[:]
    theirs.send((pipeline.tally, parts, on_disk - told))
    del pipeline.store.flushed[: len(parts)]
    return on_disk


@contextlib.contextmanager
def appending(path: Path, job: Job) -> Iterator[FeatureStore]:
    """A store that others write to at the same time: what is new is put on the disk at the end."""
    store = FeatureStore.open(path, job.key())
    try:
        yield store
    finally:
        store.flush()


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
    shards = _shards(job, store, total)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}); start one, or pass --ray local"
        ) from error
    started = time.perf_counter()
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        gpus = int(ray.cluster_resources().get("GPU", 0)) if job.spec.device != "cpu" else 0
        results = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            ShardWorker,
            fn_constructor_args=(job, store.path.resolve()),
            batch_size=1,
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(size=min(processes or gpus or 1, len(shards))),
        )
        for row in results.iter_rows():
            total += pickle.loads(row["tally"])
            total.wall = time.perf_counter() - started
            report(total)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        raise InputError(str(cause if isinstance(cause, InputError) else error)) from error
    finally:
        ray.shutdown()
    return total


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
