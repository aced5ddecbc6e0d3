"""The official implementation's outputs, where they are at hand: all 41 cases."""

import runpy
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


@pytest.mark.parametrize(
    ("model", "cases"),
    [("aliked-t16", 11), ("aliked-n16", 10), ("aliked-n16rot", 10), ("aliked-n32", 10)],
)
def test_every_golden_output_of_the_official_implementation_is_reproduced(
    model, cases, shared, weights_dir, monkeypatch, capsys
):
    """Tolerances are those of check_goldens.py for float32, explained in the README beside it."""
    script = str(shared / "goldens" / "check_goldens.py")
    arguments = ["--adapter", "goldens_adapter:extract", "--weights", str(weights_dir)]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--only", f"{model}__"])
    monkeypatch.setattr(sys, "path", sys.path[:])  # the script adds the current folder
    monkeypatch.chdir(HELPERS)
    # In this process, as a process of its own takes as long to load PyTorch as for an image.
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    done = capsys.readouterr()
    assert end.value.code == 0, done.out + done.err
    assert f"{cases} of {cases} goldens pass" in done.out
