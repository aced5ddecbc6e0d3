"""Records as evaluate.py writes them, made up, for the tests of what reads them."""

from dataclasses import asdict

from evaluation.records import SCHEMA
from evaluation.systems import System
from tests.helpers.timing_records import CONFIGURATION

FP32 = System("pytorch", "cpu", "aliked-t16", "fp32", 1000, None, None)
FP16 = System("onnxruntime-cpu", "cpu", "aliked-t16", "fp16", 1000, None, None)
SIFT = System("opencv", "cpu", "sift", "", 1000, None, None)


def row(number: int, error: float | None, group: str = "light", correct: int = 300) -> dict:
    """A pair of 400 matches."""
    return {
        "name": f"pair {number}",
        "group": group,
        "keypoints": [1000, 1000],
        "covisible": [800, 1000],
        "repeated": 600,
        "matches": 400,
        "correct": [correct] * 10,
        "recalled": correct,
        "corner_error": {"opencv": error},
    }


def record(system: System, errors: list[float | None], **changes) -> dict:
    """A record whose pairs have these corner errors, half of them of each group."""
    groups = ["light"] * (len(errors) // 2) + ["blur"] * (len(errors) - len(errors) // 2)
    rows = [row(i, e, g) for i, (e, g) in enumerate(zip(errors, groups, strict=True))]
    return {
        "schema": SCHEMA,
        "task": "homography",
        "system": asdict(system),
        "status": "ok",
        "pairs": rows,
        "dataset": {
            "name": "assets",
            "images": 20,
            "sizes": {"640x480": 12, "1241x376": 8},
            "sha256": "ef" * 32,
        },
        "parameters": {"top_k": 1000, "scores_th": None, "n_limit": 5000, "seed": 0},
        "configuration": CONFIGURATION,
    } | changes
