"""Options that every kind of evaluation has."""

import argparse
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked.backends import Spec
from aliked.cli import add_device_option, add_selection_options, add_weights_option, check_selection
from aliked.configs import CONFIGS, get_config
from aliked.doctor import installed_versions
from aliked.errors import InputError
from aliked.files import sha256, writable_folder
from aliked.weights import find_weights
from benchmark.environment import Describe, git_commit
from benchmark.process import TaskFailed, run_task
from benchmark.records import append_record, load_records
from evaluation.report import report_text, write_page, write_report
from evaluation.scores import SCHEMA, Outcome, kind_of, load_outcomes, resume, system_fields
from evaluation.store import FeatureStore, Image, store_key
from evaluation.systems import Place, System, backends_of, open_system, systems_from

# Half precision where it is fast: PyTorch's on a CPU takes minutes an image.
SYSTEMS = {
    "cuda": ["pytorch:fp32", "pytorch:fp16", "sift", "orb"],
    "cpu": ["pytorch:fp32", "onnxruntime-cpu:fp16", "sift", "orb"],
}


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What is compared, how it selects keypoints, and where everything goes."""
    add_system_options(parser.add_argument_group("what is compared"))
    add_selection_options(parser.add_argument_group("keypoints"))
    add_file_options(parser.add_argument_group("files"))


def add_system_options(group: argparse._ArgumentGroup) -> None:
    """Runtimes with their precisions, models, baselines; where they run."""
    group.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="BACKEND:PRECISION, each with every model, or a baseline: sift, orb (default: "
        f"{' '.join(SYSTEMS['cuda'])}; without a GPU {' '.join(SYSTEMS['cpu'])})",
    )
    group.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[Spec.model],
        metavar="NAME",
        help=f"of {', '.join(CONFIGS)}; all (default: {Spec.model})",
    )
    add_weights_option(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of its kind (default: one made for every "
        "image size)",
    )
    add_device_option(group)


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Records, features, timings, pictures."""
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="records, a line per system; tables, plots and pictures go into a folder of the same "
        "name (default: output/TASK-DATE-TIME.jsonl)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the systems that --output lacks"
    )
    group.add_argument(
        "--features",
        type=Path,
        default=Path("output/features"),
        metavar="DIR",
        help="where extracted features are kept, HDF5 (default: %(default)s)",
    )
    group.add_argument(
        "--timings",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="records of measure_timings.py, for the columns ms and MiB",
    )
    group.add_argument(
        "--worst",
        type=int,
        default=3,
        metavar="N",
        help="worst pairs of each system to draw (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of robust estimation and of the bootstrap (default: %(default)s)",
    )


Rows = list[dict]  # a pair each: "name", "group" and what was found


@dataclass(frozen=True)
class Task:
    """What one kind of evaluation has to say about one data set."""

    name: str  # of `scores.KINDS`
    dataset: str
    images: Sequence[Image]
    rows: Callable[[FeatureStore], Rows]  # with the features of all images to what was found
    draw: Callable[[dict, FeatureStore], np.ndarray]  # one of the rows as uint8 [H, W, 3] RGB
    parameters: dict = field(default_factory=dict)  # what the rows depend on besides the features


def run(args: argparse.Namespace, task: Task) -> int:
    """Evaluate every system, then write the tables, the plots and the page of the worst pairs."""
    output = output_from(args, task)
    place, systems = survey(args)
    common = common_fields(args, task, place)
    done = resume(output, systems, common) if output.exists() else set()
    print(f"{task.dataset}: {len(task.images)} images; {len(systems)} systems, {len(done)} done")
    stores = {system: open_store(args.features, system, place) for system in systems}
    with tqdm(total=len(systems), initial=len(done), unit="system", disable=None) as bar:
        for system in (s for s in systems if s not in done):
            bar.set_description_str(str(system))
            record = make_record(system, stores[system], task, place) | common
            append_record(output, record | provenance(system, place))
            bar.update()
            tqdm.write(describe(system, record))
    return conclude(args, task, output, stores)


def output_from(args: argparse.Namespace, task: Task) -> Path:
    """Where the records go; `InputError` where that would overwrite some or cannot be written."""
    usual = Path("output") / time.strftime(f"{task.name}-%Y%m%d-%H%M%S.jsonl")
    path = args.output or usual
    if path.suffix != ".jsonl" or path.is_dir():
        raise InputError(f"--output {path} is not the name of a .jsonl file; give one")
    if path.exists() and not args.resume:
        raise InputError(f"{path} exists; pass --resume to go on with it, or another --output")
    writable_folder(path.parent)
    return path


def survey(args: argparse.Namespace) -> tuple[Place, list[System]]:
    """This machine, and the systems that the options name; `InputError` where there are none."""
    scores_th = check_selection(args.top_k, args.scores_th)
    models = list(CONFIGS) if "all" in args.models else args.models
    for model in models:
        get_config(model)
    backends = backends_of(args.systems or [name for names in SYSTEMS.values() for name in names])
    try:
        facts = run_task(Describe(args.device, tuple(backends)))
    except TaskFailed as error:
        raise InputError(str(error)) from error
    own = installed_versions(("poselib", "h5py"))
    facts["versions"] |= {name: version for name, version in own.items() if version}
    if args.model_path and not args.model_path.is_file():
        raise InputError(f"--model_path {args.model_path} does not exist; export or build it first")
    place = Place(**facts, weights=args.weights, model_path=args.model_path)
    texts = args.systems or SYSTEMS[place.device.partition(":")[0]]
    selection = (args.top_k, scores_th, args.n_limit)
    return place, systems_from(texts, models, place.device, *selection)


def common_fields(args: argparse.Namespace, task: Task, place: Place) -> dict:
    """What the records of all systems have in common, and what they must to stand in one table."""
    digests = "".join(f"{image.name} {image.sha256}\n" for image in task.images)
    sizes = Counter(f"{image.size[0]}x{image.size[1]}" for image in task.images)
    selection = {name: getattr(args, name) for name in ("top_k", "scores_th", "n_limit")}
    return {
        "schema": SCHEMA,
        "task": task.name,
        "dataset": {
            "name": task.dataset,
            "images": len(task.images),
            "sizes": dict(sorted(sizes.items())),
            "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        },
        "parameters": task.parameters | selection | {"seed": args.seed},
        "configuration": {
            "machine": place.machine,
            "versions": place.versions,
            "model_path": place.model_path and sha256(place.model_path),
        },
    }


def open_store(root: Path, system: System, place: Place) -> FeatureStore:
    """The features of a system, made when they are needed."""
    return FeatureStore(root, store_key(system, place), lambda: open_system(system, place))


def make_record(system: System, store: FeatureStore, task: Task, place: Place) -> dict:
    """Evaluate one system; one that cannot run here is a record too."""
    record = {"system": system_fields(system), "task": task.name}
    reason = place.unavailable.get(system.backend)
    if reason is None:
        try:
            store.extract(task.images)
        except InputError as error:  # such as a model file that cannot be made
            reason = str(error)
    if reason:
        return record | {"status": "not run", "reason": reason}
    return record | {"status": "ok", "pairs": task.rows(store)}


def provenance(system: System, place: Place) -> dict:
    """Where a record comes from."""
    weights = None if system.baseline else sha256(find_weights(system.model, place.weights))
    return {
        "weights_sha256": weights,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def describe(system: System, record: dict) -> str:
    """A system's outcome in a line."""
    if record["status"] != "ok":
        return f"{system}: {record['status']}: {record['reason']}"
    kind, pairs = kind_of(record["task"]), record["pairs"]
    score = kind.score(kind.headline)
    return f"{system}: {score.name} {score.text(score.value(pairs))} over {len(pairs)} pairs"


def conclude(
    args: argparse.Namespace, task: Task, output: Path, stores: dict[System, FeatureStore]
) -> int:
    """Print the tables, write them, the plots and the page of the worst pairs."""
    outcomes = load_outcomes([output])
    timings = load_records(args.timings) if args.timings else []
    print("\n" + report_text(outcomes, timings))
    print(f"records: {output}")
    folder = output.with_suffix("")
    for path in write_report(outcomes, timings, folder):
        print(f"wrote {path}")
    measured = [outcome for outcome in outcomes if outcome.measured]
    if args.worst and measured:

        def draw(outcome: Outcome, row: dict) -> np.ndarray:
            return task.draw(row, stores[outcome.system])

        print(f"wrote {write_page(folder, measured, args.worst, draw)}")
    return int(not measured)
