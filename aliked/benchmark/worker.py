"""The process that measures one row, so that rows share neither memory nor tuning.

A task comes as one JSON object on standard input. Standard output carries a JSON object a line:
`{"progress": [stage, done, all]}` now and then, and last `{"result": ...}` or
`{"error": sentence, "expected": bool}`. What libraries print goes to standard error.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from aliked.backends import Spec, load_backend
from aliked.benchmark.rows import Row
from aliked.benchmark.timing import Limits
from aliked.errors import InputError
from aliked.images import load_image

PROGRESS_EVERY = 0.2  # seconds


class Channel:
    """Where the answers go."""

    def __init__(self, output: TextIO):
        self.output, self.last = output, 0.0

    def send(self, **message) -> None:
        """One line."""
        print(json.dumps(message), file=self.output, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say how far the task is, but not all the time."""
        if time.monotonic() - self.last > PROGRESS_EVERY:
            self.send(progress=[stage, done, total])
            self.last = time.monotonic()


def spec_of(task: dict) -> tuple[Row, Spec]:
    """The row and the extractor that a task is about."""
    row = Row(**task["row"])
    paths = [task[name] and Path(task[name]) for name in ("weights", "model_path")]
    return row, row.spec(task["device"], *paths)


def load_named(paths: list[str]) -> dict:
    """Images by file name."""
    return {Path(path).name: load_image(path) for path in paths}


def describe(task: dict, channel: Channel) -> dict:
    """The machine, the versions, the device that "auto" means, and which backends cannot run."""
    from aliked.backends.pytorch import choose_device
    from aliked.benchmark import environment
    from aliked.doctor import reason_against

    device = str(choose_device(task["device"]))
    return {
        "device": device,
        "machine": environment.machine(device),
        "versions": environment.versions(),
        "unavailable": {name: reason_against(name) for name in task["backends"]},
    }


def reference(task: dict, channel: Channel) -> None:
    """The reference features of a model on an image set."""
    from aliked.benchmark.reference import make_reference

    _, spec = spec_of(task)
    spec = replace(spec, device="cpu", precision="fp32")
    make_reference(spec, load_named(task["images"]), Path(task["path"]))


def build(task: dict, channel: Channel) -> float:
    """Make the file that a backend runs; seconds, without starting Python and loading PyTorch."""
    row, spec = spec_of(task)
    module = load_backend(row.backend)
    start = time.perf_counter()
    module.build(spec, (row.batch, row.height, row.width), Path(task["path"]))
    return time.perf_counter() - start


def measure_row(task: dict, channel: Channel) -> dict:
    """Measure a row."""
    from aliked.benchmark.measure import measure
    from aliked.benchmark.subject import Job

    row, spec = spec_of(task)
    job = Job(
        row, spec, load_named(task["images"]), Path(task["reference"]), Limits(**task["limits"])
    )
    return measure(job, channel.progress)


TASKS: dict[str, Callable] = {
    "describe": describe,
    "reference": reference,
    "build": build,
    "measure": measure_row,
}


def main() -> None:
    """Do the task on standard input."""
    # Compilers and engine builders print to standard output, from C++ too: move it away.
    channel = Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    task = json.load(sys.stdin)
    try:
        channel.send(result=TASKS[task["task"]](task, channel))
    except InputError as error:
        channel.send(error=str(error), expected=True)
    except Exception as error:  # whatever a runtime raises is the row's result
        traceback.print_exc()
        channel.send(error=sentence(error), expected=False)


def sentence(error: Exception) -> str:
    """The kind of error, and the first line of its text that says anything."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main()
