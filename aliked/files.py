"""Files written whole or not at all, and the manifests that say what they were made from."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aliked.errors import InputError


def sha256(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable_folder(folder: Path) -> Path:
    """Make `folder` if it is missing; raise `InputError` where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {folder} ({error.strerror}); choose another output folder"
        ) from error
    return folder


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix; remove what is there at the end."""
    path = Path(path)
    writable_folder(path.parent)
    # The suffix stays last: encoders such as OpenCV's choose the format by it.
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it on success, removed on failure."""
    with scratch_file(path) as partial:
        yield partial
        os.replace(partial, path)


def write_json(path: Path, data: dict) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n")
