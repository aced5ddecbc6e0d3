"""What every script does the same way: run its `main`, turn bad input into one sentence."""

import argparse
import sys
from collections.abc import Callable

from aliked.errors import InputError


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line, call `main(args)` and exit.

    Exit status: what `main` returns (None is 0), 2 for an `InputError`, 130 for Ctrl-C.
    """
    args = parser.parse_args()
    try:
        status = main(args) or 0
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
