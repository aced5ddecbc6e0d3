"""How every script ends: one sentence, the right status, nothing half-written."""

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aliked import cli
from aliked.commands import COMMANDS
from aliked.errors import InputError
from aliked.files import locked, open_regular, read_text, whole_file

ROOT = Path(__file__).resolve().parents[2]


def ended(main, arguments=()) -> int:
    """The status with which a script of this `main` ends."""
    parser = cli.Parser(prog="script")
    parser.add_argument("--share", type=cli.share)
    with pytest.raises(SystemExit) as end:
        cli.run(main, parser, arguments)
    return end.value.code


def raising(error: BaseException):
    def main(args: argparse.Namespace) -> None:
        raise error

    return main


def not_utf8(text: str) -> UnicodeEncodeError:
    """What Python raises where a name that is not UTF-8 is to be written."""
    with pytest.raises(UnicodeEncodeError) as caught:
        text.encode()
    return caught.value


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("give another"), "give another"),
        (OSError(errno.ENOSPC, "No space left on device", "a.onnx"), "the disk of a.onnx is full"),
        (RuntimeError("[enforce] . No space left on device"), "the disk is full"),
        (MemoryError("Unable to allocate 12. GiB"), "not enough memory (Unable to allocate 12."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
        (not_utf8("b.jpg 1\na\udcff.jpg 2\n"), "not UTF-8 ('a\\udcff.jpg 2'); rename it"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "b: Permission denied"),
    ],
)
def test_what_goes_wrong_outside_is_one_sentence_and_status_2(error, sentence, capsys):
    assert ended(raising(error)) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.startswith("script: error: ") and said.count("\n") == 1


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(KeyError):
        cli.run(raising(KeyError("x")), cli.Parser(), [])


def test_the_status_is_what_main_returns():
    assert ended(lambda args: None) == 0
    assert ended(lambda args: 1) == 1
    assert ended(raising(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "7", "abc", ""])
def test_a_number_out_of_range_is_one_sentence(text, capsys):
    assert ended(lambda args: None, [f"--share={text}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{text} is no number from 0 to 1" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_line_of_any_command_is_one_sentence(name, capsys):
    stage = importlib.import_module(COMMANDS[name].module)
    with pytest.raises(SystemExit) as end:
        cli.run(stage.main, stage.parser(), ["--no_such_option"])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


WRITING = """
import sys, time
from pathlib import Path
from aliked import cli
from aliked.files import whole_file

def main(args):
    with whole_file(Path(sys.argv[1]) / "model.onnx") as partial:
        partial.write_text("half of it")
        print("writing", flush=True)
        time.sleep(60)

cli.run(main, cli.Parser(), [])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_script_that_is_stopped_leaves_nothing_half_written(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, tmp_path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said and list(tmp_path.iterdir()) == []


def test_a_script_that_is_interrupted_while_it_imports_says_so_in_a_line(tmp_path):
    (tmp_path / "slow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    (tmp_path / "script.py").write_text("from aliked import cli\nimport slow")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "script.py: interrupted\n")


@pytest.mark.parametrize(
    ("statement", "said", "status"),
    [
        ("import onnx.nothing", "script.py: error: the package onnx.nothing is not installed", 2),
        ("import cli.nothing", "Traceback (most recent call last)", 1),
    ],
)
def test_a_script_that_cannot_import_names_an_extra_or_is_at_fault(
    statement, said, status, tmp_path
):
    (tmp_path / "script.py").write_text(f"from aliked import cli\n{statement}")
    result = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == status
    assert result.stderr.startswith(said)


PRINTING = """
from aliked import cli

def main(args):
    for _ in range(100_000):
        print("a line")

cli.run(main, cli.Parser(prog="script"), [])
"""


def test_an_output_that_nobody_reads_ends_the_script_quietly():
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_script_whose_output_was_closed_ends_as_ever(stream):
    code = f"""
from aliked import cli
def main(args):
    import sys
    print("said", file=sys.{stream})
    return 3
cli.run(main, cli.Parser(), [])
"""
    number = {"stdout": 1, "stderr": 2}[stream]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        preexec_fn=lambda: os.close(number),
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")


def test_an_output_that_is_full_is_one_sentence():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", PRINTING], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 2
    assert result.stderr == b"script: error: the disk is full; make room and run the same again\n"


# -- files --


def test_a_link_at_the_scratch_name_is_not_followed(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / f".model.{os.getpid()}.partial.onnx").symlink_to(mine)
    with whole_file(tmp_path / "model.onnx") as partial:
        partial.write_text("model")
    assert (mine.read_text(), (tmp_path / "model.onnx").read_text()) == ("mine", "model")


def test_a_written_file_has_the_permissions_of_others(tmp_path):
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_a_long_name_is_written(tmp_path):
    name = "a" * 250 + ".txt"
    with whole_file(tmp_path / name) as partial:
        partial.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "too large", "zero byte"])
def test_what_is_no_file_of_a_sane_size_is_refused(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "too large":
        path.write_bytes(bytes(11))
    elif kind == "zero byte":
        path = Path("a\0b")
    with pytest.raises(InputError, match="give"), open_regular(path, most_bytes=10):
        raise AssertionError("opened")


def test_a_text_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_text(tmp_path / "a.md")


def test_a_text_is_written_in_utf8_whatever_the_locale(tmp_path):
    code = r"""
import sys
from pathlib import Path
from aliked.files import write_text
write_text(Path(sys.argv[1]), "a \u2020 b \udcff.jpg")
"""
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.md"], env=plain, check=True)
    assert read_text(tmp_path / "a.md") == "a \u2020 b \\udcff.jpg"


def test_a_file_that_somebody_holds_is_not_waited_for_where_that_is_not_wanted(tmp_path):
    with (
        locked(tmp_path / "a"),
        pytest.raises(BlockingIOError),
        locked(tmp_path / "a", wait=False),
    ):
        raise AssertionError("held twice")
