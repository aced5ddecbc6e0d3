"""Arrays of Python objects from `.npz` files of the internet, without running what is in them.

`numpy.load(allow_pickle=True)` runs any code that a file names. Here only what rebuilds arrays,
numbers, tuples and strings is let through.
"""

import pickle
import zipfile
from pathlib import Path

import numpy as np

from aliked.errors import InputError

MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
REBUILD = {"_reconstruct", "scalar", "ndarray", "dtype"}


class ArrayUnpickler(pickle.Unpickler):
    """Rebuilds arrays and refuses everything else."""

    def find_class(self, module: str, name: str):
        """The few functions that arrays are rebuilt with; `UnpicklingError` for others."""
        if module in MODULES and name in REBUILD:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how older versions write bytes
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Some arrays of an `.npz` file; `InputError` where it is damaged, lacks one or runs code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _read_array(archive, f"{name}.npy") for name in names}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        reason = error
    except (pickle.UnpicklingError, AttributeError, ImportError) as error:
        reason = error
    raise InputError(f"cannot read {path} ({reason}); fetch it again from its home")


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        major, _ = np.lib.format.read_magic(file)
        read_header = {
            1: np.lib.format.read_array_header_1_0,
            2: np.lib.format.read_array_header_2_0,
        }[major]
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            return ArrayUnpickler(file).load().reshape(shape)
        return np.frombuffer(file.read(), dtype).reshape(shape)
