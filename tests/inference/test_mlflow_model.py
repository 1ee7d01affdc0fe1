from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models.model import ModelInfo
from mlflow.pyfunc import PyFuncModel
from mlflow.pyfunc.scoring_server import invocations
from PIL import Image

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.mlflow_model import _REQUIREMENTS, ServedModel, log_model
from almrr_pipeline.inference.predictor import Predictor

pytestmark = pytest.mark.xdist_group("mlflow model")  # one model, logged once

WITH_THE_REQUIREMENTS_ALONE = """
import sys
sys.path.append(sys.argv[1])
from requirements_alone import hide_others
hide_others(sys.argv[2:])
import almrr_pipeline.inference.predictor
"""
"""Imports what the served model imports, with only the named distributions and their needs."""


@pytest.fixture(scope="module")
def logged(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelInfo]:
    """A model logged and registered in a store of its own."""
    store = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(f"sqlite:///{store / 'mlflow.db'}")
    mlflow.set_registry_uri(f"sqlite:///{store / 'mlflow.db'}")
    experiment = mlflow.create_experiment("test", artifact_location=(store / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        info = log_model(model_folder, name="brick", registered_name="brick", alias="champion")
    yield info
    mlflow.set_tracking_uri(before[0])
    mlflow.set_registry_uri(before[1])


@pytest.fixture(scope="module")
def served(logged: ModelInfo) -> PyFuncModel:
    return mlflow.pyfunc.load_model("models:/brick@champion")


@pytest.fixture(scope="module")
def contents(noise_paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in noise_paths[:3]]


def _post(served: PyFuncModel, body: dict) -> list[dict]:
    """What `mlflow models serve` does with the body of a request, without the socket."""
    response = invocations(
        json.dumps(body), "application/json", served, served.metadata.get_input_schema()
    )
    assert response.status == 200, response.response
    return json.loads(response.response)["predictions"]


def test_it_says_what_the_predictor_says(
    served: PyFuncModel, contents: list[bytes], noise_paths: list[Path], model_folder: Path
) -> None:
    answer = served.predict(pd.DataFrame({"image": contents}))
    expected = Predictor(model_folder)(noise_paths[:3])
    assert list(answer) == ["score", "is_anomalous"]
    assert list(answer["score"]) == pytest.approx([found.score for found in expected], abs=1e-6)
    assert list(answer["is_anomalous"]) == [found.is_anomalous for found in expected]


def test_json_with_base64_is_served(served: PyFuncModel, contents: list[bytes]) -> None:
    records = [{"image": base64.b64encode(content).decode()} for content in contents]
    answer = _post(served, {"dataframe_records": records})
    direct = served.predict(pd.DataFrame({"image": contents}))
    assert [row["score"] for row in answer] == pytest.approx(list(direct["score"]), abs=1e-6)
    assert all(row["is_anomalous"] in (True, False) for row in answer)


def _in_base64(content: bytes) -> dict[str, str]:
    standard, safe = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    return {
        "standard": standard,
        "url-safe, no padding": safe.rstrip("="),
        "data URI": f"data:image/png;base64,{standard}",
        "lines": base64.encodebytes(content).decode(),
    }


def _bodies(text: str) -> dict[str, dict]:
    return {
        "records": {"dataframe_records": [{"image": text}]},
        "split": {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
        "instances": {"instances": [{"image": text}]},
        "instances in TensorFlow Serving's form": {"instances": [{"image": {"b64": text}}]},
        "bare instances": {"instances": [text]},
        "inputs": {"inputs": {"image": [text]}},
        "bare inputs": {"inputs": [text]},
    }


@pytest.mark.parametrize("spelling", list(_in_base64(b"")))
@pytest.mark.parametrize("form", list(_bodies("")))
def test_base64_is_taken_wherever_it_comes(
    served: PyFuncModel, contents: list[bytes], form: str, spelling: str
) -> None:
    if form.startswith("instances in") and spelling == "lines":
        pytest.skip("MLflow writes the line ends as escapes")
    content = contents[0] + b"\xfb\xff\xbe"  # ignored after a PNG's end; "+/" in base64
    text = _in_base64(content)[spelling]
    (row,) = _post(served, _bodies(text)[form])
    (expected,) = served.predict(pd.DataFrame({"image": contents[:1]}))["score"]
    assert row["score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "bad", ["no image", "%%%", "", 5, None, True, [1, 2], {"b64": 3}, "data:,"]
)
def test_the_answer_to_what_is_no_image_says_what_to_send(
    served: PyFuncModel, contents: list[bytes], bad: object
) -> None:
    records = [{"image": base64.b64encode(contents[0]).decode()}, {"image": bad}]
    body = json.dumps({"dataframe_records": records})
    with pytest.raises(MlflowException) as raised:
        invocations(body, "application/json", served, served.metadata.get_input_schema())
    assert raised.value.get_http_status_code() == 400
    assert "row 1 of the column 'image'" in raised.value.message
    assert "dataframe_records" in raised.value.message


def test_the_map_comes_on_demand(
    served: PyFuncModel, contents: list[bytes], noise_paths: list[Path], model_folder: Path
) -> None:
    records = [{"image": base64.b64encode(contents[0]).decode()}]
    (row,) = _post(served, {"dataframe_records": records, "params": {"anomaly_map": True}})
    gray = np.asarray(Image.open(io.BytesIO(base64.b64decode(row["anomaly_map"]))))
    (expected,) = Predictor(model_folder)(noise_paths[:1])
    np.testing.assert_allclose(gray / 65535, expected.anomaly_map, atol=1e-4)


def test_the_signature_is_what_a_client_needs_to_know(logged: ModelInfo) -> None:
    assert logged.signature is not None
    assert [str(column) for column in logged.signature.inputs] == ["'image': string (required)"]
    assert [column.name for column in logged.signature.outputs] == [
        "score",
        "is_anomalous",
        "anomaly_map",
    ]
    assert logged.metadata == {"category": "sample_brick"}


def test_the_example_can_be_served(served: PyFuncModel, logged: ModelInfo) -> None:
    example = mlflow.models.Model.load(logged.model_uri).load_input_example()
    assert len(served.predict(example)) == 1


def test_requirements_are_pinned_and_the_source_travels_along(
    logged: ModelInfo, tmp_path: Path
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(tmp_path)))
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in lines)
    assert {"mlflow", "torch", "timm", "safetensors"} <= {line.partition("==")[0] for line in lines}
    assert (folder / "code" / "almrr_pipeline" / "inference" / "predictor.py").is_file()
    assert not list(folder.rglob("*.pkl"))


def _import_with(requirements: Iterable[str]) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", WITH_THE_REQUIREMENTS_ALONE, tests, *requirements]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_requirements_are_enough_to_predict() -> None:
    done = _import_with(_REQUIREMENTS)
    assert done.returncode == 0, done.stderr


def test_a_missing_requirement_would_be_noticed() -> None:
    assert "No module named 'einops'" in _import_with(set(_REQUIREMENTS) - {"einops"}).stderr


def test_a_row_that_is_no_image_is_named(served: PyFuncModel, contents: list[bytes]) -> None:
    with pytest.raises(AlmrrError, match="row 1 of the column 'image'"):
        served.predict(pd.DataFrame({"image": [contents[0], b"no image"]}))


def test_without_threshold_the_verdict_is_null(
    uncalibrated_folder: Path, contents: list[bytes]
) -> None:
    class Context:
        artifacts = {"model_folder": str(uncalibrated_folder)}  # noqa: RUF012
        model_config = None

    model = ServedModel()
    model.load_context(Context())  # type: ignore[arg-type]
    answer = model.predict(Context(), pd.DataFrame({"image": contents[:1]}))  # type: ignore[arg-type]
    assert answer["is_anomalous"].to_list() == [None]


def test_the_device_can_be_chosen_at_loading(logged: ModelInfo) -> None:
    with pytest.raises(AlmrrError, match="'cuda:99' cannot be used"):
        mlflow.pyfunc.load_model(logged.model_uri, model_config={"device": "cuda:99"})


def test_an_alias_needs_a_name(model_folder: Path) -> None:
    with pytest.raises(AlmrrError, match="'champion' belongs to a registered model"):
        log_model(model_folder, name="brick", alias="champion")


def test_the_documented_logging_code_runs(
    logged: ModelInfo,
    model_folder: Path,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(model_folder, tmp_path / "data" / "06_models" / "sample_brick" / "seed_0")
    monkeypatch.chdir(tmp_path)
    text = (project / "docs" / "predict.md").read_text(encoding="utf-8")
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        if "log_model" in block
    ]
    with mlflow.start_run(run_id=logged.run_id):
        exec(code, {})
    assert mlflow.MlflowClient().get_model_version_by_alias("sample_brick", "champion").version == 1
