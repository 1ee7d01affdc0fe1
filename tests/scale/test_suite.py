"""A whole suite, tiny, on a cluster of three machines of which one dies while it trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from almrr_pipeline.config import BackboneSettings
from almrr_pipeline.model.backbone import build_backbone

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")
CATEGORIES = ["folder_waves", "folder_grain"]
BROKEN = "folder_torn"
STEPS = 60
CHANGES: dict[str, Any] = {
    "suite": "tiny",
    "categories": CATEGORIES,
    "data": {"textures": "dtd", "image_size": [128, 128]},
    "backbone": {"name": "test_resnet", "weights": "backbone.pth"},
    "synthesis": {"samples": 16},
    "model": {"latent": 16, "dim": 16, "depth": 1, "decoder": [8, 8], "refinement_width": 4},
    "train": {"steps": STEPS, "batch_size": 2, "checkpoint_every": 5, "log_every": 20},
    "inference": {"scan_backend": "torch"},  # nothing to compile
    "evaluate": {"bootstrap": 0},
    "report": {"examples": 1},
    "overrides": {},
}


class Project:
    """A copy of the project, and its commands."""

    def __init__(self, origin: Path, folder: Path, address: str) -> None:
        for name in ("src", "conf"):
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin / name, folder / name, ignore=hidden)
        for name in ("pyproject.toml", "dvc.yaml", "params.yaml", ".gitignore"):
            shutil.copy(origin / name, folder)
        self.folder = folder
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "RAY_ADDRESS": address,
            "DVC_NO_ANALYTICS": "1",
            "KEDRO_DISABLE_TELEMETRY": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_NUM_THREADS": "1",  # as many as a task of one core has
        }
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def change(self, **changes: Any) -> None:
        """Change values of params.yaml, section by section."""
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            both = isinstance(value, dict) and name != "overrides"
            values[name] = {**values[name], **value} if both else value
        path.write_text(yaml.safe_dump(values))

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Begin a command in the project's root."""
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """Run a command and return what it printed."""
        begun = self.begin(*command)
        printed, _ = begun.communicate()
        assert begun.returncode == 0, printed
        return printed

    def metrics(self) -> dict[str, Any]:
        """The numbers of record."""
        path = self.folder / "data/08_reporting/metrics.json"
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def _draw(folder: Path, kind: str) -> None:
    """Write a category's images: a few normal ones, and some with a bright square."""
    generator = np.random.default_rng(len(kind))
    rows = np.arange(64)[:, None]
    for part, count in (
        ("train/good", 8),
        ("validation/good", 20),
        ("test/good", 3),
        ("test/spot", 3),
    ):
        (folder / part).mkdir(parents=True)
        for place in range(count):
            surface = generator.normal(110, 12, (64, 64))
            if kind == "waves":
                surface += 40 * np.sin(rows / 3 + generator.uniform(0, 6))
            if part == "test/spot":
                corner = 8 * place + 8
                surface[corner : corner + 12, corner : corner + 16] = 240
                mask = np.zeros((64, 64), np.uint8)
                mask[corner : corner + 12, corner : corner + 16] = 255
                masks = folder / "ground_truth/spot"
                masks.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(masks / f"{place}_mask.png")
            pixels = np.clip(surface, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{place}.png")


@pytest.fixture(scope="module")
def copy(project: Path, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy with two categories, textures and backbone weights of its own; nothing has run."""
    made = Project(project, tmp_path_factory.mktemp("suite") / "project", cluster.address)
    for category in CATEGORIES:
        _draw(made.folder / "photographs" / category, category.removeprefix("folder_"))
    textures = made.folder / "textures/images/noise"
    textures.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for place in range(4):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(textures / f"{place}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(BackboneSettings(name="test_resnet"), weights=None)
    torch.save(backbone.network.state_dict(), made.folder / "backbone.pth")
    paths = {category: f"photographs/{category}" for category in CATEGORIES}
    made.change(**CHANGES)
    made.change(data={"paths": {**paths, "dtd": "textures"}})
    made.run("dvc", "init", "--no-scm", "-q")
    return made


@pytest.fixture(scope="module")
def expected(copy: Project) -> dict[str, Any]:
    """The metrics of a run in one process without Ray, whose outputs are removed."""
    copy.run("kedro", "run")
    metrics = copy.metrics()
    for name in ("data", ".almrr"):
        shutil.rmtree(copy.folder / name)
    (copy.folder / "mlflow.db").unlink()
    return metrics


def test_a_machine_that_dies_in_a_training_costs_nothing_and_a_failing_category_is_named(
    copy: Project,
    expected: dict[str, Any],
    cluster: Cluster,
    small: dict[str, Any],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(project / "benchmarks")
    from ray_suite import kill_machine_of

    torn = copy.folder / "photographs" / BROKEN
    shutil.copytree(copy.folder / "photographs" / CATEGORIES[0], torn)
    (torn / "train/good/3.png").write_bytes(b"no image")
    paths = yaml.safe_load((copy.folder / "params.yaml").read_text())["data"]["paths"]
    copy.change(
        categories=[*CATEGORIES, BROKEN],
        data={"paths": {**paths, BROKEN: f"photographs/{BROKEN}"}},
    )
    begun = copy.begin("almrr", "repro", "--engine", "ray")
    unit = "train@folder_grain-0"
    checkpoints = copy.folder / ".almrr/training/folder_grain/seed_0"
    killed = False
    while begun.poll() is None and not killed:
        if len(list(checkpoints.glob("*/step_*.ckpt"))) > 1:
            killed = kill_machine_of(unit, cluster)
        time.sleep(0.02)
    printed, _ = begun.communicate()
    cluster.add_node(**small)
    assert killed, printed
    assert "Resuming from the checkpoint" in (copy.folder / f".almrr/logs/{unit}.log").read_text()
    assert begun.returncode == 1
    assert f"\n  fetch@{BROKEN}: train/good/3.png" in printed
    assert f"not run, as they need one: synthesize@{BROKEN}-0" in printed
    assert "Traceback" not in printed
    copy.change(categories=CATEGORIES, data={"paths": paths})
    printed = copy.run("dvc", "repro")
    for category in CATEGORIES:  # finished and recorded
        assert f"Stage 'evaluate@{category}-0' didn't change" in printed
    assert "Running stage 'train@" not in printed
    assert copy.metrics() == expected
    assert "up to date" in copy.run("dvc", "status")


def test_a_run_of_kedro_has_a_parent_and_a_child_for_each_category(
    copy: Project, expected: dict[str, Any]
) -> None:
    from mlflow.tracking import MlflowClient

    copy.run("kedro", "run", "--runner", "almrr_pipeline.kedro_support.ray_runner.RayRunner")
    assert copy.metrics() == expected
    client = MlflowClient(f"sqlite:///{copy.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("almrr")
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.stage = 'all'")
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["pixel_auroc"] == expected["mean"]["pixel_auroc"]
    children = {run.data.tags["category"]: run for run in runs if run is not parent}
    assert set(children) == set(CATEGORIES)
    for category, run in children.items():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(set(steps))[-1] == STEPS
        reported = expected["categories"][category]["pixel_auroc"]
        assert run.data.metrics["pixel_auroc"] == reported
