"""Download the official weights and the image folders: checksums checked, resumable.

Weights go into the user cache, where every script finds them; images into `assets/`. HPatches, of
1.3 GB, is not part of `all`.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from aliked import hpatches
from aliked.cli import Parser
from aliked.configs import OFFICIAL
from aliked.download import FileSet, datasets, fetch
from aliked.errors import InputError
from aliked.weights import LIGHTGLUE, WEIGHTS, cache_dir, files_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    names = ["weights", *datasets(), "all", "hpatches"]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"weights of one model only: {', '.join((*OFFICIAL, LIGHTGLUE))}, the matcher's",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the files (default: the user cache for weights, assets/NAME for images)",
    )
    parser.add_argument(
        "--base_url",
        metavar="URL",
        help="a mirror, with the same folders below it (default: each set's public home)",
    )
    return parser


def file_sets(args: argparse.Namespace) -> dict[str, FileSet]:
    """What the command line asks for, by name."""
    weights = files_of(args.model) if args.model else WEIGHTS
    usual = {"weights": weights} | datasets()
    known = usual | {"hpatches": hpatches.ARCHIVE}
    wanted = {name: known[name] for name in args.names if name != "all"}
    wanted |= usual if "all" in args.names else {}
    if args.model and "weights" not in wanted:
        raise InputError("--model chooses among the weights; add `weights` or leave it out")
    if args.output and len(wanted) > 1:
        raise InputError("--output takes the files of one name; run the command once for each")
    if args.base_url:
        return {name: replace(files, base_url=args.base_url) for name, files in wanted.items()}
    return wanted


def main(args: argparse.Namespace) -> None:
    """Download what is missing of everything asked for."""
    for name, files in file_sets(args).items():
        folder = args.output or default_folder(name, files)
        print(f"{name}: {files.title}, {files.size / 1e6:.1f} MB; licence {files.licence}")
        if name == "hpatches":
            written, total = hpatches.download(folder, files), hpatches.NUM_FILES
        else:
            written, total = len(fetch(files, folder)), len(files.files)
        if written:
            print(f"{name}: downloaded {written} of {total} files to {folder}")
        else:
            print(f"{name}: already complete in {folder}")


def default_folder(name: str, files: FileSet) -> Path:
    """Where the scripts look for a set."""
    folders = {"weights": cache_dir(), "hpatches": Path("assets")}
    return folders.get(name, Path(files.folder))
