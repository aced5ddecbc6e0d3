"""Finding weights, the shipped and the official ones, and making sure they are those asked for."""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aliked.configs import get_config
from aliked.download import FileSet, RemoteFile, fetch
from aliked.errors import InputError, first_line
from aliked.files import as_path, read_file, sha256, shortest

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


MOST_BYTES = 2**28  # of a file of weights; the largest model has 4 MB
SAFETENSORS = ".safetensors"  # files that hold no code; others are PyTorch's
# What a training may put around the weights, and in front of their names.
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "extractor.", "model.")
COUNTER = "num_batches_tracked"  # of batch norms: no weight


def cache_dir() -> Path:
    """The user cache, where downloaded weights are kept: `~/.cache/aliked` if not set otherwise."""
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else _expanded(Path("~/.cache"))) / "aliked"


def _expanded(path: Path) -> Path:
    """`path` with the home folder for `~`."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(
            f"there is no home folder for {path}; set HOME, or XDG_CACHE_HOME to a folder"
        ) from error


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

    `path` is a file, of PyTorch or safetensors, which is taken at its word unless it is another
    official model's, or a folder that holds the file. Without it: of a model that the project
    trained itself, the shipped file; of an official one the first that exists, with its SHA-256
    checked, in `path`, the folder `$ALIKED_WEIGHTS_DIR` and the user cache, into which it is
    downloaded where there is none.
    Raises `InputError` where `path` does not exist, the content is not that of model `name`, or the
    download fails.
    """
    if not isinstance(name, str) or name != LIGHTGLUE:
        get_config(name)
    if path is not None:
        path = _expanded(as_path(path))
        if not path.is_dir():
            return _not_of_another(name, path)
        saved = path / f"{name}{SAFETENSORS}"
        path = path / f"{name}.pth"
        if saved.is_file() and not path.exists():
            return _not_of_another(name, saved)
    if name != LIGHTGLUE and get_config(name).shipped:
        return _not_of_another(name, path or SHIPPED / f"{name}.pth")
    files = files_of(name)
    (file,) = files.files
    if path is not None:
        return _checked(name, path)
    folders = [cache_dir()]
    if os.environ.get("ALIKED_WEIGHTS_DIR"):
        folders.insert(0, _expanded(Path(os.environ["ALIKED_WEIGHTS_DIR"])))
    for folder in folders:
        if (folder / file.name).exists():
            return _checked(name, folder / file.name)
    fetch(files, cache_dir())
    return cache_dir() / file.name


def describe_weights(name: str, path: str | Path | None = None) -> str:
    """Whose weights of model `name` are used, and where they are, as found by `find_weights`."""
    found = find_weights(name, path)
    if _owner(found)[0] == name:
        return f"official weights {found}"
    whose = "this project's own" if found.parent == SHIPPED else "self-trained"
    return f"{whose} weights {shortest(found)}"


def load_state_dict(
    name: str, path: str | Path | None = None, expected: Mapping[str, "Tensor"] | None = None
) -> dict[str, "Tensor"]:
    """Return the weights of model `name`, on the CPU; looked up as by `find_weights`.

    `InputError` names the first tensor that holds NaN or infinity, or that is not as in `expected`,
    which has one of each name and shape that the model needs.
    """
    path = find_weights(name, path)
    state = _unwrapped(_load(name, path))
    for key, tensor in state.items():
        _check_values(path, key, tensor)
    reason = "there are none" if expected is None and not state else _misfit(state, expected or {})
    if reason:
        raise InputError(
            f"{path} does not hold the weights of {name}: {reason}; give the weights of {name}, or "
            "pass --model for those that these are of"
        )
    return state


def _misfit(state: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"]) -> str | None:
    """The first tensor that is missing, too many or of another kind or shape, or None."""
    for key, tensor in expected.items():
        if key.endswith(COUNTER):
            continue
        if key not in state:
            return f"{key} is missing"
        own = state[key]
        if own.shape != tensor.shape:
            return f"{key} is {list(own.shape)} and should be {list(tensor.shape)}"
        if own.is_floating_point() != tensor.is_floating_point():
            return f"{key} is {own.dtype} and should be {tensor.dtype}"
    return next(
        (f"the model has no {key}" for key in state if expected and key not in expected), None
    )


def _load(name: str, path: Path) -> object:
    """What PyTorch makes of a file, without running any code of it."""
    import torch  # here, because downloading weights needs no PyTorch

    data, size = read_file(path, MOST_BYTES), 0
    if path.suffix == SAFETENSORS:
        return _load_safetensors(name, path, data)
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        if size <= MOST_BYTES:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything, down to IndexError
        raise InputError(
            f"{path} holds no weights of {name}: PyTorch cannot load it; give the weights of {name}"
        ) from error
    raise InputError(f"{path} would take {size} bytes; give the weights of {name}")


def _load_safetensors(name: str, path: Path, data: bytes) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{path} holds no weights of {name}: it is no whole file of safetensors "
            f"({first_line(error)}); give the weights of {name}"
        ) from error


def _unwrapped(state: object) -> dict[str, "Tensor"]:
    """The tensors of a file by the names that they have in the model."""
    import torch

    for wrapper in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        return {}
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    for prefix in PREFIXES:
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        tensors = own or tensors
    return tensors


def _check_values(path: Path, key: str, tensor: "Tensor") -> None:
    """Refuse what would end the process: deformable convolution reads where offsets point."""
    import torch

    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{path} holds {key} without its values in order; save it as float32")
    # Types of eight bits have no `isfinite`, and what float32 does not hold is infinite there.
    values = tensor.float() if tensor.is_floating_point() else tensor
    if not torch.isfinite(values).all():
        raise InputError(f"{path} holds NaN or infinity in {key}; give weights of finite numbers")
    if key.endswith("running_var") and (values < 0).any():
        raise InputError(f"{path} holds a negative variance in {key}; give other weights")


def _owner(path: Path) -> tuple[str | None, str]:
    """Which official model's weights a file holds, if any, and its SHA-256."""
    found = sha256(path, MOST_BYTES)
    files = WEIGHTS.files + LIGHTGLUE_WEIGHTS.files
    owners = {file.sha256: Path(file.name).stem for file in files}
    return owners.get(found), found


def _not_of_another(name: str, path: Path) -> Path:
    """`path`, once its SHA-256 has shown that it holds no other official model's weights."""
    owner, _ = _owner(path)
    if owner not in (None, name):
        other = "" if LIGHTGLUE in (owner, name) else f"pass --model {owner} or "
        raise InputError(
            f"{path} is the official {owner} file, not {name}; {other}give the weights of {name}"
        )
    return path


def _checked(name: str, path: Path) -> Path:
    """`path`, once its SHA-256 has shown that it holds the official weights of model `name`."""
    owner, found = _owner(_not_of_another(name, path))
    if owner is None:
        raise InputError(
            f"{path} is corrupt or not official: its SHA-256 is {found}, not that of {name}; "
            f"run `python download_data.py weights --model {name} --output {path.parent}` "
            "for the official file"
        )
    return path
