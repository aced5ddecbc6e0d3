"""What every script does the same way: run its `main`, turn bad input into one sentence.

It knows nothing of models; the options that several scripts share are in `aliked.options`.
"""

import argparse
import contextlib
import errno
import io
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from aliked.errors import EXTRAS, REQUIRED, InputError, missing_package, shown
from aliked.files import shortest


class Parser(argparse.ArgumentParser):
    """A command line whose faults are `InputError`s: one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(message)


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main(args)` and exit.

    Exit status: what `main` returns (None is 0), 2 with one sentence for an `InputError`, a missing
    dependency, a full disk, too little memory or the name of a file that cannot be written, 128 + N
    where signal N ended it (130 for Ctrl-C, 141 where nobody reads the output any more).
    """
    stop_by_exception()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main(parser.parse_args(arguments)) or 0
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = _status_of(error, parser.prog)
        if status is None:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        status = _status_of(error, parser.prog)
        # What could not be written would be tried, and complained about, once more at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def command_line() -> str:
    """This process's command as it can be typed again, for manifests and records.

    Of a path outside the working directory only the name is told, as in `.../weights`: the folders
    above it are of this machine, and records are published.
    """
    program, *words = sys.argv
    words = ["aliked", *words] if is_command() else ["python", program, *words]
    return shlex.join(map(_without_folders, words))


def is_command() -> bool:
    """Whether this process is the command `aliked`, not a script of the checkout."""
    return Path(sys.argv[0]).name in ("aliked", "__main__.py")


def _without_folders(word: str) -> str:
    """A word of a command line, such as `FILE` or `--output=FILE`, without this machine's folders.

    Paths that are relative stay as they are.
    """
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        short = shortest(path)
        value = str(Path("...", path.name) if short.is_absolute() else short)
    return f"{option}{equals}{value}"


def stop_by_exception() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: what is half-written is removed."""

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, stop)


@contextlib.contextmanager
def keep_sigterm() -> Iterator[None]:
    """Keep what SIGTERM does, whatever a library that is started meanwhile makes of it.

    Some take it for a crash: they print where they are, and abort the process.
    """
    stop = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if stop is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


def _end_before_run(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """End as `run` does where importing is interrupted or finds a package missing."""
    if issubclass(kind, KeyboardInterrupt | ModuleNotFoundError):
        status = _status_of(error, Path(sys.argv[0]).name)
        if status is not None:
            sys.exit(status)
    sys.__excepthook__(kind, error, trace)


# Scripts import this module first, and what they import after it takes seconds.
sys.excepthook = _end_before_run


def _status_of(error: BaseException, prog: str) -> int | None:
    """Say in a sentence what ended the program from outside; the status, None where nothing did."""
    if isinstance(error, KeyboardInterrupt):
        print(f"{prog}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return 128 + signal.SIGPIPE
    sentence = str(error) if isinstance(error, InputError) else _outside(error)
    if sentence is None:
        return None
    print(f"{prog}: error: {sentence}", file=sys.stderr)
    return 2


OUT_OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "Insufficient memory")


def _outside(error: Exception) -> str | None:
    """The sentence for an error of the machine, whichever library it comes through."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return missing_package(error) if package in {*EXTRAS, *REQUIRED} else None
    if isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason:
        before, after = error.object[: error.start], error.object[error.start :]
        name = before.rpartition("\n")[2] + after.partition("\n")[0]
        return f"the name of a file is not UTF-8 ({shown(name)}); rename it"
    text = " ".join(str(error).split())
    place = getattr(error, "filename", None) or ""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return f"the disk {place and f'of {place} '}is full; make room and run the same again"
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        reason = text[:200] or type(error).__name__
        return f"there is not enough memory ({reason}); give smaller images"
    if isinstance(error, OSError):
        return f"{place or 'the output'}: {error.strerror or text}; give another path"
    return None


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of an option that is a finite number from `low`, or `above` it, to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or math.isinf(value) or (above and value == low):
            least = f"above {low:g}" if above else f"from {low:g}"
            most = "" if math.isinf(high) else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]} is no number {least}{most}")
        return value

    return parse


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of an option that is a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            most = "" if high == 2**31 - 1 else f", at most {high}"
            raise argparse.ArgumentTypeError(
                f"{text[:40]} is no whole number to go by; give at least {low}{most}"
            )
        return value

    return parse


positive, share, cosine = number(0, above=True), number(0, 1), number(-1, 1)
seed = whole(0, 10**9)  # every library takes these, and some more from each on


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a Markdown table, the first `left` columns aligned to the left."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
