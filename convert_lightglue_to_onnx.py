#!/usr/bin/env python3
"""Export LightGlue to ONNX; `aliked export-lightglue` of an installed package is the same."""

from aliked import cli
from aliked.commands.export_lightglue import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
