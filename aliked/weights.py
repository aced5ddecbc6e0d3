"""Finding weights, the shipped and the official ones, and making sure they are those asked for."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aliked.configs import get_config
from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError
from aliked.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = Path(__file__).with_name("pretrained")
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

LIGHTGLUE = "aliked_lightglue"  # the matcher's name among the models
LIGHTGLUE_WEIGHTS = FileSet(
    title="the official LightGlue weights for ALIKED",
    licence="Apache-2.0",
    base_url="https://github.com/cvg/LightGlue/releases/download",
    folder="v0.1_arxiv",
    files=(
        RemoteFile(
            f"{LIGHTGLUE}.pth",
            47632827,
            "d975e965b105311a6143194852297dff4f02aea5cc2e10cecfed966ca0e22503",
        ),
    ),
)


def cache_dir() -> Path:
    """The user cache, where downloaded weights are kept: `~/.cache/aliked` if not set otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aliked"


def files_of(name: str) -> FileSet:
    """The official files that model `name` needs; `LIGHTGLUE` is a name, too.

    `InputError` for an unknown model, and for one whose weights are part of the project.
    """
    if name == LIGHTGLUE:
        return LIGHTGLUE_WEIGHTS
    if get_config(name).shipped:
        raise InputError(
            f"the weights of {name} are part of this project ({SHIPPED / name}.pth): there is "
            "nothing to download"
        )
    return replace(WEIGHTS, files=tuple(f for f in WEIGHTS.files if f.name == f"{name}.pth"))


def find_weights(name: str, path: str | Path | None = None) -> Path:
    """The file with the weights of model `name`.

    Of a model that the project trained itself: `path` (the file, or a folder that holds it), which
    may come from another training, or the shipped file. Of an official one, with its SHA-256
    checked: the first that exists of: `path` (the file, or a folder that holds it), the folder
    `$ALIKED_WEIGHTS_DIR`, the user cache. Where there is none it is downloaded into the user cache.
    Raises `InputError` where `path` does not exist, the content is not that of model `name`, or the
    download fails.
    """
    if path is not None:
        path = Path(path).expanduser()
        path = path / f"{name}.pth" if path.is_dir() else path
    if name != LIGHTGLUE and get_config(name).shipped:
        return _not_official(name, path or SHIPPED / f"{name}.pth")
    files = files_of(name)
    (file,) = files.files
    if path is not None:
        return _checked(name, path)
    folders = [cache_dir()]
    if os.environ.get("ALIKED_WEIGHTS_DIR"):
        folders.insert(0, Path(os.environ["ALIKED_WEIGHTS_DIR"]).expanduser())
    for folder in folders:
        if (folder / file.name).exists():
            return _checked(name, folder / file.name)
    fetch(files, cache_dir())
    return cache_dir() / file.name


def describe_weights(name: str, path: str | Path | None = None) -> str:
    """Whose weights of model `name` are used, and where they are, as found by `find_weights`."""
    found = find_weights(name, path)
    if name == LIGHTGLUE or not get_config(name).shipped:
        return f"official weights {found}"
    whose = "this project's own" if found.parent == SHIPPED else "self-trained"
    return f"{whose} weights {os.path.relpath(found)}"


def load_state_dict(name: str, path: str | Path | None = None) -> dict[str, "Tensor"]:
    """The weights of model `name`, on the CPU; looked up as by `find_weights`."""
    import torch  # here, because downloading weights needs no PyTorch

    path = find_weights(name, path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} holds no weights of {name}: PyTorch cannot load it") from error


def _owner(name: str, path: Path) -> tuple[str | None, str]:
    """Which official model's weights a file holds, if any, and its SHA-256."""
    try:
        found = sha256(path)
    except OSError as error:
        raise InputError(
            f"cannot read the weights {path} ({error.strerror}); give the path of {name}.pth or "
            "of a folder that holds it"
        ) from error
    files = WEIGHTS.files + LIGHTGLUE_WEIGHTS.files
    owners = {file.sha256: Path(file.name).stem for file in files}
    return owners.get(found), found


def _not_official(name: str, path: Path) -> Path:
    """`path`, once its SHA-256 has shown that it holds no official weights under another name."""
    owner, _ = _owner(name, path)
    if owner is not None:
        raise InputError(f"{path} is the official {owner} file, not {name}; pass --model {owner}")
    return path


def _checked(name: str, path: Path) -> Path:
    """`path`, once its SHA-256 has shown that it holds the weights of model `name`."""
    owner, found = _owner(name, path)
    if owner is None:
        raise InputError(
            f"{path} is corrupt or not official: its SHA-256 is {found}, not that of {name}; "
            f"run `python download_data.py weights --model {name} --output {path.parent}` "
            "for the official file"
        )
    if owner != name:
        other = "" if LIGHTGLUE in (owner, name) else f"pass --model {owner} or "
        raise InputError(
            f"{path} is the official {owner} file, not {name}; {other}give the weights of {name}"
        )
    return path
