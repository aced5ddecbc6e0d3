"""Numbers from text files, with the line named where there are none."""

from pathlib import Path

import numpy as np

from aliked.errors import InputError


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers, from 1, and words of a text file; empty lines and `#` comments left out."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); give a text file") from error
    split = ((number, line.split("#")[0].split()) for number, line in enumerate(lines, 1))
    found = [(number, words) for number, words in split if words]
    if not found:
        raise InputError(f"{path} has no line that is not a comment; replace it")
    return found


def read_numbers(
    path: Path | str, number: int, words: list[str], count: int, meaning: str
) -> np.ndarray:
    """The `count` finite numbers of a line; `InputError` says what the line should be."""
    try:
        values = np.array(words, np.float64)
    except ValueError:
        values = np.array([np.nan])
    if len(values) != count or not np.isfinite(values).all():
        raise InputError(f"line {number} of {path} is not {meaning}: {' '.join(words)[:60]!r}")
    return values
