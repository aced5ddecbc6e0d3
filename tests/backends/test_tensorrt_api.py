"""Every name of TensorRT that the project spells is one of the stand-in, in every version.

The stand-in in turn has only names of the real bindings (`test_fake_tensorrt.py`), so code that
no test runs cannot use a name that some version lacks either.
"""

import ast
import enum
from pathlib import Path

import pytest

from tests.helpers.fake_tensorrt import VERSIONS, Machine, make_tensorrt

PROJECT = Path(__file__).resolve().parents[2]
FILES = [*PROJECT.glob("*.py"), *(PROJECT / "aliked").rglob("*.py")]


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


def names_used(source):
    """Names below `trt` that some code spells, members of annotated parameters among them."""
    tree = ast.parse(source)
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


def names_asked_for(source):
    """Names that some code asks for with `hasattr` before it uses them."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        f"{dotted(call.args[0])}.{call.args[1].value}".removeprefix("trt.")
        for call in calls
        if dotted(call.func) == "hasattr" and isinstance(call.args[1], ast.Constant)
    }


def has(module, name):
    """Whether a dotted name is one of the module's; values of properties are not followed."""
    here = module
    for part in name.split("."):
        is_enum = isinstance(here, type) and issubclass(here, enum.Enum)
        if part in getattr(here, "WRITABLE", ()) or (is_enum and part in ("name", "value")):
            return True
        if isinstance(getattr(here, part, None), property):
            return True
        if not hasattr(here, part):
            return False
        here = getattr(here, part)
    return True


def missing(source, version):
    """The names that the code uses, unasked, and that a version lacks."""
    module = make_tensorrt(version, Machine())
    unasked = names_used(source) - names_asked_for(source)
    return sorted(name for name in unasked if not has(module, name))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_project_uses_only_names_of_both_versions(version):
    lacking = {str(path): missing(path.read_text(), version) for path in FILES}
    assert {path: names for path, names in lacking.items() if names} == {}


def test_the_check_reads_the_code_that_speaks_to_tensorrt():
    used = set().union(*(names_used(path.read_text()) for path in FILES))
    assert {"Builder", "BuilderFlag.TF32", "OnnxParser.parse_from_file"} <= used
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
