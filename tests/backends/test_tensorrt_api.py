"""Every name of TensorRT that the project spells is one of the real bindings, in every version.

`tests/helpers/tensorrt_names.json` holds the members of the classes that are in use, read from
the bindings of 10.3 (JetPack 6), 10.13, 10.16 and 11.4; those of TensorRT for RTX are asked
themselves where it is installed. Code that no test runs cannot use a name that a version lacks.
"""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
NAMES = {
    version: {name: set(members.split()) for name, members in classes.items()}
    for version, classes in json.loads(
        (PROJECT / "tests" / "helpers" / "tensorrt_names.json").read_text()
    ).items()
}
FILES = [
    path
    for path in [*PROJECT.glob("*.py"), *(PROJECT / "aliked").rglob("*.py")]
    if re.search(r"\b_?(trt|rtx)\b", path.read_text())  # others spell none of its names
]


def dotted(node):
    """ "trt.BuilderFlag.FP16" of an attribute chain, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def annotation_of(argument):
    """The dotted name that a parameter is annotated with, quoted or not."""
    note = argument.annotation
    if isinstance(note, ast.Constant) and isinstance(note.value, str):
        note = ast.parse(note.value, mode="eval").body
    return dotted(note) if note is not None else ""


@functools.cache
def names_used(source):
    """Names below `trt` that some code spells, members of annotated parameters among them."""
    tree = ast.parse(source.replace("self._trt.", "trt."))
    found = {name for node in ast.walk(tree) if (name := dotted(node)).startswith("trt.")}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for argument in function.args.args:
            kind = annotation_of(argument)
            if not kind.startswith("trt."):
                continue
            members = {name for node in ast.walk(function) if (name := dotted(node))}
            prefix = f"{argument.arg}."
            found |= {kind + "." + m[len(prefix) :] for m in members if m.startswith(prefix)}
    return {name.removeprefix("trt.") for name in found}


@functools.cache
def names_asked_for(source):
    """Names that some code asks for with `hasattr` before it uses them."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        re.sub(r"^(trt|rtx)\.", "", f"{dotted(call.args[0])}.{call.args[1].value}")
        for call in calls
        if dotted(call.func) == "hasattr" and isinstance(call.args[1], ast.Constant)
    }


def has(version, name):
    """Whether a dotted name is one of a version's; values of properties are not followed."""
    kind, _, rest = name.partition(".")
    if kind not in NAMES[version]:
        return kind == "__version__"
    member = rest.partition(".")[0]
    return not member or member.startswith("__") or member in NAMES[version][kind] | ENUM_MEMBERS


ENUM_MEMBERS = {"name", "value"}


def missing(source, version):
    """The names that the code uses, unasked, and that a version lacks."""
    unasked = names_used(source) - names_asked_for(source)
    return sorted(name for name in unasked if not has(version, name))


@pytest.mark.parametrize("version", NAMES)
def test_the_project_uses_only_names_of_every_version(version):
    lacking = {str(path): missing(path.read_text(), version) for path in FILES}
    assert {path: names for path, names in lacking.items() if names} == {}


def test_tensorrt_for_rtx_has_every_name_but_what_is_refused_for_it():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    texts = [path.read_text().replace("rtx.", "trt.") for path in FILES]
    used = set().union(*map(names_used, texts))
    assert {"ICudaEngine.create_runtime_config", "IRuntimeConfig.set_runtime_cache"} <= used
    asked = set().union(*(names_asked_for(path.read_text()) for path in FILES))
    for name in {name for name in used - asked if not name.startswith("load")}:
        here = trt
        for part in name.split("."):
            if not isinstance(here, property):
                here = getattr(here, part)


def test_the_check_reads_the_code_that_speaks_to_tensorrt():
    used = set().union(*(names_used(path.read_text()) for path in FILES))
    assert {"Builder", "BuilderFlag.TF32", "OnnxParser"} <= used
    assert {"IBuilderConfig.set_timing_cache", "TensorIOMode.INPUT"} <= used


@pytest.mark.parametrize(
    ("code", "lacking"),
    [
        ("trt.BuilderFlag.FP16", ["BuilderFlag.FP16"]),
        ("trt.BuilderFlag.TF32", []),
        ("hasattr(trt.BuilderFlag, 'FP16') and trt.BuilderFlag.FP16", []),
        (
            "def f(config: trt.IBuilderConfig): config.max_workspace_size = 1",
            ["IBuilderConfig.max_workspace_size"],
        ),
        ("def f(config: 'trt.IBuilderConfig'): config.max_aux_streams = 1", []),
    ],
)
def test_the_check_finds_what_version_11_lacks(code, lacking):
    assert missing(code, "11.4") == lacking
