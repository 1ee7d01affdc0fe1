"""dvc.yaml names all code and parameters that a stage depends on: else results would be stale."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.pipeline import Pipeline

from almrr_pipeline.pipeline_registry import build_pipelines

ROOT = "almrr_pipeline"
WITHOUT_EFFECT = (
    "__init__",
    "config",
    "common/arrays",
    "common/errors",
    "common/progress",
    "common/redaction",
    "kedro_support/config_loader",
    "kedro_support/hooks",
    "kedro_support/tracking",
    "pipelines/per_category",
)
"""Modules that hand on parameters, which are dependencies themselves, or name, report and log."""

STAGES = ("shared", "fetch", "synthesize", "train", "baseline", "evaluate", "report")
PIPELINE_OF = {"shared": "fetch"}
"""Where a stage's pipeline has another name."""


@pytest.fixture
def stages(project: Path) -> dict[str, Any]:
    described: dict[str, Any] = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))
    return described["stages"]


def find_imports(module: Path, package: Path) -> Iterator[Path]:
    """The files of this package that a file imports, wherever in it."""
    for statement in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if (
            isinstance(statement, ast.ImportFrom)
            and (statement.module or "").partition(".")[0] == ROOT
        ):
            base = package.joinpath(*(statement.module or "").split(".")[1:])
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file():
                    yield path
            for name in statement.names:
                if (base / f"{name.name}.py").is_file():
                    yield base / f"{name.name}.py"


def find_all_imports(module: Path, package: Path) -> set[Path]:
    """The same and what those import in turn, without modules that have no effect on results."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        for path in find_imports(waiting.pop(), package):
            name = path.relative_to(package).with_suffix("").as_posix()
            if path not in found and name not in WITHOUT_EFFECT:
                found.add(path)
                waiting.append(path)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_it_runs(
    project: Path, stages: dict[str, Any], stage: str
) -> None:
    package = project / "src" / ROOT
    nodes = package / "pipelines" / f"{PIPELINE_OF.get(stage, stage)}.py"
    named = [project / dep for dep in stages[stage]["deps"]]
    missing = {
        path.relative_to(project).as_posix()
        for path in find_all_imports(nodes, package)
        if path.stat().st_size and not any(path == dep or dep in path.parents for dep in named)
    }
    assert missing == set()


@pytest.mark.parametrize("stage", STAGES)
def test_every_dependency_on_code_exists(project: Path, stages: dict[str, Any], stage: str) -> None:
    named = [dep for dep in stages[stage]["deps"] if dep.startswith("src/")]
    assert [dep for dep in named if not (project / dep).exists()] == []


def _pipeline_of(stage: str) -> Pipeline:
    pipelines = build_pipelines(["x"], [0])
    match stage:
        case "shared":
            return pipelines["fetch"].only_nodes_with_tags("shared")
        case "fetch":
            return pipelines["fetch"].only_nodes_with_namespaces(["x"])
        case _:
            return pipelines[stage]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_sections_its_nodes_take(stages: dict[str, Any], stage: str) -> None:
    taken = {
        name.rpartition(".")[2].removeprefix("params:")
        for name in _pipeline_of(stage).inputs()
        if "params:" in name
    }
    named = {name.partition(".")[0] for name in stages[stage]["params"]}
    assert taken - {"category", "seed"} <= named  # those two are in the stage's command


@pytest.mark.parametrize("stage", ["synthesize", "train", "evaluate"])
def test_a_stage_of_a_category_and_seed_runs_and_writes_that_one_alone(
    stages: dict[str, Any], stage: str
) -> None:
    described = stages[stage]
    assert described["matrix"] == {"category": "${categories}", "seed": "${seeds}"}
    assert described["cmd"].endswith("--namespaces ${item.category}.seed_${item.seed}")
    entries = [out for kind in ("outs", "metrics", "plots") for out in described.get(kind, [])]
    written = [next(iter(out)) if isinstance(out, dict) else out for out in entries]
    assert all("${item.category}/seed_${item.seed}" in out for out in written)
