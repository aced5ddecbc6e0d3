#!/usr/bin/env python3
"""Stage 5: what the features of any runtime and precision are worth, beside their speed."""

import argparse

from aliked import cli
from evaluation.records import TASKS
from evaluation.runner import add_shared_options, run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.Parser(description=__doc__)
    names = f"{{{','.join(TASKS)}}}"  # in the error where none is given, too
    tasks = p.add_subparsers(dest="task", required=True, metavar=names)
    for name, task in TASKS.items():
        options = tasks.add_parser(name, help=task.help, description=f"Evaluate on {task.help}.")
        task.add_options(options)
        add_shared_options(options)
    return p


def main(args: argparse.Namespace) -> int:
    """Evaluate on one data set, then print and write the tables."""
    return run(args, TASKS[args.task].from_options(args))


if __name__ == "__main__":
    cli.run(main, parser())
