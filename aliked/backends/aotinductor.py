"""A package that Inductor compiled ahead of time (`.pt2`), loaded without tracing the model."""

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aliked.backends import Spec
from aliked.backends.pytorch import CompiledExtractor, ForwardExtractor
from aliked.errors import InputError, first_line
from aliked.transfer import choose_device


def share_cpp_library() -> None:
    """Let what is loaded from now on use the C++ library that PyTorch uses.

    A compiler that links libstdc++ statically gives every package a copy of its own. Where a
    process has not made the shared one visible, parts of both are mixed, and loading the package
    ends in SIGSEGV or std::bad_cast.
    """
    if sys.platform == "linux":
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)


def load(path: Path, device: torch.device) -> Any:
    """The package as `torch._inductor.aoti_load_package` loads it, at once.

    That function also warns of packages from other machines, and to know the instruction sets of
    this one compiles and runs a probe of each: half a minute where compilers are slow (pytorch
    issue 191715). Raises `InputError` for what is no package.
    """
    from torch._inductor.package import AOTICompiledModel  # here, as it takes seconds to import

    if device.type == "cpu":
        import torchvision  # noqa: F401  (registers an operator that packages for the CPU call)

    index = -1 if device.index is None else device.index
    # Not for one thread only, and with one set of buffers.
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be loaded as a package of AOTInductor ({first_line(error)}); let "
            "measure_timings.py build one on this machine"
        ) from error
    return AOTICompiledModel(loader)


class PackagedForward:
    """The forward pass in a package, for images of the one shape that it was compiled for."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        share_cpp_library()
        self.package = load(path, device)
        noted = self.noted = self.package.get_metadata()
        if "shape" not in noted:
            raise InputError(
                f"{path} does not say what images it is for, so this project did not build it; let "
                "measure_timings.py build one on this machine"
            )
        self.shape = torch.Size(map(int, noted["shape"].split(",")))
        if noted["device"] != device.type:
            raise InputError(
                f"{path} was compiled for {noted['device']}, not for {device.type}; "
                "build it again, or pass another --device"
            )

    def __call__(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Float [B, 3, H, W] to `keypoints`, `descriptors` and `scores`."""
        if batch.shape != self.shape:
            raise InputError(
                f"the input is {list(batch.shape)}, but {self.path} was compiled for "
                f"{list(self.shape)}; build a package for this size"
            )
        return self.package(batch.contiguous(memory_format=torch.channels_last))


class PackageExtractor(ForwardExtractor):
    """A compiled package on the device that it was compiled for."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Return why no package can be compiled here, or None."""
        return CompiledExtractor.unavailable()

    def __init__(self, spec: Spec, name: str = "aotinductor"):
        """Raise `InputError` where there is no package, or it is for another device."""
        if spec.model_path is None or not Path(spec.model_path).is_file():
            raise InputError(
                f"backend {name} needs a package, but there is no file {spec.model_path}; pass "
                "--model_path FILE.pt2, such as measure_timings.py builds"
            )
        device = choose_device(spec.device)
        forward = PackagedForward(Path(spec.model_path), device)
        check_made_for(spec, forward.noted)
        super().__init__(name, device, forward)


def check_made_for(spec: Spec, noted: Mapping[str, str]) -> None:
    """Raise `InputError` where a package holds something else than `spec`; older ones do not say.

    float32 is what is asked for where nothing is said, so that half precision passes for it.
    """
    wanted = {"model": spec.model, "selection": str(spec.selection)}
    if spec.precision != "fp32":
        wanted["precision"] = spec.precision
    for what, value in wanted.items():
        has = noted.get(what, value)
        if has != value:
            raise InputError(
                f"the {what} of {spec.model_path} is {has}, not {value}; ask for {has}, or let "
                "measure_timings.py build another package"
            )
