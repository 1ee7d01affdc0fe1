"""The baseline pipeline: what a memory bank and the nearest image reach on the same images."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from almrr_pipeline.baselines.memory_bank import build_memory_bank
from almrr_pipeline.baselines.nearest_image import measure_nearest_image
from almrr_pipeline.common.files import report_disk_errors
from almrr_pipeline.common.region import from_file
from almrr_pipeline.config import BackboneSettings, DataSettings, EvaluateSettings
from almrr_pipeline.datasets.manifest import image_reading, mask_reading, training_split
from almrr_pipeline.evaluation.evaluate import evaluate as evaluate_maps
from almrr_pipeline.evaluation.maps import AnomalyMaps, GroundTruth
from almrr_pipeline.inference.map_predictor import MapPredictor
from almrr_pipeline.model.backbone import build_backbone
from almrr_pipeline.pipelines.per_category import step


def fill_memory_bank(
    backbone_weights: Path,
    manifest: pd.DataFrame,
    region_file: bytes,
    data_folder: Path,
    backbone: BackboneSettings,
    data: DataSettings,
) -> MapPredictor:
    """Remember patch features of the images that ALMRR is trained on."""
    training, _ = training_split(manifest, fraction=data.validation_fraction)
    frozen = build_backbone(backbone, weights=backbone_weights / "backbone.safetensors")
    paths = [data_folder / name for name in training]
    return build_memory_bank(
        frozen,
        paths,
        data.image_size,
        data.tiling,
        reading=image_reading(manifest, data),
        region=from_file(region_file),
    )


def evaluate_memory_bank(
    memory_bank: MapPredictor,
    manifest: pd.DataFrame,
    data_folder: Path,
    data: DataSettings,
    evaluate: EvaluateSettings,
    scratch: Path,
) -> dict[str, Any]:
    """All metrics of the memory bank's maps, as those of ALMRR's are computed; no intervals."""
    rows = manifest[manifest["split"] == "test"]
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix="memory_bank") as folder:
        scores = []
        for scaled in memory_bank.maps(data_folder / name for name in rows["image"]):
            with report_disk_errors(scratch, only_full=True):
                np.save(Path(folder, f"{scaled.index:06d}.npy"), scaled.anomaly_map)
            scores.append(float(scaled.anomaly_map.max()))
        maps = AnomalyMaps.load(Path(folder))
        masks = [data_folder / name if name else None for name in rows["mask"]]
        return evaluate_maps(
            maps,
            GroundTruth(masks, maps, mask_reading(data), memory_bank.region),
            scores,
            rows["label"] == "defective",
            list(rows["defect_type"]),
            evaluate.model_copy(update={"bootstrap": 0, "oracle": False}),
            thresholds=(None, None),
        ).metrics


def evaluate_nearest_image(
    manifest: pd.DataFrame, region_file: bytes, data_folder: Path, data: DataSettings
) -> dict[str, Any]:
    """Measure what recognizing whole images is worth on this split."""
    training, _ = training_split(manifest, fraction=data.validation_fraction)
    rows = manifest[manifest["split"] == "test"]
    return measure_nearest_image(
        [data_folder / name for name in training],
        [data_folder / name for name in rows["image"]],
        list(rows["label"] == "defective"),
        list(rows["defect_type"]),
        image_reading(manifest, data),
        from_file(region_file),
    )


def join_baselines(memory_bank: dict[str, Any], nearest_image: dict[str, Any]) -> dict[str, Any]:
    """Join both, their metrics with the baseline's name in front, defect types below."""
    both = {"memory_bank": memory_bank, "nearest_image": nearest_image}
    metrics = {
        f"{name}_{metric}": value
        for name, values in both.items()
        for metric, value in values.items()
        if isinstance(value, int | float | None) and metric != "pixel_defective_fraction"
    }
    nested = {key: memory_bank[key] for key in ("defect_types", "undefined")}
    by_type = {"defect_types": nearest_image["defect_types"]}
    return metrics | {"memory_bank": nested, "nearest_image": by_type}


NODES = [
    step(
        fill_memory_bank,
        "backbone_weights manifest region_file data_folder params:backbone params:data",
        "memory_bank",
    ),
    step(
        evaluate_memory_bank,
        "memory_bank manifest data_folder params:data params:evaluate scratch_folder",
        "memory_bank_metrics",
    ),
    step(
        evaluate_nearest_image,
        "manifest region_file data_folder params:data",
        "nearest_image_metrics",
    ),
    step(join_baselines, "memory_bank_metrics nearest_image_metrics", "baselines"),
]
