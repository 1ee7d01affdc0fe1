"""Area under the per-region overlap curve (AUPRO), in which every anomalous region counts alike.

Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.2. Regions are the
connected components of the ground truth. The curve is the mean over the regions of the fraction
that is found, against the false positive rate over the normal pixels of all test images; its area
up to a limit of the false positive rate is divided by that limit.
"""

from __future__ import annotations

import numpy as np

from almrr_pipeline.common.arrays import Floats
from almrr_pipeline.evaluation.curves import Curve, previous


def aupro(curve: Curve, limit: float) -> Floats:
    """Normalized area under the per-region overlap curve up to a false positive rate.

    The curve is piecewise linear: horizontal while only normal pixels are added, slanted where
    normal and anomalous pixels are tied. It is integrated exactly; the piece that crosses the limit
    is cut there.

    Args:
        curve: counts of pixels, with overlap; (..., K).
        limit: largest false positive rate, in (0, 1].

    Returns:
        In [0, 1], shape (...); nan without normal pixels or regions.
    """
    assert curve.overlap is not None, "only pixels have regions"
    end = np.asarray(limit * curve.negatives)[..., None]
    low, high = previous(curve.overlap), curve.overlap
    horizontal = np.minimum(curve.fp_above, end) - np.minimum(previous(curve.fp), end)
    slanted = np.asarray(curve.fp - curve.fp_above, dtype=np.float64)
    inside = np.clip(end - curve.fp_above, 0.0, slanted)
    fraction = np.divide(inside, slanted, out=np.zeros(inside.shape), where=slanted > 0)
    area = horizontal * low + inside * (low + (high - low) * fraction / 2.0)
    beyond = np.maximum(end[..., 0] - curve.fp[..., -1], 0.0) * high[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((area.sum(axis=-1) + beyond) / end[..., 0])


def name_aupro(limit: float) -> str:
    """Key in metrics.json: aupro_30 for 0.3, aupro_05 for 0.05, aupro_12_5 for 0.125."""
    whole, _, rest = f"{100.0 * limit:.10g}".partition(".")
    return f"aupro_{whole:0>2}" + (f"_{rest}" if rest else "")
