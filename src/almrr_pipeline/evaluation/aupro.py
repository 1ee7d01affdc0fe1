"""Per-region overlap: every defective region counts alike, large or small.

Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.2: regions are the connected components
of the ground truth; the curve is the mean over the regions of the share that is found, against the false positive rate
over all normal pixels of all test images; its area up to a false positive rate is divided by that rate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from almrr_pipeline.evaluation.curves import Curve, Floats, shift

_EIGHT_NEIGHBORS = np.ones((3, 3), dtype=np.int64)


def label_regions(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], int]:
    """Number the 8-connected defective regions of a ground truth mask.

    Returns:
        int32 (H, W), 0 where normal and 1 to n in the regions; and n.
    """
    labeled = np.zeros(mask.shape, dtype=np.int32)
    count = int(scipy.ndimage.label(mask, structure=_EIGHT_NEIGHBORS, output=labeled))
    return labeled, count


def aupro(curve: Curve, limit: float) -> Floats:
    """Area under the per-region overlap curve up to a false positive rate, divided by that rate.

    The curve is a chain of straight pieces: level while only normal pixels are added, slanted where normal and
    defective pixels share a level. It is integrated exactly, the piece that crosses the limit being cut there.

    Args:
        curve: counts of pixels, with overlap; (..., K).
        limit: largest false positive rate, in (0, 1].

    Returns:
        In [0, 1], shape (...); nan where there is no normal pixel or no region.
    """
    assert curve.overlap is not None, "only pixels have regions"
    end = np.asarray(limit * curve.normal)[..., None]
    low, high = shift(curve.overlap), curve.overlap
    level_pieces = np.minimum(curve.false_before, end) - np.minimum(shift(curve.false), end)
    slanted = np.asarray(curve.false - curve.false_before, dtype=np.float64)
    inside = np.clip(end - curve.false_before, 0.0, slanted)
    share = np.divide(inside, slanted, out=np.zeros(inside.shape), where=slanted > 0)
    area = level_pieces * low + inside * (low + (high - low) * share / 2.0)
    beyond = np.maximum(end[..., 0] - curve.false[..., -1], 0.0) * high[..., -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((area.sum(axis=-1) + beyond) / end[..., 0])


def name_aupro(limit: float) -> str:
    """Key of the metric in metrics.json: 0.3 becomes aupro_30, 0.05 aupro_05, 0.125 aupro_12_5."""
    whole, _, rest = f"{100.0 * limit:.10g}".partition(".")
    return f"aupro_{whole:0>2}" + (f"_{rest}" if rest else "")
