"""Running a task in a process of its own: its result comes out, whatever becomes of the process.

Workers are forks of a process that has imported PyTorch, and for a GPU what runs through it there,
but has used nothing of it: each starts in milliseconds instead of seconds, with memory and tuning
of its own all the same."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from aliked import gpu
from aliked.cli import stop_by_exception
from aliked.errors import InputError
from benchmark.timing import Progress

LONGEST_S = 3600.0  # of one task, engine builds included
TO_CLEAN_UP_S = 2.0  # for a task that is stopped
PROGRESS_EVERY_S = 0.2
PROCESSES = multiprocessing.get_context("forkserver")
IMPORTED = ("benchmark.measure",)
# Importing these would cost every row seconds. None of them starts a thread, a process or CUDA.
# Inductor is left out: it asks the driver for its devices, after which no fork could use CUDA. What
# is not installed is passed over. Rows on a CPU go without: their memory is that of the process.
IMPORTED_FOR_A_GPU = (
    "aliked.model",
    "torchvision.ops",  # which the model's first run imports
    "aliked.fused.kernels",  # with Triton
    "torch._dynamo",
)


class Task(Protocol):
    """What a process is to do; it goes there pickled."""

    device: str  # such as "auto", "cpu" or "cuda:0"

    def run(self, progress: Progress) -> Any:
        """Do it; return what can be pickled, or raise `InputError` for what was to be expected."""


class TaskFailed(Exception):
    """Why a task has no result, in a sentence."""

    def __init__(self, reason: str, expected: bool = False):
        """`expected`: bad input or something missing, rather than a fault."""
        super().__init__(reason)
        self.expected = expected


def run_task(
    task: Task, progress: Progress | None = None, compiler_cache: Path | None = None
) -> Any:
    """Return the result of a task run in a process of its own; `TaskFailed` where it has none.

    Compilers find nothing from earlier tasks unless a `compiler_cache` is given: a folder.
    """
    PROCESSES.set_forkserver_preload(imported_once(task.device))
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"
        errors.touch()  # read also where the process ends before it could write
        environment = _environment(compiler_cache or Path(folder))
        answers, channel = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(
            target=_run, args=(task, channel, environment, errors), daemon=False
        )
        process.start()
        channel.close()
        timer = threading.Timer(LONGEST_S, process.kill)
        timer.start()
        try:
            last = _listen(answers, progress)
            process.join()
        finally:
            timer.cancel()
            _stop(process)
        if "result" in last:
            return last["result"]
        if "error" in last:
            raise TaskFailed(last["error"], last["expected"])
        raise TaskFailed(_post_mortem(process.exitcode, errors.read_text(errors="replace")))


def imported_once(device: str) -> list[str]:
    """Return the modules that workers for a device such as "auto" or "cpu" find imported."""
    return [*IMPORTED, *(IMPORTED_FOR_A_GPU if device != "cpu" and gpu.driver() else ())]


def run_tasks(
    tasks: list[Task], jobs: int, done: Callable[[], None], compiler_cache: Path | None = None
) -> list[Any]:
    """Return what `run_task` does for each task, or the `TaskFailed`; `jobs` run at a time.

    Calls `done()` after every task.
    """

    def run(task: Task) -> Any:
        try:
            return run_task(task, compiler_cache=compiler_cache)
        except TaskFailed as failure:
            return failure
        finally:
            done()

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(run, tasks))
        except BaseException:  # a signal: the threads wait for their processes
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                _stop(process)
            raise


def _stop(process: multiprocessing.process.BaseProcess) -> None:
    """End a process that may still run; it has a moment to remove what it has half-written."""
    process.terminate()
    process.join(TO_CLEAN_UP_S)
    process.kill()
    process.join()


def _environment(compiler_cache: Path) -> dict[str, str]:
    """This process's variables as they are now, which the forks' own may be older than."""
    return os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache / "inductor"),
        "TRITON_CACHE_DIR": str(compiler_cache / "triton"),
    }


def _run(task: Task, channel: Connection, environment: dict[str, str], errors: Path) -> None:
    """In the new process: do the task; what libraries print, from C++ too, goes to a file."""
    os.environ.clear()
    os.environ.update(environment)
    try:
        file = os.open(errors, os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:  # who started this process was stopped, and has removed the folder
        return
    os.dup2(file, 1)
    os.dup2(file, 2)
    # Where a runtime crashes, its caller in Python is in the file.
    faulthandler.enable(all_threads=False)
    stop_by_exception()
    try:
        channel.send({"result": task.run(_sender(channel))})
    except InputError as error:
        channel.send({"error": str(error), "expected": True})
    except Exception as error:  # whatever a runtime raises is the row's result
        traceback.print_exc()
        channel.send({"error": sentence(error), "expected": False})


def _sender(channel: Connection) -> Progress:
    """A function that says how far the task is, but not all the time."""
    last = 0.0

    def send(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > PROGRESS_EVERY_S:
            channel.send({"progress": (stage, done, total)})
            last = time.monotonic()

    return send


def sentence(error: Exception) -> str:
    """Return the kind of error, and the first line of its text that says anything."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


def _listen(answers: Connection, progress: Progress | None) -> dict:
    """The last message; `{}` where the process ended without one."""
    try:
        while "progress" in (message := answers.recv()):
            if progress:
                progress(*message["progress"])
    except EOFError:
        return {}
    return message


def _post_mortem(status: int, errors: str) -> str:
    said, _, stack = errors.partition("Fatal Python error")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reason = f"; its last words: {lines[-1]}" if lines else ""
    calls = [line.strip() for line in stack.splitlines() if line.startswith("  File ")]
    reason += f"; it was in {calls[0]}" if calls else ""
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}{reason}"
    return f"the process ended with status {status} and no result{reason}"
