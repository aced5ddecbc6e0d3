#!/usr/bin/env python3
"""Stage 5: what the features of any runtime and precision are worth, beside their speed."""

import argparse

from aliked import cli
from evaluation.homography import add_homography_options, run_homography
from evaluation.pose import add_pose_options, run_pose
from evaluation.sequences import add_sequences_options, run_sequences

TASKS = {
    "homography": (
        "images of planes with known homographies",
        add_homography_options,
        run_homography,
    ),
    "pose": ("pairs with known relative pose", add_pose_options, run_pose),
    "sequences": (
        "image sequences without ground truth",
        add_sequences_options,
        run_sequences,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    tasks = p.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, (what, add_options, _) in TASKS.items():
        add_options(tasks.add_parser(name, help=what, description=f"Evaluate on {what}."))
    return p


def main(args: argparse.Namespace) -> int:
    """Evaluate on one data set, then print and write the tables."""
    _, _, run = TASKS[args.task]
    return run(args)


if __name__ == "__main__":
    cli.run(main, parser())
