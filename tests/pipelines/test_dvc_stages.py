"""dvc.yaml names all code that a stage's results depend on: a stage that misses some would keep stale results."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = "almrr_pipeline"
WITHOUT_EFFECT = ("config", "errors", "progress", "hooks", "config_loader", "project", "shown", "pipelines/datasets")
"""Modules that hand on parameters, which are dependencies of their own, or say things."""

PIPELINE_OF = {"shared": "fetch"}
"""Where a stage's pipeline has another name."""


def find_imports(module: Path, package: Path) -> Iterator[Path]:
    """The files of this package that a file imports, wherever in it."""
    for statement in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == ROOT:
            base = package.joinpath(*(statement.module or "").split(".")[1:])
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file():
                    yield path
            for name in statement.names:
                if (base / f"{name.name}.py").is_file():
                    yield base / f"{name.name}.py"


def find_all_imports(module: Path, package: Path) -> set[Path]:
    """The same, and what those import in turn; without the modules that have no effect on results."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        for path in find_imports(waiting.pop(), package):
            name = path.relative_to(package).with_suffix("").as_posix()
            if path not in found and name not in WITHOUT_EFFECT:
                found.add(path)
                waiting.append(path)
    return found


@pytest.mark.parametrize("stage", ["shared", "fetch", "synthesize", "train", "evaluate", "report"])
def test_a_stage_depends_on_the_code_it_runs(project: Path, stage: str) -> None:
    described = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    package = project / "src" / ROOT
    nodes = package / "pipelines" / PIPELINE_OF.get(stage, stage) / "nodes.py"
    named = [project / dep for dep in described["deps"]]
    missing = {
        path.relative_to(project).as_posix()
        for path in find_all_imports(nodes, package)
        if path.stat().st_size and not any(path == dep or dep in path.parents for dep in named)
    }
    assert missing == set()
