"""The pipeline's nearest training image, on a folder of any category: recognition alone.

    python benchmarks/baselines/nearest_image.py --data ../shared/data --category mt_defect

See almrr_pipeline/baselines/nearest_image.py; in a run of the pipeline the report has its figures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from almrr_pipeline.baselines.nearest_image import measure_nearest_image
from almrr_pipeline.datasets.manifest import Item
from almrr_pipeline.datasets.registry import dataset_for


def evaluate(items: list[Item]) -> dict[str, Any]:
    """Figures of `measure_nearest_image` for all training and test images."""
    test = [item for item in items if item.split == "test"]
    return measure_nearest_image(
        [item.image for item in items if item.split == "train"],
        [item.image for item in test],
        [item.label == "defective" for item in test],
        [item.defect_type for item in test],
    )


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
    types = {
        f"image_auroc {name}": of["image_auroc"] for name, of in figures["defect_types"].items()
    }
    for name, value in (figures | types).items():
        if name == "defect_types":
            continue
        print(f"{name:28}" + ("undefined" if value is None else f"{value:8.4f}"))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
