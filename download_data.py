#!/usr/bin/env python3
"""Official weights and sets of images; `aliked download` of an installed package is the same."""

from aliked import cli
from aliked.commands.download import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
