"""The image folders that can be downloaded, and the offer to do so when one is missing."""

import functools
import json
import os
import sys
from pathlib import Path

from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError


@functools.cache
def datasets() -> dict[str, FileSet]:
    """All data sets by name, from `datasets.json`. A set's default place is its `folder`."""
    table = json.loads(Path(__file__).with_name("datasets.json").read_text())
    return {
        name: FileSet(**(entry | {"files": tuple(RemoteFile(*row) for row in entry["files"])}))
        for name, entry in table.items()
    }


def offer_download(folder: Path) -> None:
    """Make sure that `folder` is complete if it is one of the data sets, such as `assets/tum`.

    On a terminal the user is asked whether to download what is missing. Raises `InputError` with
    the command that downloads it where there is no terminal or the answer is no. Any other folder
    is left alone, and so is one in which the user keeps files of their own.
    """
    folder = Path(folder)
    name = _dataset_at(folder)
    if name is None:
        return
    files = datasets()[name]
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [file for file in files.files if file.name not in present]
    own = {name for name in present if not name.startswith(".")} - {f.name for f in files.files}
    if not missing or own:
        return
    lack = f"{folder} has only {len(files.files) - len(missing)} of its {len(files.files)} images"
    if not folder.exists():
        lack = f"{folder} is missing"
    if not _agreed(f"{lack}. Download {files.title}, licence {files.licence}? [y/N] "):
        raise InputError(f"{lack}; run `{_command(name, folder)}` to download what is missing")
    fetch(files, folder)


def _dataset_at(folder: Path) -> str | None:
    """The data set whose default place `folder` names, from whichever working directory."""
    parts = Path(os.path.abspath(folder)).parts
    for name, files in datasets().items():
        place = Path(files.folder).parts
        if parts[-len(place) :] == place:
            return name
    return None


def _command(name: str, folder: Path) -> str:
    default = os.path.abspath(datasets()[name].folder)
    output = "" if os.path.abspath(folder) == default else f" --output {folder}"
    return f"python download_data.py {name}{output}"


def _agreed(question: str) -> bool:
    """Ask on the terminal; where there is none the answer is no."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
