"""Run the commands of README.md word for word, in order, in a fresh clone, as a new user would.

usage: python -m tools.try_readme [FOLDER]

Blocks marked `bash` run in one shell that stops at the first failure, blocks marked `python` in the
Python of that shell. What is marked otherwise is not run.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from aliked import cli
from aliked.files import read_text

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    """Return language and content of every fenced block of a Markdown text."""
    return BLOCK.findall(text)


def shell_script(text: str) -> str:
    """Return one script of everything that a README asks its reader to run."""
    parts = ["set -euo pipefail"]
    for language, content in blocks(text):
        if language == "bash":
            parts += [f"cat <<'SHOWN'\n\n$ {content}SHOWN", content]
        elif language == "python":
            parts += [f"python - <<'PYTHON'\n{content}PYTHON"]
    return "\n".join(parts) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(prog="python -m tools.try_readme", description=__doc__)
    p.add_argument(
        "folder", type=Path, nargs="?", help="where to clone to (default: a temporary folder)"
    )
    return p


def main(args: argparse.Namespace) -> int:
    """Clone the last commit, run, and return the status of what failed."""
    with tempfile.TemporaryDirectory() as temporary:
        clone = args.folder or Path(temporary) / "clone"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        script = shell_script(read_text(clone / "README.md"))
        return subprocess.run(["bash", "-c", script], cwd=clone).returncode


if __name__ == "__main__":
    cli.run(main, parser())
