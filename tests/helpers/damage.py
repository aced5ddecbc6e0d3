"""Documents with one thing changed, for hypothesis: what reads them takes them or says why not."""

import copy
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
QUICKLY = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
HOW = st.sampled_from(["remove", "replace", "add"])
Place = tuple[str | int, ...]


def places(document: Any) -> list[Place]:
    """Every field of a document and the first two entries of every list, parts included."""
    if isinstance(document, dict):
        parts = document.items()
    else:
        parts = enumerate(document[:2]) if isinstance(document, list) else ()
    return [(name, *rest) for name, value in parts for rest in [(), *places(value)]]


def changed(document: Any, place: Place, how: str, value: Any) -> Any:
    """A document with one field removed, replaced or joined by another."""
    document = copy.deepcopy(document)
    part = document
    for name in place[:-1]:
        part = part[name]
    if how == "remove":
        del part[place[-1]]
    elif how == "replace":
        part[place[-1]] = value
    elif isinstance(part, list):
        part.append(value)
    else:
        part[f"{place[-1]}_"] = value
    return document
