"""One extraction shared by several processes: one for each GPU of a machine, or Ray's on many.

All of them put features into one store, each batch of images whole or not at all. When one is
killed, another does what it left.
"""

import contextlib
import multiprocessing
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
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
    extract,
    missing,
)
from aliked.store import FeatureStore

RESTARTS = 3  # of a worker that was killed; more is no accident


def extract_in_processes(job: Job, path: Path, devices: list[str], report: Report) -> Tally:
    """Extract what the store in `path` does not have, a process for each of `devices`.

    The caller opens the store again and closes it. `InputError` where one of a worker's stops it,
    or the same worker is killed again and again.
    """
    team = Team(job, path, devices)
    with contextlib.closing(team):
        return team.run(report)


class Team:
    """The processes of one machine, and what they have said last."""

    def __init__(self, job: Job, path: Path, devices: list[str]):
        threads = job.threads or max(1, available_cores() // len(devices))
        self.jobs = [
            replace(job, threads=threads, spec=replace(job.spec, device=device))
            for device in devices
        ]
        self.path = path
        self.context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.workers: dict[int, tuple[multiprocessing.Process, Connection]] = {}
        self.tallies = [Tally() for _ in devices]
        self.deaths: Counter[int] = Counter()
        for index in range(len(devices)):
            self._start(index)

    def run(self, report: Report) -> Tally:
        """Wait for all of them."""
        while self.workers:
            by_connection = {ours: index for index, (_, ours) in self.workers.items()}
            for ready in wait(list(by_connection)):
                self._hear(by_connection[ready])
            report(self._together())
        return self._together()

    def close(self) -> None:
        """End those that are still running."""
        for process, ours in self.workers.values():
            process.terminate()
            process.join()
            ours.close()

    def _together(self) -> Tally:
        return sum(self.tallies[1:], self.tallies[0])

    def _start(self, index: int) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        part = index, len(self.jobs)
        process = self.context.Process(
            target=_work, args=(self.jobs[index], self.path, part, theirs), daemon=True
        )
        process.start()
        theirs.close()
        self.workers[index] = process, ours

    def _hear(self, index: int) -> None:
        process, ours = self.workers[index]
        try:
            said = ours.recv()
        except (EOFError, OSError):  # it has ended
            del self.workers[index]
            ours.close()
            process.join()
            if process.exitcode != 0:
                self._died(index, process.exitcode)
            return
        if isinstance(said, str):
            raise InputError(said)
        self.tallies[index] = said

    def _died(self, index: int, status: int | None) -> None:
        self.deaths[index] += 1
        if self.deaths[index] > RESTARTS:
            raise InputError(
                f"the process on {self.jobs[index].spec.device} ended {self.deaths[index]} times "
                f"with status {status}; what was extracted is kept: find out why, and pass --resume"
            )
        self._start(index)


def _work(job: Job, path: Path, part: tuple[int, int], theirs: Connection) -> None:
    """A worker process: its part of the batches, into the store's parts."""
    try:
        with appending(path, job) as store:
            theirs.send(extract(job, store, theirs.send, part))
    except InputError as error:
        theirs.send(str(error))
    except KeyboardInterrupt:  # the parent says so
        pass


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
    job: Job, path: Path, address: str, processes: int | None, report: Report
) -> Tally:
    """Extract what the store in `path` does not have on all GPUs of a Ray cluster.

    `path` and the images lie in a file system that every machine sees under the same name.
    `address` is a cluster's, "auto" for the one that this machine belongs to, or "local" for one of
    this machine alone. Ray Data starts an actor for each GPU, or `processes` of them on processors,
    and gives the shards of one that dies to another. The caller opens the store again and closes
    it. `InputError` where Ray is missing, cannot be reached, or a worker's stops it.
    """
    ray = _ray()
    total = Tally()
    shards = _shards(job, path, total)
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
            fn_constructor_args=(job, path.resolve()),
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


def _shards(job: Job, path: Path, total: Tally) -> list[dict[str, bytes]]:
    """The batches that are still to be done, some of them in a row; bad files into `total`."""
    store = FeatureStore.open(path, job.key())
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
