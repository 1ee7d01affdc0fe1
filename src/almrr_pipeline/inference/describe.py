"""Description of a model folder, read from its files without building the network."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.common.region import Region
from almrr_pipeline.config import Tiling
from almrr_pipeline.evaluation.thresholds import Threshold
from almrr_pipeline.inference.inference_config import InferenceConfig
from almrr_pipeline.model.weights_io import WEIGHTS_FILE, read_config

_MODULES = {
    "backbone": "backbone (frozen)",
    "mfrm": "reconstruction (MFRM)",
    "summary": "projection",
    "residual": "residual mixtures",
    "memory": "memory of features",
    "frm": "refinement (FRM)",
}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "owner", "factor")
"""Measured, not trained."""


def describe_model(folder: Path) -> str:
    """Describe a model in a few lines: network, input, thresholds and guarantee, parameter counts.

    Raises:
        AlmrrError: `folder` is no model folder, or one of its files cannot be read.
    """
    config = InferenceConfig.load(folder)
    rows, columns = config.image_size
    side = config.smoothing
    flips = "mean over the image and its three flips" if config.flips else "of the image as it is"
    counts = count_parameters(folder)
    return "\n".join(
        [
            f"ALMRR model of {config.category}",
            f"backbone          {read_config(folder).backbone.name}",
            f"input             {rows} x {columns} pixels, {_describe_tiling(config.tiling)}",
            f"anomaly map       {flips}",
            *_describe_region(config.region),
            f"image score       largest mean over {side} x {side} pixels of the map",
            f"image threshold   {_describe_threshold(config.image_threshold)}",
            f"pixel threshold   {_describe_threshold(config.pixel_threshold)}",
            f"parameters        {sum(counts.values()) / 1e6:8.2f} M",
            *(f"  {module:<24}{count / 1e6:8.2f} M" for module, count in counts.items()),
        ]
    )


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each module of a saved model, from the header of its weights file.

    Raises:
        AlmrrError: the weights file cannot be read.
    """
    path = folder / WEIGHTS_FILE
    counts: Counter[str] = Counter()
    try:
        with safe_open(path, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                module, _, rest = name.partition(".")
                if module in _MODULES and rest.rpartition(".")[2] not in _STATISTICS:
                    counts[module] += math.prod(tensors.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise AlmrrError(f"{path} cannot be read as weights ({error}).") from error
    return {label: counts[module] for module, label in _MODULES.items() if counts[module]}


def _describe_region(region: Region | None) -> list[str]:
    return [f"region            {region.fraction:.1%} of the image counts"] if region else []


def _describe_tiling(tiling: Tiling) -> str:
    if not tiling.enabled:
        return "images are resized to it"
    tiles = f"tiles that overlap by {tiling.overlap:.0%} or more"
    return f"images are scaled by {tiling.scale:g} and cut into {tiles}"


def _describe_threshold(threshold: Threshold | None) -> str:
    if threshold and threshold.value is not None:
        return f"{threshold.value:.6g} ({threshold.guarantee})"
    return f"none: {threshold.undefined if threshold else 'the model was never calibrated'}"
