"""What the doctor prints, and how the driver is asked for its devices."""

import subprocess
import sys
from pathlib import Path

import pytest

from aliked import doctor, gpu
from aliked.backends import BACKENDS
from aliked.errors import InputError
from tests.helpers.fake_tensorrt import Machine
from tests.helpers.fake_tensorrt.installed import install

ROOT = Path(__file__).resolve().parents[2]


def test_the_doctor_names_versions_devices_and_every_backend():
    command = [sys.executable, "-m", "aliked.doctor"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    lines = [line.split(maxsplit=1) for line in run.stdout.splitlines()]
    found = {name: text for name, text in (line for line in lines if len(line) == 2)}
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["pytorch"] == "available"
    assert BACKENDS.keys() <= found.keys()


def test_the_doctor_shows_the_devices(monkeypatch, capsys):
    install(monkeypatch, "11.4", Machine(gpus=[("Stand-in RTX", 8, 6), ("Other RTX", 9, 0)]))
    doctor.main()
    printed = capsys.readouterr().out
    assert "cuda:0  Stand-in RTX, compute capability 8.6, 8.0 GiB" in printed
    assert "cuda:1  Other RTX, compute capability 9.0, 8.0 GiB" in printed
    assert doctor.backends()["tensorrt"] == "available"


def test_the_doctor_works_without_pytorch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from aliked import doctor\nfrom aliked.backends import BACKENDS\n"
        "print(BACKENDS['pytorch'].unavailable())\n"
        "doctor.main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "the package torch is not installed; pip install" in run.stdout.splitlines()[0]


def test_devices_are_found_by_name_and_number(monkeypatch):
    machine = Machine(gpus=[("Stand-in RTX", 8, 6), ("Other RTX", 12, 0)])
    monkeypatch.setattr(gpu, "driver", lambda: machine.driver)
    assert gpu.unavailable() is None
    assert [device.name for device in gpu.devices()] == ["Stand-in RTX", "Other RTX"]
    assert gpu.device("auto") == gpu.device("cuda") == gpu.device("cuda:0")
    index, device = gpu.device("cuda:1")
    assert (index, device.name, device.compute_capability) == (1, "Other RTX", "12.0")
    for name in ("cuda:2", "cpu", "cuda:x", "gpu"):
        with pytest.raises(InputError):
            gpu.device(name)


@pytest.mark.parametrize(
    ("machine", "says"),
    [
        (None, "no NVIDIA driver"),
        (Machine(gpus=[]), "shows no CUDA device"),
        (Machine(driver_status=100), "CUDA_ERROR_NO_DEVICE (100)"),
    ],
)
def test_what_keeps_the_driver_from_working_is_said(monkeypatch, machine, says):
    monkeypatch.setattr(gpu, "driver", lambda: machine and machine.driver)
    assert says in gpu.unavailable()
    with pytest.raises(InputError):
        gpu.devices()


def test_the_doctor_explains_itself():
    command = [sys.executable, "-m", "aliked.doctor", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.startswith("usage: python -m aliked.doctor")
    assert "Backends:" not in run.stdout


@pytest.mark.parametrize(
    ("installed", "shown"),
    [
        ({"opencv-python": "4.13"}, {"opencv-python": "4.13"}),
        ({"opencv-python-headless": "5.0"}, {"opencv-python-headless": "5.0"}),
        (
            {"opencv-python": "4.13", "opencv-contrib-python": "4.12"},
            {"opencv-python": "4.13", "opencv-contrib-python": "4.12"},
        ),
        ({}, dict.fromkeys(doctor.OPENCV, "not installed")),
    ],
)
def test_whichever_opencv_is_installed_is_shown_and_the_others_are_not_missed(
    installed, shown, monkeypatch
):
    versions = dict.fromkeys(doctor.PACKAGES) | installed
    monkeypatch.setattr(doctor, "installed_versions", lambda names: versions)
    found = doctor.packages()
    assert {name: text for name, text in found.items() if name in doctor.OPENCV} == shown


def test_a_row_fits_the_terminal():
    lines = doctor.row("  tensorrt  ", "one two three " * 10 + "four", 40).splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 40
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert " ".join(line[12:] for line in lines) == "one two three " * 10 + "four"
    assert "\n" not in doctor.row("  tensorrt  ", "one two three " * 10, 0)
