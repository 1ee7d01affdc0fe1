"""Step of the predict pipeline."""

from __future__ import annotations

from pathlib import Path

from almrr_pipeline.config import EvaluateSettings, PredictSettings, ScanSettings
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.predict_files import find_images, predict_files
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.kedro_support.datasets import FillsFolder


def predict_images(
    model: Path, predict: PredictSettings, scan: ScanSettings, evaluate: EvaluateSettings
) -> FillsFolder:
    """Predict the images that `predict.images` names.

    Raises:
        AlmrrError: it names none.
    """
    if predict.images is None:
        raise AlmrrError("predict.images names no images; run with --params predict.images=FOLDER.")
    images = find_images([Path(predict.images)])
    predictor = Predictor(model, batch_size=evaluate.batch_size, scan_backend=scan.backend)
    return lambda folder: predict_files(predictor, images, folder)
