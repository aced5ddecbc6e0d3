#!/usr/bin/env python3
"""Stage 1: export ALIKED to ONNX; `aliked export` of an installed package is the same."""

from aliked import cli
from aliked.commands.export import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
