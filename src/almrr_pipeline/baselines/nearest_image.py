"""Images scored by their distance to the nearest training image: recognition alone.

Whole images are compared, small and with light and contrast removed: no small defect can be seen.
Where this baseline separates defective images from normal ones, the split does: normal test images
have twins in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from almrr_pipeline.common.arrays import Bools
from almrr_pipeline.common.images import Reading
from almrr_pipeline.common.region import Region
from almrr_pipeline.datasets.same_tile import SAME_TILE, compute_signatures, correlations
from almrr_pipeline.evaluation.curves import auroc, trace_curve


def measure_nearest_image(
    training: Sequence[Path],
    tested: Sequence[Path],
    labels: Sequence[bool],
    defect_types: Sequence[str],
    reading: Reading | None = None,
    region: Region | None = None,
) -> dict[str, Any]:
    """Image AUROC, overall and by defect type, and fractions of images with a training twin.

    An image's score is 1 minus its correlation with the nearest training image. `labels` are True
    where a test image is defective, `reading` is that of the files' values, `region` what of the
    images counts. What has no normal or no defective test image is None.
    """
    likeness = correlations(compute_signatures([*training, *tested], reading, region))
    nearest = likeness[len(training) :, : len(training)].max(axis=1).astype(np.float64)
    defective, types = np.asarray(labels, dtype=bool), np.asarray(defect_types)

    def rank(chosen: Bools) -> float | None:
        of_both = 0 < int(defective[chosen].sum()) < int(chosen.sum())
        return (
            float(auroc(trace_curve(1 - nearest[chosen], defective[chosen]))) if of_both else None
        )

    def with_twin(chosen: Bools) -> float | None:
        return float((nearest[chosen] > SAME_TILE).mean()) if chosen.any() else None

    by_type = {name: rank(~defective | (types == name)) for name in sorted(set(types[defective]))}
    return {
        "image_auroc": rank(np.ones_like(defective)),
        "normal_with_twin": with_twin(~defective),
        "defective_with_twin": with_twin(defective),
        "defect_types": {name: {"image_auroc": value} for name, value in by_type.items()},
    }
