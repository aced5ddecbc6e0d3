"""README.md and docs/: every command parses, every link and file is there, nothing is lost."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from aliked import commands
from tools.try_readme import blocks, shell_script

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("assets", "converted_model", "custom_ops", "results")
PAGES = [README, *DOCS, *(ROOT / name / "README.md" for name in OTHERS)]
PAGES.append(ROOT / "training/MODEL_CARD.md")
SHELL = ("", "bash")


def command_lines(path: Path) -> list[list[str]]:
    """The words of every command of a page's shell blocks, continued lines joined."""
    text = "\n".join(content for language, content in blocks(path.read_text()) if language in SHELL)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith(("python ", "aliked ", "make "))
    ]


COMMANDS = [
    pytest.param(words, id=f"{path.name}: {' '.join(words)[:60]}")
    for path in PAGES
    for words in command_lines(path)
]


def parser_of(words: list[str]):
    """The parser of a command of the project and the arguments it is given; None of another's."""
    if words[0] == "aliked":
        command = commands.COMMANDS[words[1]]
        return importlib.import_module(command.module).parser(), [*command.options, *words[2:]]
    name, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if name in ("pytest", "venv", "custom_ops.get_patches.toolchain"):
        return None
    if words[1] != "-m":
        assert (ROOT / name).is_file()
        name = name.removesuffix(".py").replace("/", ".")
    return importlib.import_module(name).parser(), arguments


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one_that_its_script_takes(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "cpp/tests/gpu_check.py" in words:  # needs the built library to be imported
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
    elif found := parser_of(words):
        parser, arguments = found
        parser.parse_args(arguments)


def test_there_are_commands_of_every_stage():
    scripts = {words[1] for words in command_lines(README)}
    assert {
        command.script for command in commands.COMMANDS.values() if command.script
    } <= scripts | {"download_data.py"}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", path.read_text())


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(path):
    for link in links(path):
        if not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_is_there(path):
    names = re.findall(
        r"`((?:aliked|benchmark|evaluation|training|tools|tests|custom_ops|assets|results|docs)"
        r"/[\w/.-]+)`",
        path.read_text(),
    )
    elsewhere = ("assets/tum", "assets/kitti", "assets/st_pauls_cathedral")  # not shipped
    missing = [
        name
        for name in names
        if not any((folder / name).exists() for folder in (ROOT, path.parent))
        and not name.startswith(elsewhere)
    ]
    assert missing == []


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.read_text().splitlines()) <= 250
    linked = links(README)
    from_pages = {link for page in DOCS for link in links(page)}
    for page in DOCS:
        times = linked.count(f"docs/{page.name}")
        # Twice: where a reader chooses a runtime, and at its stage.
        assert times in (1, 2) or (times == 0 and page.name in from_pages), page


def test_the_commands_that_are_tried_are_those_of_the_readme():
    script = shell_script(README.read_text())
    for part in ("make demo", "source .venv/bin/activate", "from aliked import ALIKED"):
        assert f"\n{part}" in script
    assert "make test" not in script
