"""Downloads of files of known content: resumed where they broke off, checked, then renamed."""

import functools
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from aliked.errors import InputError
from aliked.files import locked, real_path, sha256, writable_folder

TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 1 << 16  # bytes


@dataclass(frozen=True)
class RemoteFile:
    """One file and how to recognise it."""

    name: str
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class FileSet:
    """Files that lie in one folder of a server and share a licence."""

    title: str
    licence: str
    base_url: str
    folder: str  # below `base_url`
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def url(self, file: RemoteFile) -> str:
        """Where one file of the set is."""
        return f"{self.base_url.rstrip('/')}/{self.folder}/{file.name}"


def is_complete(path: Path, file: RemoteFile) -> bool:
    """Whether `path` holds the content of `file`."""
    return path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256


def fetch(files: FileSet, folder: Path) -> list[Path]:
    """Download the files of a set that `folder` lacks, or holds with another content.

    A download that breaks off leaves `.NAME.partial` in `folder`; the next call goes on from
    there. A file gets its name only after its checksum has been found right. Returns the paths
    of the downloaded files. Raises `InputError` where a file cannot be had or has a wrong checksum.
    """
    writable_folder(folder)
    missing = [file for file in files.files if not is_complete(folder / file.name, file)]
    if not missing:
        return []
    total = sum(file.size for file in missing)
    with tqdm(total=total, desc=files.folder, unit="B", unit_scale=True, disable=None) as bar:
        for file in missing:
            bar.set_postfix_str(file.name, refresh=False)
            _fetch_file(files.url(file), folder / file.name, file, bar)
    return [folder / file.name for file in missing]


def _fetch_file(url: str, path: Path, file: RemoteFile, bar: tqdm) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with locked(partial) as output:
        if is_complete(path, file):  # another process was faster
            partial.unlink()
            bar.update(file.size)
            return
        try:
            _append(url, output, file.size, bar)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if output.tell() == 0 or isinstance(error, TooLong):
                partial.unlink()
            raise InputError(
                f"cannot download {path.name} from {url} ({_reason(error)}); run the same command "
                f"again to go on, or put the file into the folder {real_path(path.parent)} yourself"
            ) from error
        _check(partial, file, url)
        os.replace(partial, path)


class TooLong(ValueError):
    """A server sends more than the file has."""

    def __init__(self, size: int):
        super().__init__(f"it sends more than the {size} bytes that this file has")


def _append(url: str, output: BinaryIO, size: int, bar: tqdm) -> None:
    """Append to a partial file what it lacks of `url`; `TooLong` where there is more."""
    start = output.seek(0, os.SEEK_END)
    if start >= size:  # broke off between the last byte and the checksum
        bar.update(size)
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server ignores ranges: begin again
            output.truncate(start)
            output.seek(start)
        bar.update(start)
        # As much as this server promises: fewer bytes of the file are for the checksum to find.
        end = start + int(response.headers.get("Content-Length", size - start))
        if end > size:
            raise TooLong(size)
        while chunk := response.read(CHUNK):
            if output.tell() + len(chunk) > size:
                raise TooLong(size)
            output.write(chunk)
            bar.update(len(chunk))
    output.flush()
    if output.tell() < end:
        raise ConnectionError(f"the connection closed after {output.tell()} of {end} bytes")


def _check(partial: Path, file: RemoteFile, url: str) -> None:
    found = sha256(partial)
    if found != file.sha256:
        partial.unlink()
        raise InputError(
            f"what {url} sent is not {file.name}: its SHA-256 should be {file.sha256} but is "
            f"{found}; it has been deleted, so run the same command again or use another source"
        )


def _reason(error: Exception) -> str:
    """Why a download failed, in the words of the innermost error."""
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return str(error) or type(error).__name__


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
