"""inference.json: what turns a model's maps into scores and verdicts; it lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from almrr_pipeline.config import Positive, Section, Side, Tiling
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.thresholds import Threshold, withdraw_guarantee

SETTINGS_FILE = "inference.json"
MODEL_FILES = ("model.safetensors", "config.json", SETTINGS_FILE)
"""What a model folder holds: weights, architecture, and these settings."""


class Thresholds(Section):
    """Thresholds from validation images; what lies above (never at) one is anomalous."""

    image: Threshold
    """For the score of an image."""
    pixel: Threshold
    """For the values of the anomaly map: the outline."""


class InferenceConfig(Section):
    """How images are brought to the network, how maps become scores, and the thresholds."""

    category: str
    """Category id that the model was trained on."""
    image_size: tuple[Side, Side]
    """Rows and columns of the network's input."""
    tiling: Tiling = Tiling()
    smoothing: Positive = 9
    """Side of the mean filter before the image score's maximum, in pixels of the map at the network's scale."""
    flips: bool = False
    """Whether a map is the mean over the image and its mirror images; see `almrr_pipeline.inference.tta`."""
    thresholds: Thresholds | None = None
    """None until the model has been calibrated."""

    def without_guarantee(self) -> InferenceConfig:
        """The same thresholds without a promise, for weights that were chosen on the calibration images."""
        if self.thresholds is None:
            return self
        image, pixel = (withdraw_guarantee(one) for one in (self.thresholds.image, self.thresholds.pixel))
        return self.model_copy(update={"thresholds": Thresholds(image=image, pixel=pixel)})

    def save(self, folder: Path) -> None:
        """Write inference.json into `folder`, beside first and then renamed."""
        target = folder / SETTINGS_FILE
        beside = target.with_name(target.name + ".partial")
        beside.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        beside.replace(target)

    @classmethod
    def load(cls, folder: Path) -> InferenceConfig:
        """Read inference.json from a model folder.

        Raises:
            AlmrrError: `folder` is no model folder, or the file does not hold these settings; says what is wrong.
        """
        check_model_folder(folder)
        path = folder / SETTINGS_FILE
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, ValidationError) as error:
            raise AlmrrError(
                f"{path} does not hold a model's settings ({_first_line(error)}); train or calibrate the model again."
            ) from error


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that does not hold a trained model.

    Raises:
        AlmrrError: there is no such folder, or files of a model are missing from it; names them.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise AlmrrError(f"The model folder {folder} {what}; name one such as data/06_models/CATEGORY.")
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise AlmrrError(
            f"{folder} is no model folder: {', '.join(missing)} missing; name one such as data/06_models/CATEGORY."
        )


def _first_line(error: Exception) -> str:
    """What is wrong in one line; pydantic's own text has one for each fault and more."""
    if isinstance(error, ValidationError):
        faults = error.errors()
        return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in faults)
    return str(error)
