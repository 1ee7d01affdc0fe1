"""Functions are short and take few parameters, except kernels and the commands of the CLI."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import almrr_pipeline

LINES, PARAMETERS = 60, 8
PACKAGE = Path(almrr_pipeline.__file__).parent
EXEMPT = {PACKAGE / "cli.py"}


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in PACKAGE.rglob("*.py"):
        if path in EXEMPT or PACKAGE / "model/kernels" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def test_bodies_are_short() -> None:
    long = {}
    for name, function in _functions():
        first = function.body[1 if ast.get_docstring(function) and function.body[1:] else 0]
        assert function.end_lineno is not None
        if (lines := function.end_lineno - first.lineno + 1) > LINES:
            long[name] = lines
    assert not long


def test_parameters_are_few() -> None:
    many = {}
    for name, function in _functions():
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if (count := sum(argument.arg not in {"self", "cls"} for argument in given)) > PARAMETERS:
            many[name] = count
    assert not many
