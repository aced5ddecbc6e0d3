"""Files from outside opened with care, and our own written whole or not at all."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aliked.errors import InputError, shown

PACKAGE = Path(__file__).parent
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".hpp", ".h", ".json")
SANE_BYTES = 2**30  # of a file that is read whole
MOST_NAME_BYTES = 255  # of file systems
SCRATCH = ".aliked-scratch-"  # how the names of temporary folders begin


def as_path(path: object) -> Path:
    """Return `path` as a `Path`; `InputError` where no file or folder can have such a name."""
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{shown(path)} is no path; give that of a file or folder")
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name or (
        len(name) > MOST_NAME_BYTES and max(map(len, name.split(b"/"))) > MOST_NAME_BYTES
    ):
        raise InputError(f"{shown(str(path))} cannot be the name of a file; give a shorter path")
    return path if isinstance(path, Path) else Path(path)


def real_path(path: Path) -> Path:
    """`path` without links, as far as they lead anywhere; `Path.resolve` raises at a circle."""
    return Path(os.path.realpath(path))


def shortest(path: Path) -> Path:
    """`path` as a person would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def sha256(path: Path, most_bytes: int | None = None) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits; `InputError` as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path, most_bytes) as file:
        # Not by `hashlib.file_digest`, all that building and running an engine would need a newer
        # Python for than JetPack 6 has, 3.10.
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def code_digest(*others: Path, package: Path = PACKAGE) -> str:
    """Return a hash of this package's sources and `others`: other code makes other files.

    All of them decide something that is kept: an engine, a reference, features.
    """
    digest = hashlib.sha256()
    sources = (path for path in package.rglob("*") if path.suffix in SOURCES and path.is_file())
    for path in sorted(sources) + sorted(others):
        name = path.relative_to(package) if path.is_relative_to(package) else path.name
        digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def open_regular(path: Path, most_bytes: int | None = SANE_BYTES) -> Iterator[BinaryIO]:
    """Open a file from outside for reading.

    `InputError` where it cannot be read, is no regular file (a folder, a device, a FIFO, which
    never end), or is larger than `most_bytes` (None: of any size).
    """
    path = as_path(path)
    with _reading(path):
        descriptor, _ = _open_regular(path, most_bytes)
        with open(descriptor, "rb") as file:
            yield file


def _open_regular(path: Path, most_bytes: int | None) -> tuple[int, int]:
    """A descriptor, and how many bytes the file has."""
    # Without waiting for the other end of a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _check_regular(path, status, most_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path} ({reason}); give another file") from error


def _check_regular(path: Path, status: os.stat_result, most_bytes: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise InputError(f"{path} is {kind}; give a file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise InputError(
            f"{path} has {status.st_size} bytes, which is more than such a file can have "
            f"({most_bytes}); give another file"
        )


def read_file(path: Path, most_bytes: int = SANE_BYTES, first: int | None = None) -> bytes:
    """Return the content of a file from outside, or its `first` bytes.

    `InputError` as `open_regular` raises it.
    """
    path = as_path(path)
    with _reading(path):
        # As few calls of the system as can be: each lets other threads of Python go first.
        descriptor, size = _open_regular(path, most_bytes)
        try:
            if first is not None:
                return os.read(descriptor, first)
            data = os.read(descriptor, size + 1)
            # It has grown, tells no size, or has more than a call reads.
            while len(data) != size and (more := os.read(descriptor, max(size, 2**20))):
                data += more
            return data
        finally:
            os.close(descriptor)


def read_text(path: Path) -> str:
    """Return the text of a file from outside; `InputError` also where it is not UTF-8.

    Without the byte order mark that editors on Windows begin it with.
    """
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); give another file") from error


def writable_folder(folder: Path) -> Path:
    """Make `folder` if it is missing; raise `InputError` where nothing can be written into it."""
    with _writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def check_writable(folder: Path) -> None:
    """Raise `InputError` where `folder` could not be made or written into; nothing is made yet."""
    with _writing_into(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass


def check_outputs(files: Iterable[Path], option: str) -> None:
    """Raise `InputError` where one of `files` has a name that no file can be written to.

    One that is too long, or that a folder or a device has; `option` gives other names.
    """
    for file in files:
        if len(os.fsencode(file.name)) > MOST_NAME_BYTES:
            raise InputError(f"the name {file.name} is too long; give a shorter {option}")
        if file.exists() and not file.is_file():
            raise InputError(f"{file} is not the name of a file; give another {option}")


@contextlib.contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write into {folder} ({error.strerror}); choose another output folder"
        ) from error


def remove_files(folder: Path, *patterns: str) -> None:
    """Remove the files of these names in `folder`, which an older run has left there."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        path.unlink(missing_ok=True)


def check_kept(sources: Iterable[Path], folder: Path, *patterns: str) -> None:
    """Raise `InputError` where `remove_files` would remove what is still to be read.

    `sources` are the files that are read, and folders of them.
    """
    read, here = set(map(real_path, sources)), real_path(folder)
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if not read.isdisjoint((here, real_path(path))):
            raise InputError(
                f"{path.name} in {folder} would be removed as an older run's, and is among what is "
                "to be read; give another --output"
            )


@contextlib.contextmanager
def scratch_file(path: Path) -> Iterator[Path]:
    """Yield a new temporary file beside `path`, of the same suffix; it is gone at the end."""
    path = Path(path)
    writable_folder(path.parent)
    # The suffix stays last: encoders such as OpenCV's choose the format by it. The file is made
    # here, by a name that nobody can have put a link at.
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem[:40]}.", suffix=f".partial{path.suffix}", dir=path.parent
    )
    os.fchmod(descriptor, 0o666 & ~_umask())
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@functools.cache
def _umask() -> int:
    """What this process takes from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a new temporary folder in `parent`; it is gone at the end, as are those of the killed.

    Each is locked while it is in use. A process that is killed lets go of the lock and leaves the
    folder, which the next one to make such a folder there removes.
    """
    for left in writable_folder(parent).glob(f"{SCRATCH}*"):
        with _lock(left, wait=False) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(dir=parent, prefix=SCRATCH) as name, _lock(Path(name)):
            if os.path.isdir(name):  # another process has not removed it before it was locked
                yield Path(name)
                return


@contextlib.contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder; yields whether it could be had: not all file systems have one."""
    with contextlib.ExitStack() as stack:
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(folder, flags)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it on success, removed on failure."""
    with scratch_file(path) as partial:
        yield partial
        os.replace(partial, path)


MOST_PIECES = 1024  # IOV_MAX of Linux


def write_at(descriptor: int, offset: int, *pieces: Any, alone: bool = False) -> None:
    """Write bytes, or arrays', into an open file, one piece behind the other in as few calls.

    `alone`: in turns with others who do, see `in_turn`.
    """
    views = (memoryview(piece) for piece in pieces)
    left = [view.cast("B") for view in views if view.nbytes]  # one without bytes cannot be
    with in_turn(descriptor) if alone else contextlib.nullcontext():
        _write_all(descriptor, offset, left)


def _write_all(descriptor: int, offset: int, left: list[memoryview]) -> None:
    while left:
        written = os.pwritev(descriptor, left[:MOST_PIECES], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


KEEP_SIZE = 1  # falloc.h


def allocate(descriptor: int, offset: int, length: int) -> None:
    """Have space for what an open file is to get, where there is plenty; its size stays.

    Python's own `posix_fallocate` would write where the file system cannot, and what others write
    meanwhile would be lost.
    """
    with contextlib.suppress(AttributeError, OSError):  # no Linux; a file system that cannot
        system = os.fstatvfs(descriptor)
        if length < system.f_bavail * system.f_frsize // 4:
            _fallocate()(descriptor, KEEP_SIZE, offset, length)


@functools.cache
def _fallocate() -> Any:
    function = ctypes.CDLL(None).fallocate64
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


@contextlib.contextmanager
def in_turn(descriptor: int) -> Iterator[None]:
    """Have an open file to oneself, among those who ask, where the file system can tell.

    It protects nothing: Linux itself lets one process at a time write into a file, but the others
    keep a core each busy until it is their turn. Here they sleep. One that is killed lets go of it.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 whatever the locale, whole or not at all.

    Of the name of a file, what is not UTF-8 becomes an escape such as `udcff` behind a backslash.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: dict) -> None:
    """Write `data` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[BinaryIO]:
    """Open the file `path` for appending, made if it is missing, once nobody else holds it.

    `InputError` where `path` is a link or no regular file: what lies behind it is not ours to
    write to. `BlockingIOError` where somebody holds it and `wait` is False.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            reason = "it is a link" if Path(path).is_symlink() else error.strerror
            raise InputError(f"cannot write to {path} ({reason}); remove it") from error
        with open(descriptor, "ab") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise InputError(f"{path} is no regular file of its own; remove it")
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last holder may have renamed or deleted it: then a new one has to be opened.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield file
                return


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep other runs from writing to an output; `InputError` where one does.

    Where the file system has no locks nobody is kept from it.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError as error:
            raise InputError(
                f"another run is writing to {path}; wait for it, or give another --output"
            ) from error
        except OSError:
            pass
        stack.callback(lock.unlink, missing_ok=True)
        yield
