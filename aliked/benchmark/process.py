"""Running a worker: a task goes in, its result comes out, whatever becomes of the process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aliked.benchmark.environment import ROOT

LONGEST_S = 3600.0  # of one task, engine builds included


class TaskFailed(Exception):
    """Why a task has no result, in a sentence."""

    def __init__(self, reason: str, expected: bool = False):
        """`expected`: bad input or something missing, rather than a fault."""
        super().__init__(reason)
        self.expected = expected


def run_task(
    task: dict,
    progress: Callable[[str, int, int], None] | None = None,
    compiler_cache: Path | None = None,
) -> Any:
    """Run a task of `worker.TASKS` in a process of its own; `TaskFailed` where it has no result.

    Compilers find nothing from earlier tasks unless a `compiler_cache` is given: a folder.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "aliked.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(compiler_cache or Path(folder)),
        )
        timer = threading.Timer(LONGEST_S, process.kill)
        timer.start()
        try:
            last = _converse(process, task, progress)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if "result" in last:
            return last["result"]
        if "error" in last:
            raise TaskFailed(last["error"], last["expected"])
        raise TaskFailed(_post_mortem(process.returncode, errors))


def _environment(compiler_cache: Path) -> dict[str, str]:
    search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache / "inductor"),
        "TRITON_CACHE_DIR": str(compiler_cache / "triton"),
    }


def _converse(process: subprocess.Popen, task: dict, progress: Callable | None) -> dict:
    """Send the task and return the last message; `{}` where the process ended without one."""
    try:
        with process.stdin as stdin:
            json.dump(task, stdin)
    except BrokenPipeError:  # it died at once; its words are in its standard error
        return {}
    for line in process.stdout:
        message = json.loads(line)
        if "progress" not in message:
            process.wait()
            return message
        if progress:
            progress(*message["progress"])
    process.wait()
    return {}


def _post_mortem(status: int, errors) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    last_words = f"; its last words: {lines[-1]}" if lines else ""
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}{last_words}"
    return f"the process ended with status {status} and no result{last_words}"
