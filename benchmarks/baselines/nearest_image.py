"""Images scored by their distance to the nearest training image: recognition alone.

    python benchmarks/nearest_image.py --data ../shared/data --category mt_defect

Whole images are compared, small and with light and contrast taken off: nothing here can see a
defect. Where this baseline separates defective images from normal ones, the split does: normal
test images have twins in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.registry import dataset_for
from almrr_pipeline.datasets.same_tile import SAME_TILE, compute_signatures, correlations


def score_images(train: list[Item], test: list[Item]) -> npt.NDArray[np.float64]:
    """Return for each test image 1 minus its correlation with the nearest training image."""
    likeness = correlations(compute_signatures([item.image for item in (*train, *test)]))
    scores: npt.NDArray[np.float64] = 1.0 - likeness[len(train) :, : len(train)].max(axis=1).astype(
        np.float64
    )
    return scores


def evaluate(items: list[Item]) -> dict[str, float]:
    """Image AUROC, overall and by defect type, and fractions of images with a training twin."""
    train, test = ([item for item in items if item.split == split] for split in ("train", "test"))
    scores = score_images(train, test)
    defective = np.array([item.label == "defective" for item in test])
    kinds = np.array([item.defect_type for item in test])
    figures = {
        "image_auroc": float(roc_auc_score(defective, scores)),
        "normal_with_twin": float((scores[~defective] < 1.0 - SAME_TILE).mean()),
        "defective_with_twin": float((scores[defective] < 1.0 - SAME_TILE).mean()),
    }
    for kind in sorted(set(kinds[defective])):
        shown = ~defective | (kinds == kind)
        figures[f"image_auroc_{kind}"] = float(roc_auc_score(defective[shown], scores[shown]))
    return figures


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with one folder a category, as fetched"
    )
    parser.add_argument(
        "--category", default="mt_defect", help="category id with normal test images"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = evaluate(
        dataset_for(arguments.category).items(
            arguments.category, arguments.data / arguments.category
        )
    )
    for name, value in figures.items():
        print(f"{name:28}{value:8.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
