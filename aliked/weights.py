"""Finding the official weights and making sure that they are the ones asked for."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aliked.configs import get_config
from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError
from aliked.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = FileSet(
    title="the official ALIKED weights",
    licence="BSD-3-Clause",
    base_url="https://github.com/Shiaoming/ALIKED/raw/main",
    folder="models",
    files=(
        RemoteFile(
            "aliked-t16.pth",
            794859,
            "56782336919db220144a884e710e2b6af13b3b8f8da15b915a239078ab471085",
        ),
        RemoteFile(
            "aliked-n16.pth",
            2738091,
            "5be8704840ed662d9d8c561bf7279c222092674e7eb05fd0feab94899e9d82f2",
        ),
        RemoteFile(
            "aliked-n16rot.pth",
            2738325,
            "ddf3abbf38e86f6a74540d214e1a9712c54b2d8551abc864542199f2347d7332",
        ),
        RemoteFile(
            "aliked-n32.pth",
            3946667,
            "055283fd1624d3ab46a05c3b617b1a79a3f28d1f551737eef2d653e8c8232890",
        ),
    ),
)


def cache_dir() -> Path:
    """The user cache, where downloaded weights are kept: `~/.cache/aliked` if not set otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aliked"


def files_of(name: str) -> FileSet:
    """The part of `WEIGHTS` that model `name` needs; `InputError` for an unknown model."""
    get_config(name)
    return replace(WEIGHTS, files=tuple(f for f in WEIGHTS.files if f.name == f"{name}.pth"))


def find_weights(name: str, path: str | Path | None = None) -> Path:
    """The file with the official weights of model `name`, its SHA-256 checked.

    The first that exists of: `path` (the file, or a folder that holds it), the folder
    `$ALIKED_WEIGHTS_DIR`, the user cache. Where there is none it is downloaded into the user cache.
    Raises `InputError` where `path` does not exist, the content is not that of model `name`, or the
    download fails.
    """
    files = files_of(name)
    (file,) = files.files
    if path is not None:
        path = Path(path).expanduser()
        return _checked(name, path / file.name if path.is_dir() else path)
    folders = [cache_dir()]
    if os.environ.get("ALIKED_WEIGHTS_DIR"):
        folders.insert(0, Path(os.environ["ALIKED_WEIGHTS_DIR"]).expanduser())
    for folder in folders:
        if (folder / file.name).exists():
            return _checked(name, folder / file.name)
    fetch(files, cache_dir())
    return cache_dir() / file.name


def load_state_dict(name: str, path: str | Path | None = None) -> dict[str, "Tensor"]:
    """The official weights of model `name`, on the CPU; looked up as by `find_weights`."""
    import torch  # here, because downloading weights needs no PyTorch

    return torch.load(find_weights(name, path), map_location="cpu", weights_only=True)


def _checked(name: str, path: Path) -> Path:
    """`path`, once its SHA-256 has shown that it holds the weights of model `name`."""
    try:
        found = sha256(path)
    except OSError as error:
        raise InputError(
            f"cannot read the weights {path} ({error.strerror}); give the path of the official "
            f"{name}.pth or of a folder that holds it"
        ) from error
    owners = {file.sha256: Path(file.name).stem for file in WEIGHTS.files}
    owner = owners.get(found)
    if owner is None:
        raise InputError(
            f"{path} is corrupt or not official: its SHA-256 is {found}, not that of {name}; "
            f"run `python download_data.py weights --model {name} --output {path.parent}` "
            "for the official file"
        )
    if owner != name:
        raise InputError(
            f"{path} is the official {owner} file, not {name}; pass --model {owner} "
            f"or the weights of {name}"
        )
    return path
