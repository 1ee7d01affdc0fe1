"""A model folder as an MLflow model: encoded images in; scores, verdicts and maps out.

The one module below kedro_support that imports MLflow. MLflow runs this file when it loads the
model ("models from code"), so nothing is pickled; the artifacts are the model folder and this
package's source. `mlflow models serve` answers:

    curl http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' \
         -d '{"dataframe_records": [{"image": "<base64 of a PNG or JPEG file>"}]}'

`instances`, `inputs` and `dataframe_split` are taken too, and the base64 may be URL-safe, without
padding, or in a data URI.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, set_model
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

import almrr_pipeline
from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.encoded import to_bytes
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.images import Reading, decode_image, encode_map
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.inference.predictor import Prediction, Predictor

_ARTIFACT = "model_folder"
_REQUIREMENTS = (
    "torch", "torchvision", "timm", "einops", "numpy", "scipy", "pandas", "pillow", "pydantic",
    "safetensors", "tifffile",
)  # fmt: skip
"""What prediction imports; pinned to the versions that are installed at logging."""

MODEL_CONFIG: dict[str, Any] = {"device": "auto", "batch_size": 8, "scan_backend": "auto"}
"""Arguments of `Predictor`; `mlflow.pyfunc.load_model(uri, model_config={...})` replaces them."""

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "image")]),  # as `binary` MLflow spoils other base64
    outputs=Schema(
        [
            ColSpec(DataType.double, "score"),
            ColSpec(DataType.boolean, "is_anomalous", required=False),
            ColSpec(DataType.string, "anomaly_map", required=False),
        ]
    ),
    params=ParamSchema([ParamSpec("anomaly_map", DataType.boolean, False)]),
)
"""One row per image: its file, as base64 or bytes, in; score, verdict, map on request out."""


class RequestError(AlmrrError, MlflowException):
    """A row is no image; MLflow answers with HTTP 400 and shows the message."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class ServedModel(PythonModel):
    """A `Predictor` behind MLflow's interface."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder among the artifacts."""
        folder = Path(context.artifacts[_ARTIFACT])
        self._predictor = Predictor(folder, **{**MODEL_CONFIG, **(context.model_config or {})})
        self._lock = threading.Lock()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Predict images.

        Args:
            context: unused.
            model_input: column `image`, an image file in any format that Pillow reads, as bytes or
                as base64.
            params: `anomaly_map`: whether to return each image's map too.

        Returns:
            Columns score, in [0, 1]; is_anomalous, None where there is no threshold; on request
            anomaly_map, the base64 of a 16-bit gray PNG of the image's size, 65535 standing for 1.

        Raises:
            RequestError: a row is no image; names it.
        """
        with_map = bool((params or {}).get("anomaly_map", False))
        # The server calls from many threads; one at a time, so that one batch takes memory.
        with self._lock:
            predictions = self._predictor.stream(
                _decode_rows(model_input, self._predictor.config.reading)
            )
            rows = [_to_row(prediction, with_map=with_map) for prediction in predictions]
        # As objects None stays None, and becomes null in JSON.
        return pd.DataFrame(rows).astype({"is_anomalous": object})


def log_model(
    folder: Path, *, name: str, registered_name: str | None = None, alias: str | None = None
) -> ModelInfo:
    """Log a model folder to MLflow, in the active run if there is one.

    Args:
        folder: holds model.safetensors, config.json and inference.json.
        name: name of the logged model.
        registered_name: also register it under this name, as a new version.
        alias: alias of the new version, such as "champion"; needs `registered_name`.

    Raises:
        AlmrrError: `folder` is no model folder, or there is an alias without a registered name.
    """
    if alias and not registered_name:
        raise AlmrrError(
            f"The alias {alias!r} belongs to a registered model; give registered_name too."
        )
    config = InferenceConfig.load(folder)
    logged: ModelInfo = mlflow.pyfunc.log_model(
        name=name,
        registered_model_name=registered_name,
        tags=_describe(config),
        **_contents(folder, config),
    )
    if registered_name and alias:
        version = str(logged.registered_model_version)
        mlflow.MlflowClient().set_registered_model_alias(registered_name, alias, version)
    return logged


def register(
    client: mlflow.MlflowClient,
    folder: Path,
    experiment_id: str,
    run_id: str,
    *,
    name: str,
    alias: str,
) -> None:
    """Log a model folder to a run and register it, without MLflow's trial of the example.

    The trial loads the network, several seconds of processor time. On a local disk the files are
    copied once, to where they stay.

    Args:
        client: of the tracker.
        folder: holds model.safetensors, config.json and inference.json.
        experiment_id: of the run.
        run_id: of the training.
        name: of the registered model and of the logged one.
        alias: of the new version.
    """
    known = client.search_model_versions(f"run_id = '{run_id}'")
    if any(version.name == name for version in known):  # by a request without an answer
        return
    config = InferenceConfig.load(folder)
    tags, contents = _describe(config), _contents(folder, config)
    logged = client.create_logged_model(experiment_id, name, source_run_id=run_id, tags=tags)
    described = Model(
        artifact_path=logged.artifact_location,
        run_id=run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        metadata=contents["metadata"],
    )
    address = urlparse(logged.artifact_location)
    if address.scheme in ("", "file"):
        place = Path(url2pathname(address.path))
        mlflow.pyfunc.save_model(place, mlflow_model=described, **contents)
    else:
        with TemporaryDirectory() as scratch:
            copied = Path(scratch, "model")
            mlflow.pyfunc.save_model(copied, mlflow_model=described, **contents)
            client.log_model_artifacts(logged.model_id, str(copied))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    with suppress(MlflowException):  # it exists
        client.create_registered_model(name)
    version = client.create_model_version(
        name, logged.model_uri, run_id, tags, model_id=logged.model_id
    )
    known_as = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: known_as})  # for its page
    client.set_registered_model_alias(name, alias, version.version)


def _describe(config: InferenceConfig) -> dict[str, str]:
    """Category and thresholds, as tags."""
    tags = {"category": config.category}
    if config.thresholds:
        tags["image_threshold"] = repr(config.thresholds.image.value)
        tags["pixel_threshold"] = repr(config.thresholds.pixel.value)
        tags["false_alarm_rate"] = repr(config.thresholds.image.rate)
    return tags


def _contents(folder: Path, config: InferenceConfig) -> dict[str, Any]:
    """What MLflow is to save of a model folder."""
    gray = np.full(config.image_size, 0.5, dtype=np.float32)
    return {
        "python_model": str(Path(__file__)),
        "artifacts": {_ARTIFACT: str(folder)},
        "model_config": MODEL_CONFIG,
        "code_paths": [str(Path(almrr_pipeline.__file__).parent)],
        "signature": SIGNATURE,
        "input_example": pd.DataFrame({"image": [base64.b64encode(encode_map(gray)).decode()]}),
        "pip_requirements": _pinned_requirements(),
        "metadata": {"category": config.category},
    }


def _decode_rows(model_input: pd.DataFrame, reading: Reading) -> Iterator[ImageArray]:
    for position, content in enumerate(model_input["image"]):
        row = f"row {position} of the column 'image'"
        try:
            yield decode_image(to_bytes(content), Path(row), reading)
        except (AlmrrError, TypeError, binascii.Error) as error:
            reason = str(error) if row in str(error) else f"{row} is not base64 ({error})"
            advice = 'send {"dataframe_records": [{"image": "<base64 of an image file>"}]}'
            raise RequestError(f"{reason.rstrip('.')}; {advice}.") from error


def _to_row(prediction: Prediction, *, with_map: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"score": prediction.score, "is_anomalous": prediction.is_anomalous}
    if with_map:
        row["anomaly_map"] = base64.b64encode(encode_map(prediction.anomaly_map)).decode("ascii")
    return row


def _pinned_requirements() -> list[str]:
    pinned = [f"mlflow=={mlflow.__version__}"]
    pinned += [f"{name}=={metadata.version(name)}" for name in _REQUIREMENTS]
    with suppress(metadata.PackageNotFoundError):  # it only makes the scan faster
        pinned.append(f"numba=={metadata.version('numba')}")
    return pinned


set_model(ServedModel())
