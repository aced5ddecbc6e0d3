"""Runs an evaluation: systems over the pairs of a task, records, then tables and pictures."""

import argparse
import functools
import hashlib
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aliked.backends import Spec
from aliked.cli import command_line, seed, whole
from aliked.configs import CONFIGS, Selection, get_config
from aliked.doctor import installed_versions
from aliked.errors import InputError
from aliked.files import only_writer, sha256, writable_folder
from aliked.matching import Matcher
from aliked.options import (
    add_device_option,
    add_matcher_weights,
    add_selection_options,
    add_weights_option,
    check_selection,
)
from aliked.weights import LIGHTGLUE, find_weights
from benchmark.environment import Describe, git_commit
from benchmark.process import TaskFailed, run_task
from benchmark.records import Measured, append_record, keep_lines, load_records
from evaluation.records import SCHEMA, TASKS, Outcome, load_outcomes, read_outcomes
from evaluation.report import remove_page, report_text, write_page, write_report
from evaluation.systems import (
    TITLES,
    Machine,
    System,
    SystemFeatures,
    backends_of,
    check_precisions,
    features_key,
    open_matchers,
    open_system,
    systems_from,
)
from evaluation.task import Task

# Half precision where it is fast: PyTorch's on a CPU takes minutes an image.
SYSTEMS = {
    "cuda": ["pytorch:fp32", "pytorch:fp16", "sift", "orb"],
    "cpu": ["pytorch:fp32", "onnxruntime-cpu:fp16", "sift", "orb"],
}


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add what is compared, how it selects keypoints, and where everything goes."""
    add_system_options(parser.add_argument_group("what is compared"))
    add_selection_options(parser.add_argument_group("keypoints"))
    add_file_options(parser.add_argument_group("files"))
    # Not given is not the same as the default: `selection_from` refuses what would be ignored.
    parser.set_defaults(top_k=None, scores_th=None, n_limit=None)


def add_system_options(group: argparse._ArgumentGroup) -> None:
    """Add runtimes with their precisions, models, baselines; where they run."""
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
        help=f"any of {', '.join(CONFIGS)}, or all (default: {Spec.model})",
    )
    add_weights_option(group)
    group.add_argument(
        "--matchers",
        "--matcher",
        nargs="+",
        choices=TITLES,
        default=["mutual"],
        help="mutual nearest neighbours, the same with a ratio test, LightGlue, each with every "
        "system; a baseline has no LightGlue (default: mutual)",
    )
    add_matcher_weights(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of its kind (default: one made for every "
        "image size)",
    )
    add_device_option(group)


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Add records, features, timings, pictures."""
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
        type=whole(0),
        default=3,
        metavar="N",
        help="worst pairs of each system to draw (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="decides the random numbers of robust estimation and of the bootstrap (default: "
        "%(default)s)",
    )


def run(args: argparse.Namespace, task: Task) -> int:
    """Evaluate every system, then write the tables, the plots and the page of the worst pairs."""
    timings = load_records(args.timings) if args.timings else []
    selection = selection_from(args)
    output = output_from(args, task)
    machine, systems = survey(args, selection)
    common = common_fields(args.seed, selection, task, machine)
    with only_writer(output):
        done = resume(output, systems, common) if output.exists() else set()
        images = len(task.dataset.images)
        print(f"{task.dataset.name}: {images} images; {len(systems)} systems, {len(done)} done")
        features = open_features(args.features, systems, machine)
        matchers = open_matchers(systems, machine)
        with tqdm(total=len(systems), initial=len(done), unit="system", disable=None) as bar:
            for system in (s for s in systems if s not in done):
                bar.set_description_str(str(system))
                record = make_record(system, features[system], matchers[system], task, machine)
                record |= common
                append_record(output, record | provenance(system, machine))
                bar.update()
                tqdm.write(describe(system, record))
        return conclude(args, task, output, features, matchers, timings)


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


def selection_from(args: argparse.Namespace) -> Selection:
    """Which keypoints to keep; `InputError` where an option would be ignored, or one is missing."""
    top_k = Selection.top_k if args.top_k is None else args.top_k
    ignored = [name for name in ("scores_th", "n_limit") if getattr(args, name) is not None]
    if top_k > 0 and ignored:
        raise InputError(
            f"--{ignored[0]} selects keypoints by score, and --top_k {top_k} by number; leave one "
            "out (--top_k 0 to select by score)"
        )
    scores_th = check_selection(top_k, args.scores_th)
    return Selection(top_k, scores_th, Selection.n_limit if args.n_limit is None else args.n_limit)


def survey(args: argparse.Namespace, selection: Selection) -> tuple[Machine, list[System]]:
    """This machine, and the systems that the options name; `InputError` where there are none."""
    models = list(CONFIGS) if "all" in args.models else args.models
    for model in models:
        get_config(model)
    backends = backends_of(args.systems or [name for names in SYSTEMS.values() for name in names])
    try:
        facts = run_task(Describe(args.device, tuple(backends)))
    except TaskFailed as error:
        raise InputError(str(error)) from error
    own = installed_versions(("poselib", "h5py"))
    versions = facts["versions"] | {name: version for name, version in own.items() if version}
    if args.matcher_weights and "lightglue" not in args.matchers:
        raise InputError("--matcher_weights are LightGlue's; pass --matchers lightglue as well")
    if args.model_path and not args.model_path.is_file():
        raise InputError(f"--model_path {args.model_path} does not exist; export or build it first")
    machine = Machine(
        facts["device"],
        facts["machine"],
        versions,
        facts["unavailable"],
        args.weights,
        args.model_path,
        args.matcher_weights,
    )
    texts = args.systems or SYSTEMS[machine.device.partition(":")[0]]
    systems = systems_from(texts, models, machine.device, selection, args.matchers)
    check_precisions(systems, machine)
    return machine, systems


def common_fields(seed: int, selection: Selection, task: Task, machine: Machine) -> dict:
    """What the records of all systems have in common, and what they must to stand in one table."""
    images = task.dataset.images
    digests = "".join(f"{image.name} {image.sha256}\n" for image in images)
    sizes = Counter(f"{image.size[0]}x{image.size[1]}" for image in images)
    kept = asdict(selection)
    if not selection.by_threshold:
        kept |= {"scores_th": None}
        del kept["strict"]
    return {
        "schema": SCHEMA,
        "task": task.name,
        "dataset": {
            "name": task.dataset.name,
            "images": len(images),
            "sizes": dict(sorted(sizes.items())),
            "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        },
        "parameters": task.parameters | kept | {"seed": seed},
        "configuration": {
            "machine": machine.facts,
            "versions": machine.versions,
            "model_path": machine.model_path and sha256(machine.model_path),
        },
    }


def resume(path: Path, systems: list[System], common: dict) -> set[System]:
    """The systems that `path` already holds, of this same task, data, rules and machine.

    Records of systems that could not run are dropped from the file, to be tried again.
    `InputError`, and the file unchanged, where a record has something else of `common`.
    """
    outcomes = read_outcomes(path)
    seen: set[System] = set()
    for number, outcome in outcomes.items():
        what = [f"another {name}" for name in common if outcome.record.get(name) != common[name]]
        what += ["a system not asked for"] if outcome.system not in systems else []
        what += ["a system that is there twice"] if outcome.system in seen else []
        if what:
            raise InputError(
                f"line {number} of {path} is of {what[0]}; pass the same options, or another "
                "--output"
            )
        seen.add(outcome.system)
    kept = {number: outcome for number, outcome in outcomes.items() if outcome.measured}
    keep_lines(path, kept)
    return {outcome.system for outcome in kept.values()}


def open_features(
    folder: Path, systems: list[System], machine: Machine
) -> dict[System, SystemFeatures]:
    """The features of each system, extracted when they are needed, once for all matchers."""
    stores: dict[System, SystemFeatures] = {}
    for system in (replace(system, matcher="mutual") for system in systems):
        if system not in stores:
            open_extractor = functools.partial(open_system, system, machine)
            key = features_key(system, machine)
            stores[system] = SystemFeatures(folder, key, open_extractor)
    return {system: stores[replace(system, matcher="mutual")] for system in systems}


def make_record(
    system: System, features: SystemFeatures, matcher: Matcher, task: Task, machine: Machine
) -> dict:
    """Evaluate one system; one that cannot run here is a record too."""
    record = {"system": asdict(system), "task": task.name}
    reason = machine.unavailable.get(system.backend)
    if reason is None:
        try:
            features.extract(task.dataset.images)
        except InputError as error:  # such as a model file that cannot be made
            reason = str(error)
    if reason:
        return record | {"status": "not run", "reason": reason}
    return record | {"status": "ok", "pairs": task.rows(features.read, matcher)}


def provenance(system: System, machine: Machine) -> dict:
    """Where a record comes from."""
    weights = None if system.baseline else sha256(find_weights(system.model, machine.weights))
    return {
        "weights_sha256": weights,
        "matcher_sha256": sha256(find_weights(LIGHTGLUE, machine.matcher_weights))
        if system.matcher == "lightglue"
        else None,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "command": command_line(),
    }


def describe(system: System, record: dict) -> str:
    """A system's outcome in a line."""
    if record["status"] != "ok":
        return f"{system}: {record['status']}: {record['reason']}"
    task, pairs = TASKS[record["task"]], record["pairs"]
    score = task.score(task.headline)
    return f"{system}: {score.name} {score.text(score.value(pairs))} over {len(pairs)} pairs"


def conclude(
    args: argparse.Namespace,
    task: Task,
    output: Path,
    features: dict[System, SystemFeatures],
    matchers: dict[System, Matcher],
    timings: list[Measured],
) -> int:
    """Print the tables, write them, the plots and the page of the worst pairs."""
    outcomes = load_outcomes([output])
    print("\n" + report_text(outcomes, timings))
    print(f"records: {output}")
    folder = output.with_suffix("")
    for path in write_report(outcomes, timings, folder):
        print(f"wrote {path}")
    remove_page(folder)  # of an older run
    measured = [outcome for outcome in outcomes if outcome.measured]
    if args.worst and measured:

        def draw(outcome: Outcome, row: dict) -> np.ndarray:
            system = outcome.system
            return task.picture(row, features[system].read, matchers[system])

        print(f"wrote {write_page(folder, measured, args.worst, draw)}")
    return int(not measured)
