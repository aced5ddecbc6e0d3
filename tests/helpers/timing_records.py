"""Records as a benchmark writes them, made up, for the tests of what reads them."""

import json
from pathlib import Path

from msgspec.structs import asdict

from benchmark.records import SCHEMA
from benchmark.rows import Row

ROW = Row(
    backend="pytorch",
    device="cpu",
    model="aliked-t16",
    top_k=1000,
    scores_th=None,
    n_limit=None,
    image_set="sequence_640x480",
    width=640,
    height=480,
    precision="fp32",
    batch=1,
    compile_mode=None,
)
CONFIGURATION = {
    "limits": {"repeats": 200, "warmup": 200, "max_seconds": 10.0, "processes": 1},
    "machine": {"cpu": "Some CPU", "cpu_cores": 4, "cpu_threads": 4, "system": "Linux x86_64"},
    "versions": {"python": "3.11.7", "torch": "2.14.1", "cuda": None},
    "images": {"sequence_640x480": "ab" * 32},
    "model_path": None,
}


def clock(ms: float, unstable: list[str] | None = None) -> dict:
    """What a record holds of a clock with this median."""
    return {
        "mean": ms * 1.01,
        "std": ms * 0.02,
        "min": ms * 0.97,
        "p50": ms,
        "p90": ms * 1.05,
        "p99": ms * 1.1,
        "max": ms * 1.2,
        "runs": 200,
        "warmup": {"runs": 24, "settled": True},
        "unstable": unstable or [],
        "samples": [ms],
        "wall_p50": ms,
    }


def outcome(row: Row, **changes) -> dict:
    """A record of a row that has no times."""
    return {
        "schema": SCHEMA,
        "row": asdict(row),
        "weights_sha256": "cd" * 32,
        "measured_at": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef",
        "command": "python measure_timings.py assets/sequence_640x480",
        "configuration": CONFIGURATION,
    } | changes


def measured(row: Row, ms: float, in_common: float = 1.0, mib: float = 500.0, **changes) -> dict:
    """A record of a row that ran, with this median of the compute clock."""
    passed = in_common > 0.985
    return outcome(
        row,
        status="ok",
        build_s=0.0,
        clock="wall clock" if row.device == "cpu" else "CUDA events",
        compute_ms=clock(ms),
        end_to_end_ms=clock(ms + 0.5),
        images_per_second={"compute": 1000 * row.batch / ms, "end_to_end": 900 * row.batch / ms},
        load_s=0.5,
        first_run_s=1.5,
        memory={
            "process_mib": mib,
            "method": "host peak" if row.device == "cpu" else "process",
            "allocator_peak_above_model_mib": None,
        },
        clocks_seen=None,
        parity={
            "tolerance": row.precision.upper(),
            "passed": passed,
            "reasons": [] if passed else ["000000.png: keypoints in common 0.97 < 0.985"],
            "compared": 24,
            "keypoints_in_common": in_common,
            "mean_cosine": 0.9999,
            "min_cosine": 0.999,
            "max_shift_px": 0.01,
        },
        problems=[],
        ranked=passed,
        per_image=None,
        settings={},
        model_file=None,
        **changes,
    )


def write_records(path: Path, records: list[dict]) -> None:
    """Write a file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
