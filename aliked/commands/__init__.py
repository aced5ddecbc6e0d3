"""The command `aliked`: the stages that a person needs without a checkout of the project.

A stage is a module with `parser()` and `main(args)`. The script of the stage at the root of the
checkout is another door to the same two functions.
"""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from aliked import cli
from aliked.errors import InputError, missing_package, own_version


@dataclass(frozen=True)
class Command:
    """One stage of the command, and the script that is the same."""

    module: str
    script: str  # the same stage in a checkout
    summary: str
    options: tuple[str, ...] = ()  # put before those of the command line


COMMANDS = {
    "doctor": Command("aliked.doctor", "", "what is installed, and what runs on this machine"),
    "match": Command("aliked.commands.match", "demo_pair.py", "match images and draw the matches"),
    "extract": Command(
        "aliked.commands.extract", "extract.py", "features of many images, for hloc and COLMAP"
    ),
    "export": Command(
        "aliked.commands.export", "convert_pytorch_to_onnx.py", "write an .onnx file and prove it"
    ),
    "export-lightglue": Command(
        "aliked.commands.export_lightglue",
        "convert_lightglue_to_onnx.py",
        "the same for LightGlue, alone or from two images on",
    ),
    "check": Command(
        "aliked.commands.build",
        "",
        "say what TensorRT would refuse or misread in an .onnx file",
        ("--check_only",),
    ),
    "build": Command(
        "aliked.commands.build", "convert_onnx_to_trt.py", "build a TensorRT engine and prove it"
    ),
    "compare": Command(
        "aliked.commands.compare", "compare_fp32_fp16.py", "what is lost between two runtimes"
    ),
    "download": Command(
        "aliked.commands.download", "download_data.py", "official weights and sets of images"
    ),
}


def main() -> NoReturn:
    """Run the command `aliked`, or `python -m aliked`, and exit."""
    name, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    if name == "--version":
        print(f"aliked {own_version() or 'of a checkout that is not installed'}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"aliked: error: there is no {name!r}; see aliked --help", file=sys.stderr)
        sys.exit(2)
    run(name, arguments)


def usage() -> str:
    """What `aliked --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ("usage: aliked COMMAND ...", "", *rows, "", "aliked COMMAND --help has the options.")
    )


def run(name: str, arguments: Sequence[str]) -> NoReturn:
    """Run one stage on its command line and exit with its status."""
    command = COMMANDS[name]
    try:
        stage = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("aliked"):
            raise
        print(f"aliked {name}: error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # as importing PyTorch takes seconds
        print(f"aliked {name}: interrupted", file=sys.stderr)
        sys.exit(130)
    parser = stage.parser()
    parser.prog = f"aliked {name}"
    cli.run(in_own_words(stage.main), parser, [*command.options, *arguments])


def in_own_words(main: Callable[[Any], int | None]) -> Callable[[Any], int | None]:
    """`main`, its errors naming this command where they name a script of the checkout."""

    def wrapped(args: Any) -> int | None:
        try:
            return main(args)
        except InputError as error:
            raise InputError(translate(str(error))) from error

    return wrapped


def translate(text: str) -> str:
    """Say `aliked export` for `python convert_pytorch_to_onnx.py`, and so on."""
    for name, command in COMMANDS.items():
        if command.script:
            text = re.sub(rf"(python )?{re.escape(command.script)}", f"aliked {name}", text)
    return text
