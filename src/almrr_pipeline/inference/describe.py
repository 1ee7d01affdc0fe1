"""What a model folder holds, in words; read from its files without building the network."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from almrr_pipeline.config import Tiling
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.thresholds import Threshold
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.model.weights_io import read_config

_PARTS = {
    "backbone": "backbone (frozen)",
    "mfrm": "reconstruction (MFRM)",
    "summary": "projection",
    "frm": "refinement (FRM)",
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last names of tensors that are measured rather than trained."""


def describe_model(folder: Path) -> str:
    """Say in a few lines what a model is: network, input, thresholds with their guarantee, numbers of parameters.

    Raises:
        AlmrrError: `folder` is no model folder, or one of its files cannot be read.
    """
    settings = InferenceConfig.load(folder)
    backbone = read_config(folder).backbone
    rows, columns = settings.image_size
    lines = [
        f"ALMRR model of {settings.category}",
        f"backbone          {backbone.name}",
        f"input             {rows} x {columns} pixels, {_describe_tiling(settings.tiling)}",
        f"anomaly map       {_describe_mirrors(settings.flips)}",
        f"image score       largest mean over {settings.smoothing} x {settings.smoothing} pixels of the map",
    ]
    for kind in ("image", "pixel"):
        threshold = getattr(settings.thresholds, kind) if settings.thresholds else None
        lines.append(f"{kind} threshold   {_describe_threshold(threshold)}")
    counts = count_parameters(folder)
    lines.append(f"parameters        {_millions(sum(counts.values()))}")
    lines += [f"  {part:<24}{_millions(count)}" for part, count in counts.items()]
    return "\n".join(lines)


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each part of a saved model, from the header of its weights file; the frozen backbone's included.

    Raises:
        AlmrrError: the weights file cannot be read.
    """
    path = folder / "model.safetensors"
    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                part, _, rest = name.partition(".")
                if part in _PARTS and rest.rpartition(".")[2] not in _STATISTICS:
                    counts[_PARTS[part]] += math.prod(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read as weights ({error}).") from error
    return {part: counts[part] for part in _PARTS.values() if counts[part]}


def _describe_tiling(tiling: Tiling) -> str:
    if not tiling.enabled:
        return "images are resized to it"
    return f"images are scaled by {tiling.scale:g} and cut into tiles that overlap by {tiling.overlap:.0%} or more"


def _describe_mirrors(flips: bool) -> str:
    return "mean over the image and its three mirror images" if flips else "of the image as it is"


def _describe_threshold(threshold: Threshold | None) -> str:
    if threshold is None:
        return "none: the model was never calibrated"
    if threshold.value is None:
        return f"none: {threshold.undefined}"
    return f"{threshold.value:.6g} ({threshold.guarantee})"


def _millions(count: int) -> str:
    return f"{count / 1e6:8.2f} M"
