#!/usr/bin/env python3
"""Look at matches; `aliked match` of an installed package is the same."""

from aliked import cli
from aliked.commands.match import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
