"""A report of two categories as evaluation writes them: one with everything, one with little."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from almrr_pipeline.config import EvaluateSettings, Parameters, parse_parameters
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.summary import summarize
from almrr_pipeline.evaluation.thresholds import conformal_threshold
from almrr_pipeline.reporting.examples import Overlay
from almrr_pipeline.reporting.page import CategoryReport, Report


@pytest.fixture
def history() -> pd.DataFrame:
    """Losses over 50 records that fall from 1 and 0.1."""
    step = np.arange(10, 510, 10)
    fall = np.exp(-step / 200)
    return pd.DataFrame(
        {
            "step": step,
            "loss": 1.1 * fall,
            "reconstruction": fall,
            "refinement": 0.1 * fall,
            "learning_rate": np.full(50, 1e-3),
        }
    )


@pytest.fixture(scope="session")
def full() -> tuple[Any, pd.DataFrame]:
    """Evaluation and scores of 12 normal and 12 defective images, all metrics defined."""
    return _evaluate(normals=12, validation=19)


@pytest.fixture(scope="session")
def bare() -> tuple[Any, pd.DataFrame]:
    """Evaluation and scores of 6 defective images: no image metrics, no threshold."""
    return _evaluate(normals=0, validation=0)


@pytest.fixture
def parameters() -> Parameters:
    return parse_parameters({"suite": "sample", "categories": ["sample_brick", "nanotwice"]})


@pytest.fixture
def report(
    parameters: Parameters,
    history: pd.DataFrame,
    full: tuple[Any, pd.DataFrame],
    bare: tuple[Any, pd.DataFrame],
) -> Report:
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 120, 3), 90, np.uint8)).save(stream, "PNG")
    overlays = [
        Overlay("best", "a.png · hole", stream.getvalue()),
        Overlay("worst", "b.png", stream.getvalue()),
    ]
    categories = [
        _report_category(
            "sample_brick",
            full,
            history,
            overlays=overlays,
            training_images=171,
            validation_images=19,
        ),
        _report_category(
            "nanotwice", bare, history, license="NanoTWICE; cite Carrera et al., 2017."
        ),
    ]
    summary = summarize({category.category: {0: category.metrics} for category in categories})
    return Report(parameters, categories, summary, versions={"torch": "2.6.0"}, commit="0123abc")


def _report_category(
    name: str, evaluated: tuple[Any, pd.DataFrame], history: pd.DataFrame, **more: Any
) -> CategoryReport:
    evaluation, scores = evaluated
    return CategoryReport(
        category=name,
        seed=0,
        metrics=evaluation.metrics,
        history=history,
        scores=scores,
        curves=evaluation.curves,
        **more,
    )


def _evaluate(*, normals: int, validation: int) -> tuple[Any, pd.DataFrame]:
    generator = np.random.default_rng(0)
    defect_types = ["good"] * normals + ["hole", "thread"] * 6
    maps = generator.random((len(defect_types), 16, 16), dtype=np.float32) * 0.6
    masks = np.zeros(maps.shape, bool)
    masks[normals:, 4:8, 5:9] = True
    maps[masks] += 0.35
    labels, scores = (
        np.arange(len(defect_types)) >= normals,
        maps.mean(axis=(1, 2), dtype=np.float64),
    )
    threshold = conformal_threshold(generator.normal(scores.min(), 0.01, validation), 0.05)
    evaluation = evaluate(
        maps,
        masks,
        scores,
        labels,
        defect_types,
        EvaluateSettings(bootstrap=20),
        thresholds=(threshold, threshold),
    )
    table = pd.DataFrame(
        {
            "image": [f"{k}.png" for k in range(len(defect_types))],
            "label": np.where(labels, "defective", "normal"),
            "defect_type": defect_types,
            "score": scores,
        }
    )
    return evaluation, table
