#!/usr/bin/env python3
"""Stage 2: build a TensorRT engine; `aliked build` of an installed package is the same."""

from aliked import cli
from aliked.commands.build import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
