#!/usr/bin/env python3
"""Stage 4: what is lost between two runtimes.

`aliked compare` of an installed package is the same.
"""

from aliked import cli
from aliked.commands.compare import main, parser

if __name__ == "__main__":
    cli.run(main, parser())
