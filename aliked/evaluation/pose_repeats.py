"""Robust estimation repeated: its random numbers change a pair more than half precision does."""

import argparse
import zlib

import numpy as np

from aliked.errors import InputError

SEED_LIMIT = 2**31  # what both libraries take


def add_repeats_option(parser: argparse.ArgumentParser) -> None:
    """How often to estimate."""
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="robust estimations of each pair, all of them counted: their random numbers change "
        "more than precision does (default: %(default)s)",
    )


def check_repeats(repeats: int) -> None:
    """Raise `InputError` unless there is something to estimate."""
    if repeats < 1:
        raise InputError(f"--repeats {repeats} estimates nothing; give at least 1")


def seeds_of(name: str, seed: int, repeats: int) -> list[int]:
    """A seed for every repeat of a pair.

    Every pair has its own: with the same random numbers for all of them a lucky seed is lucky in
    many pairs at once, which no interval over the pairs accounts for.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return random.integers(0, SEED_LIMIT, repeats).tolist()
