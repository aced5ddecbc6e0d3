#!/usr/bin/env python3
"""Extract the features of many images; `aliked extract` of an installed package is the same."""

from aliked import cli
from aliked.commands.extract import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
