"""Steps of the evaluate pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from almrr_pipeline.config import EvaluateSettings, ReportSettings, ScanSettings
from almrr_pipeline.evaluation.evaluate import evaluate as evaluate_maps
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth
from almrr_pipeline.evaluation.scores import tabulate_scores
from almrr_pipeline.inference.predictor import Predictor
from almrr_pipeline.inference.settings import InferenceSettings
from almrr_pipeline.pipelines.datasets import FillsFolder
from almrr_pipeline.reporting.overlays import write_examples
from almrr_pipeline.sources.manifest import test_rows


def map_anomalies(
    model: Path, manifest: pd.DataFrame, data_folder: Path, scan: ScanSettings, evaluate: EvaluateSettings
) -> FillsFolder:
    """Predict the anomaly map of every test picture, at the size that the metrics are taken at."""
    predictor = Predictor(model, batch_size=evaluate.batch_size, scan_backend=scan.backend)
    pictures = [data_folder / name for name in test_rows(manifest)["image"]]
    return AnomalyMaps.writer(predictor.maps(pictures, at="network"))
