"""`get_patches` in C++ and CUDA, as the operator `torch.ops.aliked.get_patches`.

pip installs this folder as the package `aliked_custom_ops`, with the compiled library in it, and
importing that registers the operator. In the project's own tree there is no library until
`toolchain.build` compiles it.
"""

import importlib.util

import torch  # noqa: F401  the library needs PyTorch's own libraries in the process

if importlib.util.find_spec(f"{__name__}._library"):
    from . import _library  # noqa: F401  registers the operator
    from .binding import DEVICES as DEVICES
    from .binding import get_patches as get_patches
