"""The project as its users run it: every command of README.md and docs/, on a copy, tiny."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from project_copy import copy_project

from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Predictor

pytestmark = pytest.mark.xdist_group("project")  # one copy, made once

BACKBONES = {
    "laptop": "tf_efficientnet_lite0",
    "workstation": "resnet50.tv_in1k",
    "paper": "resnet50.tv_in1k",
}
"""By budget."""

TINY = """\
# @package _global_
suite: tiny
categories:
  - sample_brick
  - sample_grass
data:
  textures: package
  image_size:
    - 128
    - 128
backbone:
  name: tf_efficientnet_lite0
  weights: package
synthesis:
  samples: 16
model:
  latent: 16
  dim: 16
  depth: 1
  decoder:
    - 8
    - 8
  refinement_width: 4
train:
  steps: 4
  batch_size: 4
  learning_rate: 1.0e-3
  log_every: 1
inference:
  flips: true
evaluate:
  bootstrap: 20
report:
  examples: 1
"""


class Project:
    """A copy of the project, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: set[str] = set()
        self.log = ""  # of the first run
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{Path(__file__).with_name('sockets')}",
            "SOCKET_LOG": str(folder.parent / "sockets.log"),
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
        }  # fmt: skip
        for name in (
            "MLFLOW_TRACKING_URI",
            "KEDRO_DISABLE_TELEMETRY",
            "DO_NOT_TRACK",
        ):  # as in a user's own shell
            self.environment.pop(name, None)

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command in the project's root and return what it printed."""
        self.ran.add(shlex.join(command))
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, (
            f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}"
        )
        return done.stdout

    def metrics(self) -> dict[str, Any]:
        """The numbers of record."""
        found: dict[str, Any] = json.loads(
            (self.folder / "data/08_reporting/metrics.json").read_text()
        )
        return found


@pytest.fixture(scope="module")
def fresh(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone with uncommitted changes and a tiny suite, committed; nothing has run yet."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    copy_project(project, folder)
    (folder / "conf/suite/tiny.yaml").write_text(TINY)
    # The budget of `almrr train`: nothing that would take longer than the suite.
    laptop = "# @package _global_\nbudget: laptop\ndata:\n  image_size: [144, 144]\n"
    (folder / "conf/budget/laptop.yaml").write_text(laptop)
    config = folder / "conf/config.yaml"
    config.write_text(config.read_text().replace("suite: sample", "suite: tiny"))
    copy = Project(folder)
    copy.run(sys.executable, "-m", "almrr_pipeline.model.kernels.warm_up")
    copy.run("git", "init", "-q")
    _compose(copy)
    copy.run("git", "add", "-A")
    copy.run("git", "commit", "-qm", "a clone")
    return copy


@pytest.fixture(scope="module")
def built(fresh: Project) -> Project:
    """The same after what `make run` runs, with its outcome committed."""
    fresh.log = fresh.run("almrr", "repro")
    fresh.run("git", "add", "-A")
    fresh.run("git", "commit", "-qm", "what came of it")
    return fresh


def _compose(copy: Project) -> None:
    """Write params.yaml as `dvc exp run` does before it runs."""
    code = (
        "from dvc.utils.hydra import compose_and_dump; from pathlib import Path; "
        "compose_and_dump('params.yaml', str(Path('conf').resolve()), None, 'config', '', [])"
    )
    copy.run(sys.executable, "-c", code)


def test_the_shipped_params_yaml_is_what_dvc_composes(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "conf", tmp_path / "conf")
    _compose(Project(tmp_path))
    assert (tmp_path / "params.yaml").read_text() == (project / "params.yaml").read_text()


@pytest.mark.parametrize(
    "suite", ["sample", "textures", "mvtec", "mt_defect", "nanotwice", "paper"]
)
def test_every_suite_composes_to_valid_parameters(
    project: Path, tmp_path: Path, suite: str
) -> None:
    from almrr_pipeline.config import load_parameters
    from almrr_pipeline.datasets.registry import dataset_for

    shutil.copytree(project / "conf", tmp_path / "conf")
    config = tmp_path / "conf/config.yaml"
    config.write_text(config.read_text().replace("suite: sample", f"suite: {suite}"))
    _compose(Project(tmp_path))
    parameters = load_parameters(tmp_path / "params.yaml")
    assert parameters.suite == suite
    assert all(dataset_for(category) for category in parameters.categories)


@pytest.mark.parametrize("suite", ["sample", "mt_defect"])
@pytest.mark.parametrize("budget", BACKBONES)
def test_every_budget_changes_sizes_alone(
    project: Path, tmp_path: Path, suite: str, budget: str
) -> None:
    from almrr_pipeline.config import load_parameters

    def compose(chosen: str) -> dict[str, Any]:
        folder = tmp_path / chosen
        shutil.copytree(project / "conf", folder / "conf")
        config = folder / "conf/config.yaml"
        text = config.read_text().replace("suite: sample", f"suite: {suite}")
        config.write_text(text.replace("budget: as_suite", f"budget: {chosen}"))
        _compose(Project(folder))
        return load_parameters(folder / "params.yaml").model_dump()

    plain, chosen = compose("as_suite"), compose(budget)
    assert (plain["budget"], chosen["budget"]) == ("as_suite", budget)
    assert chosen["categories"] == plain["categories"]
    assert chosen["data"]["tiling"] == plain["data"]["tiling"]
    for section in ("inference", "evaluate", "report", "overrides"):
        assert chosen[section] == plain[section]
    for name in ("materials", "shapes", "color"):
        assert chosen["synthesis"][name] == plain["synthesis"][name]
    for name in ("refinement_input", "residual_channels", "memory_size", "prior", "standardize"):
        assert chosen["model"][name] == plain["model"][name]
    assert chosen["backbone"]["name"] == BACKBONES[budget]


def test_repro_ends_in_tables_images_and_runs(built: Project) -> None:
    reporting = built.folder / "data/08_reporting"
    table = pd.read_csv(reporting / "metrics.csv")
    assert {"sample_brick", "sample_grass", "mean"} <= set(table["category"])
    assert "<html" in (reporting / "report.html").read_text()
    assert list((reporting / "categories/sample_brick/seed_0/overlays").glob("*.webp"))
    assert (built.folder / "mlflow.db").is_file()


def test_a_run_prints_a_few_plain_lines_for_a_stage(built: Project) -> None:
    """The sample suite, of 18 stages and minutes instead of seconds, may print 150 lines."""
    printed = built.log
    lines = [line for line in printed.splitlines() if line]
    stages = printed.count(": started, see .almrr/logs/")
    assert stages == 13
    assert len(lines) <= 8 * stages
    assert "\x1b" not in printed
    for noise in ("Loading data", "UserWarning", "Lightning", "mlflow.store"):
        assert noise not in printed
    assert "Trained 4 steps: loss" in printed
    assert "WARNING sample_brick: the memory bank is ahead" in printed  # so warnings are seen
    pages = [line for line in lines if "?workflowType=machine_learning" in line]
    assert len(pages) == 7  # of train, evaluate, baseline and report


def test_dvc_repro_runs_nothing_after_it(built: Project) -> None:
    printed = built.run("dvc", "repro")
    assert "Running stage" not in printed
    assert "up to date" in built.run("dvc", "status")


def test_git_gets_the_lock_file_and_the_headline_figures(built: Project) -> None:
    assert built.run("git", "status", "--porcelain") == ""
    changed = built.run("git", "diff", "--name-only", "HEAD~1", "HEAD").split()
    assert changed == ["data/08_reporting/headline.json", "dvc.lock"]


def test_thresholds_are_scores_of_the_validation_images(built: Project) -> None:
    model = built.folder / "data/06_models/sample_brick/seed_0"
    validation = sorted((built.folder / "data/01_raw/sample_brick/validation/good").iterdir())
    scores = [prediction.score for prediction in Predictor(model, device="cpu")(validation)]
    thresholds = InferenceConfig.load(model).thresholds
    assert thresholds is not None
    assert thresholds.image.normals == len(validation)
    assert np.isclose(scores, thresholds.image.value, rtol=1e-6, atol=0).sum() == 1


def test_one_stage_of_one_category_and_seed_runs_alone(built: Project) -> None:
    assert "Running stage" not in built.run("dvc", "repro", "train@sample_brick-0")
    printed = built.run("dvc", "repro", "--force", "--single-item", "evaluate@sample_brick-0")
    assert printed.count("Running stage") == 1


def test_the_same_commit_gives_the_same_numbers(built: Project) -> None:
    """From the fetch to the metrics of one category, by DVC's own command and one process each."""
    names = ("06_models/{}/model.safetensors", "08_reporting/categories/{}/metrics.json")
    files = [built.folder / "data" / name.format("sample_brick/seed_0") for name in names]
    before = [file.read_bytes() for file in files]
    printed = built.run("dvc", "repro", "--force", "--no-run-cache", "evaluate@sample_brick-0")
    for stage in ("fetch@sample_brick", "synthesize@sample_brick-0", "train@sample_brick-0"):
        assert f"Running stage '{stage}'" in printed
    assert [file.read_bytes() for file in files] == before


def test_metrics_parameters_and_plots_can_be_shown(built: Project) -> None:
    assert "pixel_auroc" in built.run("dvc", "metrics", "show")
    assert "steps" in built.run("dvc", "params", "diff", "--all")
    printed = built.run("dvc", "plots", "show")
    assert "index.html" in printed


def test_a_colleague_pulls_model_and_metrics_without_training(
    built: Project, tmp_path: Path
) -> None:
    built.run("dvc", "remote", "add", "--default", "team", str(tmp_path / "remote"))
    built.run("git", "commit", "--all", "-m", "Where the team's data is")
    built.run("dvc", "push", "-q")
    built.run("git", "clone", "--quiet", ".", str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    assert "pixel_auroc" in clone.run("dvc", "metrics", "show")  # git has them
    assert "failed" not in clone.run("dvc", "metrics", "diff")
    clone.run("dvc", "pull", "-q")
    assert clone.metrics() == built.metrics()
    model = "data/06_models/sample_brick/seed_0/model.safetensors"
    assert (clone.folder / model).read_bytes() == (built.folder / model).read_bytes()
    assert "Running stage" not in clone.run("dvc", "repro", "--pull", "--allow-missing")
    assert clone.run("git", "status", "--porcelain") == ""
    built.ran |= clone.ran


def test_no_stage_but_fetch_reaches_for_another_machine(built: Project) -> None:
    """By what Python's own sockets do; libraries in C++ (gloo, CUDA) open theirs unseen."""
    reach = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    stage = "-c", f"'kedro run --pipelines none'; {reach}"
    built.run(sys.executable, *stage)
    noted = (built.folder.parent / "sockets.log").read_text().splitlines()
    stages = [line for line in noted if "kedro run" in line or "stage_settings" in line]
    assert [line for line in stages if "--pipelines fetch" not in line] == stages[-1:]
    assert "none" in stages[-1]  # so the others would be there too


def test_kedro_runs_a_pipeline_by_either_name(
    built: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = built.metrics()
    built.run("kedro", "run", "--pipelines", "evaluate", "--namespaces", "sample_brick.seed_0")
    monkeypatch.setitem(built.environment, "MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    printed = built.run("kedro", "run", "--pipelines", "evaluate")
    assert "MLflow at http://127.0.0.1:9 takes nothing now" in " ".join(printed.split())
    assert "Traceback" not in printed
    monkeypatch.undo()
    built.run("kedro", "run", "--pipeline", "evaluate", "--namespaces", "sample_grass.seed_0")
    assert built.metrics() == before


def test_kedro_runs_everything_without_dvc(built: Project) -> None:
    before = built.metrics()
    built.run("kedro", "run")
    assert built.metrics() == before
    _each_category_and_seed_has_a_run_of_its_own(built)


def _each_category_and_seed_has_a_run_of_its_own(built: Project) -> None:
    """Loss curves and metrics of the newest run of everything do not mix in the parent run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{built.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("almrr")
    runs = client.search_runs([experiment.experiment_id], filter_string="tags.stage = 'all'")
    nested = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    children = {(run.data.tags["category"], run.data.tags["seed"]): run for run in nested}
    assert set(children) == {("sample_brick", "0"), ("sample_grass", "0")}
    for (category, _), run in children.items():
        assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [
            1,
            2,
            3,
            4,
        ]
        assert (
            run.data.metrics["pixel_auroc"]
            == built.metrics()["categories"][category]["pixel_auroc"]
        )
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert "loss" not in parent.data.metrics


def test_kedro_describes_its_catalog(built: Project) -> None:
    assert "anomaly_maps" in built.run(
        "kedro", "catalog", "describe-datasets", "--pipeline", "evaluate"
    )


def test_kedro_viz_shows_layers_and_previews(built: Project) -> None:
    built.run("kedro", "viz", "build", "--include-previews")
    assert (built.folder / "build/index.html").is_file()
    graph = json.loads((built.folder / "build/api/main").read_text())
    assert graph["layers"] == [
        "raw", "intermediate", "model_input", "models", "model_output", "reporting",
    ]  # fmt: skip
    (table,) = (node["id"] for node in graph["nodes"] if node["name"] == "summary_table")
    preview = json.loads((built.folder / f"build/api/nodes/{table}").read_text())["preview"]
    assert [row[0] for row in preview["data"]] == ["sample_brick", "sample_grass", "mean"]
    shutil.rmtree(built.folder / "build")


@pytest.fixture
def photographs(built: Project) -> Path:
    folder = built.folder / "photographs"
    folder.mkdir(exist_ok=True)
    for image in sorted((built.folder / "data/01_raw/sample_brick/test/good").iterdir())[:2]:
        shutil.copy(image, folder)
    return folder


def test_images_of_ones_own_are_predicted(built: Project, photographs: Path) -> None:
    before = built.run("dvc", "status")
    built.run(
        *shlex.split(
            "almrr predict data/06_models/sample_brick/seed_0 photographs --output results"
        )
    )
    built.run(
        *shlex.split(
            "kedro run --pipelines predict --namespaces sample_brick.seed_0 "
            "--params predict.images=photographs"
        )
    )
    by_command = pd.read_csv(built.folder / "results/scores.csv")
    by_kedro = pd.read_csv(built.folder / "data/predictions/sample_brick/seed_0/scores.csv")
    assert len(by_command) == 2
    assert list(by_command["score"]) == list(by_kedro["score"])
    for folder in ("results", "photographs"):
        shutil.rmtree(built.folder / folder)
    assert built.run("dvc", "status") == before


def test_another_seed_is_trained_and_the_first_is_not_trained_again(built: Project) -> None:
    printed = built.run(*shlex.split("dvc exp run -S 'seeds=[0,1]'"))
    assert "Running stage 'train@sample_brick-1'" in printed
    assert "Running stage 'train@sample_brick-0'" not in printed
    table = pd.read_csv(built.folder / "data/08_reporting/metrics.csv")
    assert [(row.category, row.seed) for row in table[:-1].itertuples()] == [
        (category, seed) for category in ("sample_brick", "sample_grass") for seed in (0, 1)
    ]
    metrics = built.metrics()
    one = {seed: values["pixel_auroc"] for seed, values in metrics["runs"]["sample_brick"].items()}
    assert one["0"] != one["1"]
    assert np.isclose(
        metrics["categories"]["sample_brick"]["pixel_auroc"], (one["0"] + one["1"]) / 2
    )
    assert np.isclose(
        metrics["std"]["sample_brick"]["pixel_auroc"], np.std([one["0"], one["1"]], ddof=1)
    )
    printed = built.run("kedro", "run", "--pipelines", "evaluate", "--namespaces", "sample_brick")
    assert all(f"sample_brick.seed_{seed}.compute_metrics" in printed for seed in (0, 1))
    assert "sample_grass" not in printed


@pytest.fixture(scope="module")
def faster(built: Project) -> str:
    """A second experiment; what its run printed."""
    return built.run(*shlex.split("dvc exp run -S train.learning_rate=0.002 --name faster"))


def test_two_experiments_can_be_compared(built: Project, faster: str) -> None:
    assert (
        yaml.safe_load((built.folder / "params.yaml").read_text())["train"]["learning_rate"]
        == 0.002
    )
    shown = built.run("dvc", "exp", "show", "--only-changed", "--drop", "data/|src/|sample_")
    assert "faster" in shown
    differences = built.run("dvc", "metrics", "diff")
    assert "mean.pixel_auroc" in differences
    assert max(map(len, (shown + differences).splitlines())) <= 160
    assert "learning_rate" in built.run("dvc", "params", "diff")
    _compare_in_mlflow(built)


def test_mlflows_page_opens_on_the_runs_and_compares_the_two(built: Project, faster: str) -> None:
    (page,) = set(re.findall(r"http://127\.0\.0\.1:5000(/#\S+)", faster))
    command = shlex.split("mlflow ui --backend-store-uri sqlite:///mlflow.db")
    built.ran.add(shlex.join(command))
    server = subprocess.Popen(
        [*command, "--port", "51973", "--workers", "1"], cwd=built.folder, env=built.environment
    )
    try:
        assert _answers("http://127.0.0.1:51973/health")
        _compare_in_the_page(f"http://127.0.0.1:51973{page}")
    finally:
        server.terminate()
        server.wait()


def _answers(address: str, seconds: float = 90.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return answer.status == 200
        except OSError:
            time.sleep(0.5)
    return False


def _compare_in_the_page(address: str) -> None:
    """Tick the newest experiment and one of the first, press Compare, and read what differs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="MLflow's page needs a browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        for name in ("faster", "tiny "):
            row = page.locator(".ag-row", has=page.get_by_role("link", name=name))
            row.first.locator("[type=checkbox]").first.click(force=True)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("Comparing 2 Runs").wait_for()
        table = page.locator("tr", has_text="train.learning_rate").last
        table.wait_for()
        assert table.inner_text().split() == ["train.learning_rate", "0.002", "0.001"]
        assert "pixel_auroc" in page.inner_text("body")
        browser.close()


@pytest.fixture(scope="module")
def surfaces(built: Project) -> Project:
    """Two folders of the user's own, one trained after the other."""
    for folder in ("path/to/images", "path/to/others"):
        for part in ("train/good", "validation/good", "test/good", "test/noise"):
            _copy_some(built, part, folder)
        built.run("almrr", "check", folder)
    built.run("almrr", "train", "parts", "path/to/images", "-S", "train.steps=3")
    built.run("almrr", "train", "plain", "path/to/others")
    return built


def _copy_some(built: Project, part: str, folder: str) -> None:
    """Twenty images of a folder; defective ones are told by their folder alone."""
    target = built.folder / folder / part
    target.mkdir(parents=True)
    of_sample = sorted((built.folder / "data/01_raw/sample_grass").glob("test/*/*.png"))
    defective = [path for path in of_sample if path.parent.name != "good"]
    source = built.folder / "data/01_raw/sample_grass" / part
    chosen = sorted(source.iterdir())[:20] if part.endswith("good") else defective[:4]
    for path in chosen:
        shutil.copy(path, target)


SURFACES = ("sample_brick", "sample_grass", "folder_parts", "folder_plain")


def _models(project: Project) -> dict[str, bytes]:
    return {
        category: (
            project.folder / f"data/06_models/{category}/seed_0/model.safetensors"
        ).read_bytes()
        for category in SURFACES
    }


def test_two_surfaces_of_ones_own_stand_next_to_what_was_there(surfaces: Project) -> None:
    table = pd.read_csv(surfaces.folder / "data/08_reporting/metrics.csv")
    assert list(table["category"]) == [*SURFACES, "mean"]
    assert len(_models(surfaces)) == 4
    values = yaml.safe_load((surfaces.folder / "params.yaml").read_text())
    size = {"image_size": [144, 144]}  # the budget's
    assert values["overrides"] == {
        "folder_parts": {"data": size, "train": {"steps": 3}},
        "folder_plain": {"data": size},
    }
    assert "good parts stopped" in surfaces.run("almrr", "test", "parts")
    assert "report.html" in surfaces.run("almrr", "report")
    assert "up to date" in surfaces.run("dvc", "status")


def test_nothing_disappears_by_a_training_that_fails_or_is_stopped(surfaces: Project) -> None:
    files = ("params.yaml", "conf/config.yaml", "conf/suite/own.yaml", "dvc.lock")
    before = {name: (surfaces.folder / name).read_text() for name in files}
    models, raw = _models(surfaces), len(list((surfaces.folder / "data/01_raw").rglob("*")))
    assert "path/to/imagse" in surfaces.run("almrr", "train", "new", "path/to/imagse", fails=True)
    changed = ("-S", "train.steps=0", "--change")
    assert "steps" in surfaces.run("almrr", "train", "parts", *changed, fails=True)
    process = subprocess.Popen(
        ["almrr", "train", "new", "path/to/others"],
        cwd=surfaces.folder, env=surfaces.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("Running stage 'fetch@folder_new'" in line for line in process.stdout)
    process.terminate()
    process.communicate(timeout=150)
    assert process.returncode == 143
    assert {name: (surfaces.folder / name).read_text() for name in files} == before
    assert _models(surfaces) == models
    paths = (surfaces.folder / "data/01_raw").rglob("*")
    assert len([path for path in paths if "folder_new" not in path.parts]) == raw
    assert "Running stage" not in surfaces.run("dvc", "repro")


def test_nothing_disappears_by_a_training_that_is_killed(surfaces: Project) -> None:
    files = ("params.yaml", "conf/config.yaml", "conf/suite/own.yaml", "dvc.lock")
    before = {name: (surfaces.folder / name).read_text() for name in files}
    models = _models(surfaces)
    process = subprocess.Popen(
        ["almrr", "train", "parts", "-S", "train.steps=5", "--change"],
        cwd=surfaces.folder, env=surfaces.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert any("Running stage 'train@folder_parts-0'" in line for line in process.stdout)
    for one in (family := psutil.Process(process.pid)), *family.children(recursive=True):
        one.kill()
    process.communicate(timeout=60)
    left = {path.parts[-3] for path in surfaces.folder.glob("data/06_models/*/seed_0/model.*")}
    assert left >= {*SURFACES} - {"folder_parts"}  # which DVC removes before it trains again
    printed = surfaces.run("almrr", "train", "parts")
    assert "as before the run that was killed" in printed
    assert "Running stage" not in printed
    assert {name: (surfaces.folder / name).read_text() for name in files} == before
    assert _models(surfaces) == models


def test_a_model_of_ones_own_is_served(surfaces: Project) -> None:
    """The commands of docs/own-data.md after the training."""
    model = "data/06_models/folder_parts/seed_0"
    surfaces.run("git", "add", "params.yaml", "dvc.lock", "data/08_reporting/headline.json")
    surfaces.run("git", "commit", "-m", "A longer training")
    images = sorted((surfaces.folder / "path/to/images/test/good").iterdir())
    command = shlex.split(f"almrr serve {model} --port 8080")
    surfaces.ran.add(shlex.join(command))
    server = subprocess.Popen(
        [*command[:-1], "0"], cwd=surfaces.folder, env=surfaces.environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().removeprefix("Ready: ").strip()
        request = urllib.request.Request(f"{address}/predict", images[0].read_bytes())
        request.add_header("Content-Type", "image/png")
        with urllib.request.urlopen(request, timeout=30) as answer:
            (row,) = json.load(answer)["predictions"]
    finally:
        server.terminate()
        server.wait()
    (local,) = Predictor(surfaces.folder / model)(images[:1])
    assert np.isclose(row["score"], local.score, atol=1e-6)
    assert row["is_anomalous"] == local.is_anomalous


ELSEWHERE = {
    "make run": "from a bare clone, by hand and where the project is integrated",
    "make test": "this very suite",
    "dvc exp run -S suite=paper -S 'data.accept_licenses=[CC-BY-NC-SA-4.0]'": "is a download",
    "dvc exp run -S suite=textures -S 'data.accept_licenses=[CC-BY-NC-SA-4.0]'": "is a download",
    "dvc exp run -S train.learning_rate=0.002": "run with a name, above",
    "dvc remote add --default team /mnt/team/almrr": "run with another folder, above",
    "almrr train parts path/to/images": "run with a value of its own, above",
    "almrr predict data/06_models/folder_parts/seed_0 photographs --output results": "run above",
    "dvc push": "run quietly, above",
    "dvc pull": "run quietly, above",
}


def test_every_documented_command_is_run(surfaces: Project) -> None:
    built, names = surfaces, ("README.md", "docs/pipeline.md", "docs/own-data.md")
    text = "\n".join((built.folder / name).read_text() for name in names)
    commands = {
        shlex.join(shlex.split(command, comments=True))
        for command in re.findall(r"^\$ (.+)$", text, flags=re.MULTILINE)
    }
    assert commands
    known = built.ran | {shlex.join(shlex.split(command)) for command in ELSEWHERE}
    assert commands - known == set()


def _compare_in_mlflow(built: Project) -> None:
    """Both are runs at the top with parameters, metrics, and a child per category."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{built.folder / 'mlflow.db'}")
    runs = client.search_runs(
        [client.get_experiment_by_name("almrr").experiment_id], max_results=1000
    )
    parents = [run for run in runs if run.data.tags.get("stage") == "experiment"]
    children = [run for run in runs if run.data.tags.get("stage") == "category"]
    assert all("mlflow.parentRunId" not in run.data.tags for run in parents)
    reported = [run for run in parents if "pixel_auroc" in run.data.metrics]
    assert {"0.001", "0.002"} <= {run.data.params["train.learning_rate"] for run in reported}
    assert any(run.data.tags.get("dvc_experiment") == "faster" for run in reported)
    assert {run.data.tags["category"] for run in children} == {"sample_brick", "sample_grass"}
    training = [run for run in runs if run.data.tags.get("stage") == "train"]
    curve = client.get_metric_history(training[-1].info.run_id, "loss")
    assert [point.step for point in curve] == [1, 2, 3, 4]


def test_what_an_installation_needs_is_told_before_it_begins(project: Path, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "tools").mkdir()

    def install(*tools: str) -> str:
        for tool in tools:
            (tmp_path / "tools" / tool).symlink_to(str(shutil.which(tool)))
        unset = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "user.useConfigOnly"}
        unset |= {"GIT_CONFIG_VALUE_0": "true", "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(tmp_path)}
        command = [str(shutil.which("make")), "PYTHON=false", ".venv/installed"]
        env = {"PATH": str(tmp_path / "tools"), **unset}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode
        assert not (tmp_path / ".venv").exists()
        return done.stdout

    assert install("sh") == "git is needed; install it first.\n"
    said = install("git", "false")
    assert "this is no git repository, which DVC needs; run: git init" in said
    assert "git has no identity" in said
    assert "Python 3.11 or newer is needed" in said


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("train", "stpes", 3, "train.stpes: unknown parameter"),
        ("train", "steps", "many", "train.steps"),
        (None, "categories", ["mvtec_carpit"], "mvtec_carpet"),
        ("backbone", "weights", "nowhere/resnet50.pth", "nowhere/resnet50.pth"),
        ("data", "mirror", "nowhere/mirror", "nowhere/mirror"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    fresh: Project, tmp_path: Path, section: str | None, name: str, value: object, said: str
) -> None:
    folder = tmp_path / "project"
    ignore = shutil.ignore_patterns("data", ".git", ".dvc", "mlflow.db", ".almrr")
    shutil.copytree(fresh.folder, folder, ignore=ignore)
    path = folder / "params.yaml"
    values = yaml.safe_load(path.read_text())
    (values if section is None else values[section])[name] = value
    if name == "mirror":
        values["categories"] = ["nanotwice"]
    path.write_text(yaml.safe_dump(values))
    printed = Project(folder).run("kedro", "run", "--pipelines", "fetch", fails=True)
    errors = printed[printed.index("Error: ") :]
    assert said in errors
    assert "Traceback" not in printed
    assert not [path for path in (folder / "data").rglob("*") if path.is_file()]
