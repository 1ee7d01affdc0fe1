"""Step of the predict pipeline."""

from __future__ import annotations

from pathlib import Path

from almrr_pipeline.config import EvaluateSettings, PredictSettings, ScanSettings
from almrr_pipeline.errors import AlmrrError
from almrr_pipeline.inference.files import find_pictures, predict_files
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.pipelines.datasets import FillsFolder


def predict_pictures(
    model: Path, predict: PredictSettings, scan: ScanSettings, evaluate: EvaluateSettings
) -> FillsFolder:
    """Predict the pictures that `predict.images` names.

    Raises:
        AlmrrError: it names none.
    """
    if predict.images is None:
        raise AlmrrError("predict.images names no pictures; run with --params predict.images=FOLDER.")
    pictures = find_pictures([Path(predict.images)])
    predictor = Predictor(model, batch_size=evaluate.batch_size, scan_backend=scan.backend)
    return lambda folder: predict_files(predictor, pictures, folder)
