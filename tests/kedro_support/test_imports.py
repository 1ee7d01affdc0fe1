"""What a run imports before its first node: each module here takes a second or more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"lightning", "mlflow", "sklearn", "timm", "torch"}
RUNNER = """
import sys
from kedro.runner import SequentialRunner

class Listing(SequentialRunner):
    def run(self, pipeline, *args, **kwargs):
        assert pipeline.nodes
        print("imported:", *sys.modules)
        return {}
"""


@pytest.mark.parametrize("pipeline", ["fetch", "synthesize", "report"])
def test_a_run_that_is_not_tracked_imports_nothing_slow_before_its_first_node(
    project: Path, tmp_path: Path, pipeline: str
) -> None:
    for name in ("params.yaml", "pyproject.toml"):
        shutil.copy(project / name, tmp_path)
    shutil.copytree(project / "conf", tmp_path / "conf")
    mlflow = tmp_path / "conf" / "base" / "mlflow.yml"  # also a report is not tracked here
    mlflow.write_text(mlflow.read_text().replace("[fetch,", "[report, fetch,"), encoding="utf-8")
    (tmp_path / "src").mkdir()  # Kedro asks for it; the package is the installed one
    (tmp_path / "listing.py").write_text(RUNNER, encoding="utf-8")
    kedro = [sys.executable, "-m", "kedro", "run", "--pipelines", pipeline]
    ended = subprocess.run(
        [*kedro, "--runner", "listing.Listing"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "imported: " in ended.stdout, ended.stderr
    imported = set(ended.stdout.partition("imported: ")[2].split())
    assert SLOW & imported == set()


def test_the_commands_of_kedro_mlflow_are_there_when_they_are_asked_for(project: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "kedro", "mlflow", "--help"],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "modelify" in ended.stdout
