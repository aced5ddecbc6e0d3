"""The process that measures one row, so that rows share neither memory nor tuning.

It answers with `{"progress": [stage, done, all]}` now and then, and last with `{"result": ...}` or
`{"error": sentence, "expected": bool}`."""

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from aliked.backends import Spec, create_extractor, get_backend
from aliked.errors import InputError
from aliked.export.build import build_model_file
from aliked.files import write_json
from aliked.images import load_image
from benchmark.rows import Row
from benchmark.timing import Limits

PROGRESS_EVERY = 0.2  # seconds


class Channel:
    """Where the answers go."""

    def __init__(self, connection: Connection):
        self.connection, self.last = connection, 0.0

    def send(self, **message) -> None:
        """One message."""
        self.connection.send(message)

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
    from benchmark import environment

    device = str(choose_device(task["device"]))
    return {
        "device": device,
        "machine": environment.machine(device),
        "versions": environment.versions(),
        "unavailable": {name: get_backend(name).unavailable() for name in task["backends"]},
    }


def reference(task: dict, channel: Channel) -> None:
    """The reference features of a model on an image set."""
    import torch

    from benchmark.artifacts import make_reference

    _, spec = spec_of(task)
    spec = replace(spec, device="cpu", precision="fp32")
    # Each on its share of the processor: as many threads as cores in each would slow all down.
    torch.set_num_threads(max(1, torch.get_num_threads() // task["jobs"]))
    path = Path(task["path"])
    path.parent.mkdir(parents=True, exist_ok=True)
    make_reference(spec, load_named(task["images"]), path)


def build(task: dict, channel: Channel) -> None:
    """Make the file that a backend runs, then a note of the seconds that it took."""
    row, spec = spec_of(task)
    start = time.perf_counter()
    build_model_file(spec, (row.batch, row.height, row.width), Path(task["path"]))
    seconds = time.perf_counter() - start
    write_json(Path(task["note"]), {"build_s": seconds, "row": task["row"]})


def fill_cache(task: dict, channel: Channel) -> None:
    """Run a row's extractor once, for what its compilers keep; then note that it has run."""
    row, spec = spec_of(task)
    extractor = create_extractor(row.backend, spec)
    image = load_image(task["images"][0])
    extractor.infer(extractor.to_device(np.stack([image] * row.batch)))
    extractor.synchronize()
    note = Path(task["note"])
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, {"row": task["row"]})


def measure_row(task: dict, channel: Channel) -> dict:
    """Measure a row."""
    from benchmark.measure import Job, measure

    row, spec = spec_of(task)
    job = Job(
        row, spec, load_named(task["images"]), Path(task["reference"]), Limits(**task["limits"])
    )
    return measure(job, channel.progress)


TASKS: dict[str, Callable] = {
    "describe": describe,
    "reference": reference,
    "build": build,
    "fill_cache": fill_cache,
    "measure": measure_row,
}


def main(task: dict, connection: Connection) -> None:
    """Do a task and answer."""
    channel = Channel(connection)
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
