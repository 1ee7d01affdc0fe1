"""The region of interest of a category: decided by its images, and what it does to their labels."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.masks import read_mask
from almrr_pipeline.common.region import Region, draw_region
from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.account import GOOD
from almrr_pipeline.datasets.manifest import mask_reading

logger = logging.getLogger(__name__)


def decide_region(sizes: Sequence[tuple[int, int]], settings: DataSettings) -> Region | None:
    """The region that `data.region` states for images of these sizes, (rows, columns); or None.

    Raises:
        AlmrrError: the region cannot be read or is empty, or the images, or it, have other
            proportions than most of them.
    """
    if settings.region is None or not sizes:
        return None
    (usual, _), *_ = Counter(sizes).most_common(1)
    region = draw_region(settings.region, usual)
    if others := [size for size in sizes if not region.fits(size)]:
        raise AlmrrError(
            f"data.region: {len(others)} of {len(sizes)} images have other proportions, such as "
            f"{others[0][1]} x {others[0][0]} where most are {usual[1]} x {usual[0]} pixels; take "
            "all of them in the same way."
        )
    return region


def is_outside(mask: Path, region: Region, settings: DataSettings) -> bool:
    """Whether a mask shows defects, and all of them are outside of the region."""
    defects = read_mask(mask, reading=mask_reading(settings))
    return bool(defects.any()) and not (defects & region.at(defects.shape)).any()


def pass_outside(
    manifest: pd.DataFrame, root: Path, region: Region, settings: DataSettings
) -> pd.DataFrame:
    """Label the images normal, with a warning, whose defects are all outside of the region."""
    passed = [bool(name) and is_outside(root / name, region, settings) for name in manifest["mask"]]
    if any(passed):
        logger.warning(
            "%d of %d images with a mask show defects outside of data.region alone: they count as "
            "normal.",
            *(sum(passed), (manifest["mask"] != "").sum()),
        )
    changed = manifest.copy()
    changed.loc[passed, ["label", "defect_type", "mask"]] = ["normal", GOOD, ""]
    return changed
