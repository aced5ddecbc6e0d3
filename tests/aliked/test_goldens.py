"""The official implementation's outputs, where they are at hand: all 41 cases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("model", "cases"),
    [("aliked-t16", 11), ("aliked-n16", 10), ("aliked-n16rot", 10), ("aliked-n32", 10)],
)
def test_every_golden_output_of_the_official_implementation_is_reproduced(
    model, cases, shared, weights_dir
):
    """Tolerances are those of check_goldens.py for float32, explained in the README beside it."""
    check = shared / "goldens" / "check_goldens.py"
    command = [sys.executable, check, "--adapter", "goldens_adapter:extract"]
    command += ["--weights", weights_dir, "--only", f"{model}__"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT / "tests" / "helpers", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} of {cases} goldens pass" in done.stdout
