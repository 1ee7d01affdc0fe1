"""The predict pipeline: model + images of one's own -> overlays, scores and verdicts."""

from __future__ import annotations

from pathlib import Path

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import staging_folder
from almrr_pipeline.config import InferenceSettings, PredictSettings
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.pipelines.per_category import step
from almrr_pipeline.reporting.predict_files import find_images, predict_files


def predict_images(
    model: Path, predict: PredictSettings, inference: InferenceSettings, scratch: Path
) -> Path:
    """Predict the images that `predict.images` names.

    Raises:
        AlmrrError: it names none.
    """
    if predict.images is None:
        raise AlmrrError("predict.images names no images; run with --params predict.images=FOLDER.")
    images = find_images([Path(predict.images)])
    predictor = Predictor(
        model, batch_size=inference.batch_size, scan_backend=inference.scan_backend
    )
    with staging_folder(scratch) as folder:
        predict_files(predictor, images, folder)
    return folder


NODES = [
    step(predict_images, "model params:predict params:inference scratch_folder", "predictions")
]
