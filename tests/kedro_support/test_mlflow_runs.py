"""What MLflow's pages show of the stages of one experiment, which are processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
from contexts import RUN, build_context
from kedro.io import DataCatalog
from kedro.pipeline import Node, Pipeline
from kedro_datasets.text import TextDataset
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from almrr_pipeline.kedro_support.datasets import FolderDataset
from almrr_pipeline.kedro_support.mlflow_files import bring_home
from almrr_pipeline.kedro_support.mlflow_hook import TrackingHook

pytestmark = pytest.mark.xdist_group("mlflow runs")  # one project, tracked once
NAMESPACE = "sample_brick.seed_0"
MANIFEST = pd.DataFrame(
    {
        "image": ["a.png", "b.png", "c.png"],
        "sha256": ["1", "2", "3"],
        "split": ["train", "train", "test"],
        "label": ["normal", "normal", "defective"],
        "mask": ["", "", "c_mask.png"],
    }
)


class Stage:
    """A stage's process, as far as the hook knows of it."""

    def __init__(self, project: Path, name: str, namespace: str | None = NAMESPACE) -> None:
        self.hook = TrackingHook()
        self.hook.after_context_created(build_context(project))
        named = {"pipeline_names": [name], "namespaces": [namespace] if namespace else []}
        self.named = RUN | named
        self.node = Node(lambda x: x, "params:seed", "out", name=name, namespace=namespace)
        self.catalog = DataCatalog(
            {
                f"{NAMESPACE}.model": FolderDataset(filepath=str(project / "model")),
                f"{NAMESPACE}.curves": FolderDataset(filepath=str(project / "curves")),
                f"{NAMESPACE}.overlays@partitions": FolderDataset(filepath=str(project / "panels")),
                "report_page": TextDataset(filepath=str(project / "report.html")),
            }
        )
        self.hook.before_pipeline_run(self.named, Pipeline([self.node]), self.catalog)
        self.hook.before_node_run(self.node, self.catalog, {}, False)

    def save(self, **saved: Any) -> None:
        for name, data in saved.items():
            self.hook.after_dataset_saved(name.replace("__", "."), data)

    def end(self) -> None:
        self.hook.after_node_run(self.node)
        self.hook.after_pipeline_run(self.named, Pipeline([self.node]), self.catalog)


@pytest.fixture(scope="module")
def tracked(
    project: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A project after train, evaluate and report of one category."""
    folder = tmp_path_factory.mktemp("tracked") / "ein Projekt é"
    shutil.copytree(project / "conf", folder / "conf")
    shutil.copy(project / "params.yaml", folder)
    shutil.copytree(model_folder, folder / "model")
    (folder / "curves").mkdir()
    (folder / "curves/roc.csv").write_text("fpr,tpr\n")
    (folder / "panels").mkdir()
    Image.new("RGB", (40, 20), (200, 0, 0)).save(folder / "panels/01_best.webp")
    (folder / "panels/examples.csv").write_text("file,caption\n")
    (folder / "report.html").write_text("<html>")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        train = Stage(folder, "train")
        train.hook.after_dataset_loaded("sample_brick.manifest", MANIFEST, train.node)
        train.save(sample_brick__seed_0__model=None)
        train.end()
        evaluate = Stage(folder, "evaluate")
        metrics = {"pixel_auroc": 0.75}
        evaluate.save(sample_brick__seed_0__metrics=metrics, sample_brick__seed_0__curves=None)
        evaluate.hook.after_dataset_saved(f"{NAMESPACE}.overlays@partitions", None)
        evaluate.end()
        report = Stage(folder, "report", namespace=None)
        report.save(
            summary={"mean": {"pixel_auroc": 0.5}, "runs": {"sample_brick": {"0": metrics}}},
            report_page="<html>",
        )
        report.end()
        yield folder
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


@pytest.fixture
def client(tracked: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tracked / 'mlflow.db'}")


def _runs(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("almrr")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags["stage"]: run for run in found}
    assert len(runs) == len(found) == 4
    return runs


def test_stages_are_below_their_category_and_that_below_the_experiment(
    client: MlflowClient,
) -> None:
    runs = _runs(client)
    parents = {
        stage: next((n for n, r in runs.items() if r.info.run_id == parent), None)
        for stage, parent in (
            (stage, run.data.tags.get("mlflow.parentRunId")) for stage, run in runs.items()
        )
    }
    assert parents == {
        "train": "category",
        "evaluate": "category",
        "category": "experiment",
        "experiment": None,
    }
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["experiment"].info.run_name.startswith("sample ")
    assert runs["experiment"].data.metrics == {"pixel_auroc": 0.5}
    assert runs["category"].data.metrics == {"pixel_auroc": 0.75}


def test_the_data_set_has_a_name_a_digest_and_counts(client: MlflowClient) -> None:
    (used,) = _runs(client)["train"].inputs.dataset_inputs
    assert used.dataset.name == "sample_brick"
    assert len(used.dataset.digest) == 12
    counts = {"images": 3, "test/defective": 1, "train/normal": 2}
    assert json.loads(used.dataset.profile) == counts


def test_page_parameters_and_curves_are_artifacts(client: MlflowClient) -> None:
    runs = _runs(client)
    names = {file.path for file in client.list_artifacts(runs["experiment"].info.run_id)}
    assert names == {"params.yaml", "report.html"}
    evaluate = client.list_artifacts(runs["evaluate"].info.run_id, "curves")
    assert [file.path for file in evaluate] == ["curves/roc.csv"]
    panels = client.list_artifacts(runs["evaluate"].info.run_id, "panels")
    assert {file.path for file in panels} == {"panels/01_best.png", "panels/examples.csv"}


def test_the_model_is_registered_with_its_thresholds(client: MlflowClient, tracked: Path) -> None:
    version = client.get_model_version_by_alias("sample_brick", "seed_0")
    assert version.run_id == _runs(client)["train"].info.run_id
    assert version.tags["category"] == "sample_brick"
    assert float(version.tags["image_threshold"]) == pytest.approx(0.5)
    info = mlflow.models.get_model_info("models:/sample_brick@seed_0")
    assert info.signature.inputs.input_names() == ["image"]
    assert info.saved_input_example_info is not None
    (logged,) = client.search_logged_models([_runs(client)["train"].info.experiment_id])
    (named,) = json.loads(logged.tags["mlflow.modelVersions"])  # what its page links to
    assert (named["name"], str(named["version"])) == ("sample_brick", str(version.version))
    weights = list((tracked / "mlartifacts").rglob("model.safetensors"))
    assert len(weights) == 1  # no second copy


def test_the_database_of_a_copied_project_names_the_copys_files(
    tracked: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tracked, copy)
    bring_home(copy, "almrr")
    client = MlflowClient(f"sqlite:///{copy / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("almrr")
    places = [experiment.artifact_location]
    runs = client.search_runs([experiment.experiment_id])
    models = client.search_logged_models([experiment.experiment_id])
    places += [run.info.artifact_uri for run in runs]
    places += [model.artifact_location for model in models]
    assert len(places) > 3
    assert all(place.startswith(copy.as_uri()) for place in places)


def test_the_page_with_the_runs_is_named(tracked: Path) -> None:
    stage = Stage(tracked, "evaluate")
    stage.end()
    page = str(stage.hook.delivery.find_page())
    assert "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning" in page
