"""Small test sets and slow, literal metrics to hold the fast ones against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import skimage.measure

from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.evaluate import Evaluation, evaluate
from almrr_pipeline.evaluation.thresholds import Threshold, conformal_threshold


@dataclass(frozen=True)
class Case:
    """A test set that is held in memory."""

    maps: list[npt.NDArray[np.float32]]
    masks: list[npt.NDArray[np.bool_]]
    defect_types: list[str]
    scores: list[float]

    @property
    def labels(self) -> npt.NDArray[np.bool_]:
        return np.array([name != "good" for name in self.defect_types])

    @property
    def pixels(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Labels and scores of all pixels, as scikit-learn wants them."""
        return np.concatenate([m.ravel() for m in self.masks]), np.concatenate(
            [m.ravel() for m in self.maps]
        )

    def evaluate(
        self,
        *,
        thresholds: tuple[Threshold | None, Threshold | None] | None = None,
        seed: int = 0,
        **settings: object,
    ) -> Evaluation:
        """Evaluate with (image, pixel) thresholds, by default of some validation images.

        Settings are those of the section `evaluate`, unchecked; without intervals by default.
        """
        default = conformal_threshold(np.linspace(0.0, 1.0, 40), 0.05)
        image, pixel = (default, default) if thresholds is None else thresholds
        return evaluate(
            self.maps,
            self.masks,
            self.scores,
            self.labels,
            self.defect_types,
            EvaluateSettings.model_construct(**({"bootstrap": 0} | settings)),
            thresholds=(image, pixel),
            seed=seed,
        )


def _draw_case(
    seed: int,
    *,
    normal: int = 4,
    defective: int = 6,
    decimals: int = 2,
    side: int = 40,
    extent: int = 9,
) -> Case:
    """Draw images of varying sizes, rectangular defects of two types; few decimals: many ties."""
    generator = np.random.default_rng(seed)
    maps, masks, defect_types = [], [], []
    for index in range(normal + defective):
        rows, columns = generator.integers(side // 2, side, size=2)
        mask = np.zeros((rows, columns), dtype=bool)
        for _ in range(2 if index >= normal else 0):
            top, left = generator.integers(0, rows - 4), generator.integers(0, columns - 4)
            mask[
                top : top + generator.integers(1, extent),
                left : left + generator.integers(1, extent),
            ] = True
        values = generator.random((rows, columns)) * 0.7 + mask * generator.uniform(0.0, 0.4)
        maps.append(np.round(values, decimals).astype(np.float32))
        masks.append(mask)
        defect_types.append("good" if index < normal else ("crack", "scratch")[index % 2])
    scores = np.round(
        generator.normal(size=normal + defective) + (np.arange(normal + defective) >= normal), 1
    )
    return Case(maps, masks, defect_types, scores.tolist())


@pytest.fixture(scope="session")
def draw_case() -> Callable[..., Case]:
    """Draw a test set: seed; by keyword normal, defective, decimals, side, extent of defects."""
    return _draw_case


@pytest.fixture
def case() -> Case:
    """Four normal and six defective images with many tied pixels."""
    return _draw_case(0)


@pytest.fixture(scope="session")
def literal_aupro() -> Callable[..., float]:
    """Per-region overlap as it is written down: threshold by threshold, region by region."""
    return _literal_aupro


def _literal_aupro(
    maps: Sequence[npt.NDArray[np.float32]], masks: Sequence[npt.NDArray[np.bool_]], limit: float
) -> float:
    regions = []
    for index, mask in enumerate(masks):
        labeled, count = skimage.measure.label(mask, connectivity=2, return_num=True)
        regions += [(index, labeled == number) for number in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    normal = sum(int((~mask).sum()) for mask in masks)
    for threshold in np.unique(np.concatenate([values.ravel() for values in maps]))[::-1]:
        alarms = [values >= threshold for values in maps]
        fpr.append(sum(int((a & ~m).sum()) for a, m in zip(alarms, masks, strict=True)) / normal)
        pro.append(float(np.mean([alarms[index][region].mean() for index, region in regions])))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit
