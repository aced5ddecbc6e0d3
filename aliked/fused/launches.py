"""How the half-precision kernels are built and launched: reads `launches.def`, as C++ does."""

import ast
import functools
import re
from pathlib import Path
from types import CodeType
from typing import NamedTuple

FILE = Path(__file__).with_name("launches.def")


def ratio(a: int, b: int) -> int:
    """a / b rounded up, at least 1."""
    return max(1, -(-a // b))


class Launch(NamedTuple):
    """A row of the table: what to evaluate for a launch of a kernel."""

    source: str
    threads: tuple[CodeType, ...]  # along x, y
    blocks: tuple[CodeType, ...]  # along x, y, z


class Table(NamedTuple):
    """The rows of the file by their kind."""

    numbers: dict[str, int]
    values: dict[str, CodeType]
    launches: dict[str, Launch]
    builds: dict[str, list[dict[str, int]]]  # by source: the constants of each build


def expression(node: ast.expr) -> CodeType:
    """An argument of a row, to be evaluated when its names are known."""
    return compile(ast.Expression(node), FILE.name, "eval")


@functools.cache
def table() -> Table:
    """The whole file: without its comments it is a series of Python calls."""
    table, fields = Table({}, {}, {}, {}), {}
    text = re.sub("//.*", "", FILE.read_text(encoding="utf-8"))
    for statement in ast.parse(text).body:
        row, (first, *rest) = statement.value.func.id, statement.value.args
        name = first.id
        if row == "NUMBER":
            table.numbers[name] = rest[0].value
        elif row == "VALUE":
            table.values[name] = expression(rest[0])
        elif row == "LAUNCH":
            sizes = tuple(map(expression, rest[1:]))
            table.launches[name] = Launch(rest[0].id, sizes[:2], sizes[2:])
        elif row == "FIELDS":
            fields[name] = [field.id for field in rest]
        elif row == "BUILD":
            build = dict(zip(fields[name], (value.value for value in rest), strict=True))
            table.builds.setdefault(name, []).append(build)
    return table


def evaluate(code: CodeType, names: dict[str, int]) -> int:
    """The value of an expression of the table."""
    known = {"__builtins__": {}, "ratio": ratio, "smaller": min, **table().numbers, **names}
    return int(eval(code, known))


def number(name: str) -> int:
    """A NUMBER of the table."""
    return table().numbers[name]


def value(name: str, **names: int) -> int:
    """A VALUE of the table, given the sizes that it depends on."""
    return evaluate(table().values[name], names)


def build(source: str, **wanted: int) -> tuple[tuple[str, int], ...]:
    """The constants of the first build of a source that has the `wanted` ones."""
    for constants in table().builds[source]:
        if wanted.items() <= constants.items():
            return tuple(constants.items())
    raise KeyError(f"{FILE.name} has no build of {source} with {wanted}")


def threads(kernel: str, constants: tuple = ()) -> tuple[int, int, int]:
    """Threads of a block of a kernel, along x, y and z."""
    return (*(evaluate(code, dict(constants)) for code in table().launches[kernel].threads), 1)


def grid(kernel: str, constants: tuple = (), **sizes: int) -> tuple[int, int, int]:
    """Blocks of a kernel along x, y and z for the sizes that its row names."""
    names = dict(constants) | sizes
    return tuple(evaluate(code, names) for code in table().launches[kernel].blocks)
