"""The package as it is installed: what one imports, the command `aliked`, and the wheel."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import aliked
from aliked import cli, commands, errors
from aliked.errors import EXTRAS, REQUIRED, InputError

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


# what one imports


def test_the_names_are_those_of_the_modules_they_come_from():
    for name in aliked.__all__:
        module = importlib.import_module(f"aliked.{aliked._MODULES[name]}")
        assert getattr(aliked, name) is getattr(module, name)
    assert set(aliked.__all__) == set(aliked._MODULES) <= set(dir(aliked))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ALIKE'"):
        aliked.ALIKE  # noqa: B018
    with pytest.raises(ImportError):
        from aliked import ALIKE  # noqa: F401


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import aliked", set()),
        ("from aliked import InputError", set()),
        ("from aliked import Features, Spec, create_extractor, match_mutual", set()),
        ("from aliked import load_image", {"cv2"}),
        ("import aliked.commands", set()),
        ("from aliked import ALIKED", {"torch"}),
    ],
)
def test_a_library_is_loaded_when_a_name_needs_it(statement, loaded):
    code = f"{statement}\nimport sys\nprint(*({{'torch', 'cv2', 'onnx'}} & sys.modules.keys()))"
    assert loaded == set(python("-c", code).stdout.split()) & {*loaded, "torch", "onnx"}


# the command


def test_every_command_has_a_parser_and_a_script_that_is_the_same():
    for name, command in commands.COMMANDS.items():
        stage = importlib.import_module(command.module)
        assert callable(stage.main) and stage.parser().format_help(), name
        if command.script:
            script = importlib.import_module(Path(command.script).stem)
            assert (script.main, script.parser) == (stage.main, stage.parser)


def run_command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aliked", *arguments])
    with pytest.raises(SystemExit) as end:
        commands.main()
    return end.value.code


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_the_command_lists_the_stages(arguments, monkeypatch, capsys):
    assert run_command(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in commands.COMMANDS)


def test_a_stage_that_is_not_there_is_named(monkeypatch, capsys):
    assert run_command(monkeypatch, "extrat") == 2
    assert "there is no 'extrat'" in capsys.readouterr().err


def test_a_stage_has_the_options_of_its_script(monkeypatch, capsys):
    assert run_command(monkeypatch, "export", "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: aliked export") and "--opset_version" in printed


def test_check_is_build_with_check_only(monkeypatch, capsys, tmp_path):
    assert run_command(monkeypatch, "check", str(tmp_path / "gone.onnx")) == 2
    error = capsys.readouterr().err
    assert error.startswith("aliked check: error: ") and "gone.onnx" in error


def test_an_interrupt_while_a_stage_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert run_command(monkeypatch, "export", "FOLDER") == 130
    assert capsys.readouterr().err == "aliked export: interrupted\n"


@pytest.mark.parametrize(("module", "extra"), [("onnx", "onnx"), ("onnxruntime", "onnx")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    module, extra, monkeypatch, capsys
):
    version = importlib.metadata.version  # PyTorch, loaded here, asks what else is installed
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "1.0.0" if name == "aliked" else version(name)
    )
    monkeypatch.delitem(sys.modules, "aliked.commands.export", raising=False)
    for name in [name for name in sys.modules if name.startswith("aliked.export.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)  # of its package, which would keep the new module
    monkeypatch.setitem(sys.modules, module, None)
    assert run_command(monkeypatch, "export", str(ROOT / "assets" / "sequence_640x480")) == 2
    error = capsys.readouterr().err
    assert f'the package {module} is not installed; pip install "aliked[{extra}]"' in error
    assert error.count("\n") == 1


def test_a_package_that_a_stage_needs_while_it_runs_is_named_too(capsys):
    def main(args):
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    with pytest.raises(SystemExit) as end:
        cli.run(main, importlib.import_module("aliked.doctor").parser(), [])
    assert end.value.code == 2
    assert "the package h5py is not installed; pip install" in capsys.readouterr().err


def test_a_package_that_no_extra_brings_is_a_bug_and_not_bad_input():
    def main(args):
        raise ModuleNotFoundError("No module named 'alikd'", name="alikd")

    with pytest.raises(ModuleNotFoundError):
        cli.run(main, importlib.import_module("aliked.doctor").parser(), [])


def test_errors_of_the_command_name_the_command():
    def main(args):
        raise InputError("run `python download_data.py tum`, then convert_pytorch_to_onnx.py")

    with pytest.raises(InputError) as error:
        commands.in_own_words(main)(None)
    assert str(error.value) == "run `aliked download tum`, then aliked export"


def test_a_manifest_holds_the_command_that_can_be_typed_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/aliked", "export", "FOLDER"])
    assert cli.command_line() == "aliked export FOLDER"
    monkeypatch.setattr(sys, "argv", ["convert_pytorch_to_onnx.py", "FOLDER"])
    assert cli.command_line() == "python convert_pytorch_to_onnx.py FOLDER"


def test_a_command_that_is_kept_names_no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [tmp_path / "evaluate.py", "my photos", "--weights", tmp_path.parent / "w.pth"]
    words += [f"--output={tmp_path / 'a=b' / 'r.jsonl'}", "--base_url", "https://host/a"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert cli.command_line() == (
        "python evaluate.py 'my photos' --weights .../w.pth --output=a=b/r.jsonl "
        "--base_url https://host/a"
    )


# what is installed


def test_the_packages_that_everything_needs_are_those_of_the_project():
    names = {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]}
    assert set(REQUIRED.values()) == names


@pytest.mark.parametrize(
    ("version", "cures"),
    [
        ("1.0.0", ("pip install opencv-python-headless", 'pip install "aliked[onnx]"')),
        (None, ("pip install -e .", 'pip install -e ".[onnx]"')),
    ],
)
def test_a_checkout_is_installed_as_a_whole(version, cures, monkeypatch, capsys):
    monkeypatch.setattr(errors, "own_version", lambda: version)
    assert tuple(map(errors.how_to_install, ("cv2", "onnx"))) == cures
    monkeypatch.setattr(commands, "own_version", lambda: version)
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("aliked ")


def test_every_extra_that_a_message_names_is_there():
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()


def test_the_requirements_are_the_package_and_its_extras():
    for name in ("requirements.txt", "requirements-dev.txt"):
        constraint, package = (
            line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")
        )
        assert constraint == "-c constraints.txt"
        extras = package.removeprefix("-e .[").removesuffix("]").split(",")
        assert set(extras) <= PROJECT["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's content, built from a copy of the source."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel (extra dev)")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("aliked", "benchmark", "evaluation", "training", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "download_data.py"):
        shutil.copy(ROOT / name, source)
    code = "from hatchling.build import build_wheel; build_wheel('dist')"
    built = python("-c", code, cwd=source)
    assert built.returncode == 0, built.stderr
    (wheel,) = source.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_has_one_name_and_all_files_of_the_package(installed):
    (metadata,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"aliked", metadata.name}
    wanted = {
        path.relative_to(ROOT)
        for path in (ROOT / "aliked").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {path.relative_to(installed) for path in (installed / "aliked").rglob("*.*")}
    assert {path for path in found if (installed / path).is_file()} == wanted
    suffixes = {path.suffix for path in wanted}
    assert {".pth", ".json", ".cu", ".cuh", ".typed"} <= suffixes
    assert (metadata / "licenses" / "LICENSE").is_file()
    assert "aliked = aliked.commands:main" in (metadata / "entry_points.txt").read_text()


def test_the_wheel_takes_any_pytorch_from_the_oldest_that_was_run(installed):
    (metadata,) = installed.glob("*.dist-info")
    lines = (metadata / "METADATA").read_text().splitlines()
    (torch,) = (
        line for line in lines if line.startswith("Requires-Dist: torch") and "vis" not in line
    )
    assert "==" not in torch and "!=2.13.0" in torch
    assert "Requires-Python: >=3.11" in lines


def test_the_installed_package_finds_features_from_another_folder(installed, tmp_path):
    code = (
        "import sys, numpy as np, aliked\n"
        "from aliked import ALIKED, Spec, create_extractor, match_mutual\n"
        "image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)\n"
        "features = ALIKED.from_pretrained('aliked-t16-homography', top_k=50)(image)\n"
        "other = create_extractor('pytorch', Spec(top_k=50, device='cpu'))(image)\n"
        "pairs = match_mutual(features.descriptors, other.descriptors)\n"
        "print(aliked.__file__, len(features), len(pairs), 'torchvision' in sys.modules)\n"
    )
    run = python("-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert run.returncode == 0, run.stderr
    # On the CPU torchvision's library is enough; its modules take as long to import as PyTorch.
    file = str(installed / "aliked" / "__init__.py")
    assert run.stdout.split() == [file, "50", "50", "False"]


def test_outside_a_checkout_the_command_says_where_to_get_images(installed, tmp_path):
    arguments = ("-m", "aliked", "export", "assets/sequence_640x480")
    run = python(*arguments, cwd=tmp_path, PYTHONPATH=str(installed))
    assert run.returncode == 2
    assert (
        "give a folder of images of your own, or get some with `aliked download tum`" in run.stderr
    )
    assert run.stderr.count("\n") == 1
