"""ALIKED keypoints and descriptors, on PyTorch and every runtime that the model converts to.

    from aliked import ALIKED, load_image, match_mutual

Importing this package imports nothing else: each name is fetched when it is first asked for, so
that PyTorch is loaded for a model, OpenCV for an image, and neither for `aliked --help`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aliked.backends import Spec, create_extractor
    from aliked.errors import InputError
    from aliked.features import Features
    from aliked.images import load_image
    from aliked.lightglue import LightGlue
    from aliked.matching import Matches, match_mutual
    from aliked.model import ALIKED

__all__ = [
    "ALIKED",
    "Features",
    "InputError",
    "LightGlue",
    "Matches",
    "Spec",
    "create_extractor",
    "load_image",
    "match_mutual",
]
_MODULES = {
    "ALIKED": "model",
    "Features": "features",
    "InputError": "errors",
    "LightGlue": "lightglue",
    "Matches": "matching",
    "Spec": "backends",
    "create_extractor": "backends",
    "load_image": "images",
    "match_mutual": "matching",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
