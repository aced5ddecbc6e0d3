"""Markdown tables of evaluations: the answer, what changes with the system, groups of pairs."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from aliked.backends import BACKENDS
from aliked.benchmark.results import UNRANKED, UNSTABLE, Result
from aliked.benchmark.tables import markdown, milliseconds
from aliked.configs import CONFIGS
from aliked.evaluation.records import Outcome, section_key
from aliked.evaluation.scores import Kind, Score, kind_of, paired_difference
from aliked.evaluation.speed import NOT_MEASURED, timing_of

SPEED_NOTES = (
    "ms: median of the compute clock of measure_timings.py on the same machine, with K and image "
    f"size as here ({UNRANKED} and {UNSTABLE} as in its tables); MiB: memory of that process."
)
HEADER = ["model", "runtime", "precision"]


def sections(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Outcomes that are comparable with each other, in the tables' order."""
    ordered = sorted(outcomes, key=lambda o: (section_key(o), table_order(o)))
    return [list(group) for _, group in itertools.groupby(ordered, section_key)]


def table_order(outcome: Outcome) -> tuple:
    """Model by model, PyTorch in float32 first; baselines last."""
    system = outcome.system
    models, backends = list(CONFIGS), list(BACKENDS)
    return (
        models.index(system.model) if system.model in models else len(models),
        system.model,
        backends.index(system.backend) if system.backend in backends else len(backends),
        system.precision != "fp32",
        system.device,
    )


def reference_of(outcome: Outcome, section: Sequence[Outcome]) -> Outcome | None:
    """PyTorch in float32 with the same model, where possible on the same device."""
    own = outcome.system
    found = [
        other
        for other in section
        if other.measured
        and (other.system.backend, other.system.precision) == ("pytorch", "fp32")
        and other.system.model == own.model
    ]
    found.sort(key=lambda other: other.system.device != own.device)
    return found[0] if found and found[0].system != own else None


def section_text(section: Sequence[Outcome], timings: Sequence[Result]) -> str:
    """All tables of one section."""
    record = section[0].record
    kind = kind_of(record["task"])
    measured = [outcome for outcome in section if outcome.measured]
    parts = [f"### {record['task']}: {record['dataset']['name']}", describe(section)]
    if measured:
        timed = any(timing_of(outcome, timings) for outcome in measured)
        notes = f"{kind.notes} {SPEED_NOTES}" if timed else kind.notes
        parts += [answer_table(measured, kind, timings), notes]
        changes = difference_table(measured, kind, record["parameters"]["seed"])
        groups = group_table(measured, kind.score(kind.headline))
        parts += [part for part in (changes, groups) if part]
    return "\n\n".join([*parts, *footnotes(section)])


def describe(section: Sequence[Outcome]) -> str:
    """The data, the keypoints, the machine."""
    record = section[0].record
    dataset, parameters = record["dataset"], record["parameters"]
    sizes = sorted(dataset["sizes"].items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} of {size}" for size, count in sizes[:3])
    rest = f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else ""
    machines = {_machine(outcome) for outcome in section}
    pairs = max((len(o.pairs) for o in section if o.measured), default=0)
    keypoints = next((o.system for o in section if not o.system.baseline), section[0].system)
    return (
        f"{pairs} pairs of {dataset['images']} images ({shown}{rest}), keypoints: "
        f"{keypoints.selection}, seed {parameters['seed']}. {'; '.join(sorted(machines))}."
    )


def _machine(outcome: Outcome) -> str:
    configuration = outcome.record["configuration"]
    machine, versions = configuration["machine"], configuration["versions"]
    names = ("torch", "onnxruntime", "opencv-python-headless", "poselib")
    packages = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    return f"{machine.get('gpu', machine['cpu'])}, {packages}"


def name_cells(outcome: Outcome) -> list[str]:
    """What stands at the left of every line."""
    system = outcome.system
    model = system.model.upper() if system.baseline else system.model
    return [model, system.runtime, system.precision]


def answer_table(measured: Sequence[Outcome], kind: Kind, timings: Sequence[Result]) -> str:
    """Accuracy, speed and memory of every system."""
    scores = [score for score in kind.scores if _has_numbers(score, measured)]
    lines = []
    for outcome in measured:
        values = [score.text(score.value(outcome.pairs)) for score in scores]
        lines.append([*name_cells(outcome), *values, *speed_cells(timing_of(outcome, timings))])
    width, height = measured[0].size
    header = [*HEADER, *(score.name for score in scores), f"ms at {width}x{height}", "MiB"]
    return markdown(header, lines, left=3)


def speed_cells(timing: Result | None) -> list[str]:
    """Milliseconds and MiB, marked as the tables of timings mark them."""
    if timing is None:
        return [NOT_MEASURED, ""]
    return [milliseconds(timing.compute_ms) + timing.marks("compute_ms"), timing.mib]


def _has_numbers(score: Score, measured: Sequence[Outcome]) -> bool:
    """Whether anything is known of it: PoseLib may have been missing."""
    return not all(np.isnan(score.values(outcome.pairs)).all() for outcome in measured)


def difference_table(measured: Sequence[Outcome], kind: Kind, seed: int) -> str | None:
    """What changes against PyTorch in float32 of the same model, with intervals."""
    scores = [s for s in map(kind.score, kind.compared) if _has_numbers(s, measured)]
    lines = []
    for outcome in measured:
        reference = reference_of(outcome, measured)
        if reference is None or outcome.system.baseline:
            continue
        cells = []
        for score in scores:
            change = paired_difference(score, outcome.pairs, reference.pairs, seed)
            mean, *interval = map(score.change_text, (change.mean, change.low, change.high))
            cells.append(f"{mean} [{', '.join(interval)}]")
        lines.append([*name_cells(outcome), *cells])
    if not lines:
        return None
    title = (
        "Change against PyTorch FP32 of the same model, the same pairs; in brackets the bootstrap "
        "interval over the pairs that holds 95 %:"
    )
    table = markdown([*HEADER, *(score.name for score in scores)], lines, left=3)
    return f"{title}\n\n{table}"


def group_table(measured: Sequence[Outcome], score: Score) -> str | None:
    """One score, group by group."""
    groups = list(dict.fromkeys(row["group"] for row in measured[0].pairs))
    if len(groups) < 2:
        return None
    lines = []
    for outcome in measured:
        by_group = [[r for r in outcome.pairs if r["group"] == group] for group in groups]
        lines.append([*name_cells(outcome), *(score.text(score.value(rows)) for rows in by_group)])
    counts = [sum(row["group"] == group for row in measured[0].pairs) for group in groups]
    header = [f"{group} ({count})" for group, count in zip(groups, counts, strict=True)]
    table = markdown([*HEADER, *header], lines, left=3)
    return f"{score.name} by kind of pair (how many):\n\n{table}"


def footnotes(section: Sequence[Outcome]) -> list[str]:
    """Why which systems have no numbers."""
    absent = [outcome for outcome in section if not outcome.measured]
    reasons = [f"- {o.system}, {o.record['status']}: {o.record['reason']}" for o in absent]
    return ["\n".join(["Not in the table:", "", *reasons])] if reasons else []
