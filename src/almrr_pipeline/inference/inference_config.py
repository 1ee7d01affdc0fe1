"""inference.json, next to a model's weights: what turns its maps into scores and verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, field_validator

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.files import write_atomically
from almrr_pipeline.common.images import Reading, ValueRange
from almrr_pipeline.common.region import Region
from almrr_pipeline.config import Section, Side, Tiling, list_faults
from almrr_pipeline.evaluation.thresholds import Threshold, find_fault, withdraw_guarantee
from almrr_pipeline.inference.looks import UsualLook
from almrr_pipeline.model.checksums import (
    check_files,
    has_checksums,
    read_settings,
    write_checksums,
)

INFERENCE_FILE = "inference.json"
MODEL_FILES = ("model.safetensors", "config.json", INFERENCE_FILE)
"""Files of a model folder: weights, architecture, and the settings of this module."""
_WIDEST_SMOOTHING = 4096  # pixels: more than the side of any map; it bounds the filter's time
_KEY_OF_0_1 = ("mirrored",)
"""Where a fault is reported in an inference.json of version 0.1; `flips` today."""


class Thresholds(Section):
    """Thresholds from validation images; what is above (never at) one is anomalous."""

    image: Threshold  # for the score of an image
    pixel: Threshold  # for the values of the anomaly map: the outline
    usual: UsualLook | None = None  # of the images that they were chosen on

    @field_validator("image", "pixel")
    @classmethod
    def _check_numbers(cls, threshold: Threshold) -> Threshold:
        if fault := find_fault(threshold):
            raise ValueError(fault)
        return threshold


class InferenceConfig(Section):
    """How images are brought to the network, how maps become scores, and the thresholds."""

    # that the model was trained on; never a path
    category: Annotated[str, Field(max_length=200, pattern=r"^[^/\\\x00-\x1f]+$")]
    image_size: tuple[Side, Side]  # rows and columns of the network's input
    tiling: Tiling = Tiling()
    reading: Reading = Reading()  # how files of more than 8 bits become 8-bit RGB, and size limit
    region: Region | None = None  # of interest; None: all of the images counts
    # side of the image score's mean filter, in pixels at network scale
    smoothing: Annotated[int, Field(ge=1, le=_WIDEST_SMOOTHING)] = 9
    flips: bool = False  # test-time augmentation; see `almrr_pipeline.inference.tta`
    thresholds: Thresholds | None = None  # None until the model has been calibrated

    @property
    def image_threshold(self) -> Threshold | None:
        """The threshold of image scores, if the model has been calibrated."""
        return self.thresholds.image if self.thresholds else None

    @property
    def pixel_threshold(self) -> Threshold | None:
        """The threshold of the map's values, if the model has been calibrated."""
        return self.thresholds.pixel if self.thresholds else None

    def with_range(self, ends: ValueRange) -> InferenceConfig:
        """Replace the range of all images of more than 8 bits; AlmrrError if it is none."""
        if not -math.inf < ends[0] < ends[1] < math.inf:
            raise AlmrrError(f"{ends[0]} to {ends[1]} is no range; black is smaller than white.")
        reading = self.reading.model_copy(update={"value_ranges": {"any": ends}})
        return self.model_copy(update={"reading": reading})

    def without_guarantee(self) -> InferenceConfig:
        """Withdraw the thresholds' guarantee: weights were chosen on the validation images."""
        if self.thresholds is None:
            return self
        of = self.thresholds
        image, pixel = withdraw_guarantee(of.image), withdraw_guarantee(of.pixel)
        withdrawn = Thresholds(image=image, pixel=pixel, usual=of.usual)
        return self.model_copy(update={"thresholds": withdrawn})

    def save(self, folder: Path) -> None:
        """Write inference.json into a model folder, atomically, and its checksum if others are."""
        with write_atomically(folder / INFERENCE_FILE) as path:
            path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if has_checksums(folder):
            write_checksums(folder, INFERENCE_FILE)

    @classmethod
    def load(cls, folder: Path) -> InferenceConfig:
        """Read inference.json from a model folder.

        Raises:
            AlmrrError: `folder` is no model folder, or the file does not hold these settings.
        """
        check_model_folder(folder)
        path = folder / INFERENCE_FILE
        try:
            config = cls.model_validate_json(read_settings(path))
        except ValidationError as error:
            if any(fault["loc"] == _KEY_OF_0_1 for fault in error.errors()):
                raise AlmrrError(
                    f"{folder} is a model of almrr-pipeline 0.1, which this version cannot read; "
                    "train it again, or use almrr-pipeline 0.1."
                ) from None
            raise AlmrrError(
                f"{path} does not hold a model's settings ({list_faults(error)}); train or "
                "calibrate the model again."
            ) from error
        check_files(folder, INFERENCE_FILE, optional=True)
        return config


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that does not hold a trained model.

    Raises:
        AlmrrError: there is no such folder, or files of a model are missing from it; names them.
    """
    advice = "name one such as data/06_models/CATEGORY/seed_0"
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise AlmrrError(f"The model folder {folder} {reason}; {advice}.")
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise AlmrrError(f"{folder} is no model folder: {', '.join(missing)} missing; {advice}.")
