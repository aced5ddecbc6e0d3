"""Options that every kind of evaluation has."""

import argparse
from pathlib import Path

from aliked.backends import Spec
from aliked.configs import CONFIGS
from aliked.options import add_device_option, add_selection_options, add_weights_option

# Half precision where it is fast: PyTorch's on a CPU takes minutes an image.
SYSTEMS = {
    "cuda": ["pytorch:fp32", "pytorch:fp16", "sift", "orb"],
    "cpu": ["pytorch:fp32", "onnxruntime-cpu:fp16", "sift", "orb"],
}


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What is compared, how it selects keypoints, and where everything goes."""
    add_system_options(parser.add_argument_group("what is compared"))
    add_selection_options(parser.add_argument_group("keypoints"))
    add_file_options(parser.add_argument_group("files"))


def add_system_options(group: argparse._ArgumentGroup) -> None:
    """Runtimes with their precisions, models, baselines; where they run."""
    group.add_argument(
        "--systems",
        nargs="+",
        metavar="NAME",
        help="BACKEND:PRECISION, each with every model, or a baseline: sift, orb (default: "
        f"{' '.join(SYSTEMS['cuda'])}; without a GPU {' '.join(SYSTEMS['cpu'])})",
    )
    group.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[Spec.model],
        metavar="NAME",
        help=f"of {', '.join(CONFIGS)}; all (default: {Spec.model})",
    )
    add_weights_option(group)
    group.add_argument(
        "--model_path",
        type=Path,
        metavar="FILE",
        help="model file for the backends that run one of its kind (default: one made for every "
        "image size)",
    )
    add_device_option(group)


def add_file_options(group: argparse._ArgumentGroup) -> None:
    """Records, features, timings, pictures."""
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="records, a line per system; tables, plots and pictures go into a folder of the same "
        "name (default: output/TASK-DATE-TIME.jsonl)",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the systems that --output lacks"
    )
    group.add_argument(
        "--features",
        type=Path,
        default=Path("output/features"),
        metavar="DIR",
        help="where extracted features are kept, HDF5 (default: %(default)s)",
    )
    group.add_argument(
        "--timings",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="records of measure_timings.py, for the columns ms and MiB",
    )
    group.add_argument(
        "--worst",
        type=int,
        default=3,
        metavar="N",
        help="worst pairs of each system to draw (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of robust estimation and of the bootstrap (default: %(default)s)",
    )
