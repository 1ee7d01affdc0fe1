"""Time and memory of all metrics on a test set of MVTec's size: 117 maps of 1024 x 1024.

    python benchmarks/metrics.py [--fraction 0.02] [--bootstrap 1000] [--scikit-learn 8]
        [--json FILE]

28 images are normal and 89 defective. The maps are on disk, as after prediction, and their values
have no ties on purpose, which is the worst case. The time includes reading them. The peak is the
growth of memory while metrics and intervals are computed. For comparison: memory per pixel of
scikit-learn's AUROC and average precision, on 2^20 pixels times --scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score
from timing import Timing, measure, measure_peak_memory

from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.evaluate import Evaluation, evaluate
from almrr_pipeline.evaluation.maps import AnomalyMaps
from almrr_pipeline.evaluation.thresholds import conformal_threshold

NORMAL, DEFECTIVE, SIDE = 28, 89, 1024
DEFECT_TYPES = ("color", "cut", "hole", "metal_contamination", "thread")


class Masks:
    """Ground truth files, read one at a time; None for normal images."""

    def __init__(self, folder: Path) -> None:
        """Read from a folder that `draw_test_set` filled."""
        self._folder = folder

    def __len__(self) -> int:
        """Number of images."""
        return NORMAL + DEFECTIVE

    def __getitem__(self, index: int) -> npt.NDArray[np.bool_] | None:
        """One mask, bool (1024, 1024)."""
        if index < NORMAL:
            return None
        mask: npt.NDArray[np.bool_] = np.load(self._folder / f"mask_{index:03d}.npy")
        return mask


def draw_test_set(folder: Path, fraction: float, generator: np.random.Generator) -> list[Path]:
    """Write maps and masks; in defective images three discs cover about `fraction` of the image.

    Returns:
        The paths of the maps, float32 (1024, 1024) each.
    """
    radius = SIDE * np.sqrt(fraction / (3 * np.pi))
    rows, columns = np.ogrid[:SIDE, :SIDE]
    paths = []
    for index in range(NORMAL + DEFECTIVE):
        values = generator.random((SIDE, SIDE), dtype=np.float32)
        if index >= NORMAL:
            centers = generator.uniform(0, SIDE, (3, 2))
            mask = np.any(
                [(rows - y) ** 2 + (columns - x) ** 2 < radius**2 for y, x in centers], axis=0
            )
            values = (values + generator.uniform(0.1, 1.0) * mask).astype(np.float32)
            np.save(folder / f"mask_{index:03d}.npy", mask)
        paths.append(folder / f"map_{index:03d}.npy")
        np.save(paths[-1], values)
    return paths


def measure_evaluation(folder: Path, fraction: float, bootstrap: int) -> dict[str, float | None]:
    """Evaluate once with intervals and once without.

    Returns:
        Seconds with and without intervals, the peak of memory in GiB (None where it cannot be
        read), and what the test set was like.
    """
    maps = AnomalyMaps(draw_test_set(folder, fraction, np.random.default_rng(0)))
    labels = np.arange(len(maps)) >= NORMAL
    scores = np.array([float(values.max()) for values in maps])
    defect_types = [
        "good" if not defective else DEFECT_TYPES[index % len(DEFECT_TYPES)]
        for index, defective in enumerate(labels)
    ]
    threshold = conformal_threshold(np.random.default_rng(1).random(76), 0.05)

    def evaluate_all(resamplings: int) -> Evaluation:
        return evaluate(
            maps,
            Masks(folder),
            scores,
            labels,
            defect_types,
            EvaluateSettings(bootstrap=resamplings),
            thresholds=(threshold, threshold),
        )

    found: list[Evaluation] = []
    timings: list[Timing] = []

    def time_with(resamplings: int) -> None:
        timings.append(
            measure(lambda: found.append(evaluate_all(resamplings)), repeats=1, warmup=0)
        )

    peak = measure_peak_memory(lambda: time_with(bootstrap))
    time_with(0)
    counts = found[0].metrics["counts"]
    return {
        "seconds_with_intervals": timings[0].median,
        "seconds": timings[1].median,
        "peak_gib": None if peak is None else peak / 2**30,
        "megapixels": (counts["normal_pixels"] + counts["defective_pixels"]) / 1e6,
        "defective_fraction": found[0].metrics["pixel_defective_fraction"],
    }


def measure_scikit_learn(pixels: int) -> float | None:
    """Peak bytes per pixel of scikit-learn's AUROC and AP with their arguments, if readable."""

    def score() -> None:
        generator = np.random.default_rng(0)
        scores, labels = generator.random(pixels, dtype=np.float32), generator.random(pixels) < 0.02
        roc_auc_score(labels, scores)
        average_precision_score(labels, scores)

    peak = measure_peak_memory(score)
    return None if peak is None else peak / pixels


def main() -> None:
    """Parse the command line, measure, print a line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fraction", type=float, default=0.02, help="anomalous fraction of a defective image"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamplings for the intervals")
    parser.add_argument(
        "--scikit-learn", type=int, default=8, help="size of its test, in 2^20 pixels"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_evaluation(Path(folder), arguments.fraction, arguments.bootstrap)
    figures["scikit_learn_bytes_per_pixel"] = measure_scikit_learn(arguments.scikit_learn << 20)
    for name, value in figures.items():
        print(f"{name:30}" + ("unknown" if value is None else f"{value:10.3f}"))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
