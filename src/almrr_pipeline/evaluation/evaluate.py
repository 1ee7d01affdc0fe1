"""From anomaly maps and image scores to the numbers of record, metrics.json, and the curves beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.evaluation.bootstrap import PixelResampler, draw_weights, resample_images
from almrr_pipeline.evaluation.curves import (
    PR_COLUMNS,
    PRO_COLUMNS,
    ROC_COLUMNS,
    Curve,
    Floats,
    best_f1_level,
    f1_max,
    tabulate_pr,
    tabulate_pro,
    tabulate_roc,
)
from almrr_pipeline.evaluation.measures import Measured, measure_images, measure_pixels
from almrr_pipeline.evaluation.pixels import (
    Bools,
    DefectivePixels,
    Indexed,
    MapArray,
    ImageCounts,
    PixelSource,
    choose_edges,
    count_normal,
    gather_defective,
    just_above,
)
from almrr_pipeline.evaluation.thresholds import Threshold, rates_at

Metrics = dict[str, Any]
"""Ready for JSON: numbers, None, sentences, and lists and dictionaries of them."""


@dataclass(frozen=True)
class Evaluation:
    """What one category's test set gave.

    Attributes:
        metrics: the content of metrics.json; docs/metrics.md says what each entry means.
        roc: pixels: fpr, tpr, level. At most 1000 rows, as all curves; no row where undefined.
        pr: pixels: recall, precision, level.
        pro: regions: fpr, pro; up to the largest of the limits.
        image_roc: images: fpr, tpr, level.
        image_pr: images: recall, precision, level.
    """

    metrics: Metrics
    roc: pd.DataFrame
    pr: pd.DataFrame
    pro: pd.DataFrame
    image_roc: pd.DataFrame
    image_pr: pd.DataFrame


def evaluate(
    maps: Indexed[MapArray],
    masks: Indexed[Bools | None] | None,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    defects: Sequence[str],
    *,
    image_threshold: Threshold | None,
    pixel_threshold: Threshold | None,
    aupro_limits: Sequence[float] = (0.3, 0.05),
    bootstrap: int = 1000,
    seed: int = 0,
    oracle: bool = False,
) -> Evaluation:
    """Compute every metric of a test set, exactly, reading the maps one at a time, twice at most.

    Args:
        maps: anomaly maps, float32 (H, W) each, larger is more anomalous; sizes may vary.
        masks: ground truth of the maps' sizes, bool (H, W) each; None for a normal image, or for a defective one
            whose ground truth is unknown; None as a whole where there is no ground truth at all.
        scores: image scores, larger is more anomalous, shape (n,).
        labels: True where the image is defective, shape (n,).
        defects: defect type of each image, length n; looked at for defective ones only.
        image_threshold: decision threshold of the image scores, from validation images; None if there is none.
        pixel_threshold: the same for the anomaly maps' values.
        aupro_limits: false positive rates up to which the overlap curve is integrated, each in (0, 1].
        bootstrap: resamplings for the 95 % intervals; 0 leaves them out.
        seed: of the resampling.
        oracle: also report what a threshold chosen on this very test set would give, as oracle_*.

    Raises:
        AlmrrError: lengths or shapes differ, a value is not finite, or a normal image has
            defective pixels.
    """
    ranked, labeled, kinds = _checked(len(maps), masks, scores, labels, defects)
    images = measure_images(ranked, labeled)
    pixels = _study_pixels(PixelSource(maps, masks, labeled), kinds, pixel_threshold, aupro_limits)
    metrics: Metrics = {
        **images.values(),
        **pixels.overall.values(),
        "pixel_defective_share": pixels.defective_share(),
        "counts": pixels.count(np.ones_like(labeled)),
        "thresholds": {
            "image": _describe_threshold(image_threshold, ranked, labeled),
            "pixel": _describe_threshold(pixel_threshold, pixels.images.peak, labeled) | pixels.outlined_shares(),
        },
        "intervals": _estimate_intervals(images, pixels, ranked, bootstrap, seed),
        "defects": {
            name: _describe_kind(ranked, pixels, name, of_kind, image_threshold) for name, of_kind in kinds.items()
        },
        "undefined": {**images.undefined(), **pixels.overall.undefined()},
    }
    if oracle:
        metrics |= _choose_on_test_set(images.curve, pixels.overall.curve)
    return Evaluation(metrics, **_tabulate(images.curve, pixels.overall.curve, max(aupro_limits)))


@dataclass(frozen=True)
class _PixelStudy:
    """All that is known of a test set's pixels.

    Attributes:
        labels: True where the image is defective, shape (n,).
        known: True where the ground truth is known, shape (n,).
        threshold: above which a pixel is outlined; None if there is none.
        defective: the defective pixels.
        images: the normal pixels, counted by image.
        overall: metrics of all images.
        kinds: values and undefined ones of each defect type, against the normal images.
    """

    labels: Bools
    known: Bools
    threshold: float | None
    defective: DefectivePixels
    images: ImageCounts
    overall: Measured
    kinds: dict[str, tuple[dict[str, float | None], dict[str, str]]]

    def defective_share(self) -> float | None:
        """Share of defective pixels where the ground truth is known: the pixel AP of a map that knows nothing."""
        defective, normal = len(self.defective.score), int(self.images.normals.sum())
        return _divide(defective, defective + normal) if self.labels[self.known].any() else None

    def outlined_shares(self) -> dict[str, float | None]:
        """Shares of the normal and of the defective pixels above the threshold."""
        if self.threshold is None:
            return {"normal_pixels_outlined": None, "defective_pixels_outlined": None}
        lowest = just_above(self.threshold)
        outlined, found = self.images.reaching(lowest), self.defective.score >= lowest
        return {
            "normal_pixels_outlined": _divide(outlined.sum(), self.images.normals.sum()),
            "defective_pixels_outlined": _divide(int(found.sum()), found.size),
        }

    def count(self, chosen: Bools) -> dict[str, int]:
        """Count what takes part, among the chosen images, shape (n,)."""
        regions = np.bincount(self.defective.image, minlength=len(chosen))
        pixels = np.zeros(len(chosen), np.int64)
        np.add.at(pixels, self.defective.image, self.defective.area)
        faulty = chosen & self.labels
        return {
            "images": int(chosen.sum()),
            "normal_images": int((chosen & ~self.labels).sum()),
            "defective_images": int(faulty.sum()),
            "defective_images_without_mask": int((faulty & ~self.known).sum()),
            "defective_images_with_empty_mask": int((faulty & self.known & (regions == 0)).sum()),
            "normal_pixels": int(self.images.normals[chosen].sum()),
            "defective_pixels": int(pixels[chosen].sum()),
            "regions": int(regions[chosen].sum()),
        }


def _checked(
    count: int,
    masks: Indexed[Bools | None] | None,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    defects: Sequence[str],
) -> tuple[Floats, Bools, dict[str, Bools]]:
    """Scores, labels, and the images of each defect type, if all of it fits together."""
    ranked, labeled = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    lengths = {"maps": count, "scores": len(ranked), "labels": len(labeled), "defects": len(defects)}
    if masks is not None:
        lengths["masks"] = len(masks)
    if len(set(lengths.values())) > 1:
        raise AlmrrError(
            f"The test set does not fit together: {lengths}; evaluate the manifest's test rows, all in one order."
        )
    if not np.isfinite(ranked).all():
        broken = int(np.flatnonzero(~np.isfinite(ranked))[0])
        raise AlmrrError(
            f"The score of test image {broken} is {ranked[broken]}; the model's weights are broken, train again."
        )
    names = np.asarray(defects, dtype=object)
    return ranked, labeled, {str(name): labeled & (names == name) for name in sorted(set(names[labeled]))}


def _study_pixels(
    source: PixelSource, kinds: dict[str, Bools], threshold: Threshold | None, aupro_limits: Sequence[float]
) -> _PixelStudy:
    """Read the maps: the defective pixels, then the normal ones of the normal images and of each kind in turn."""
    defective, known = gather_defective(source)
    levels = defective.score[defective.last_of_level()]
    value = None if threshold is None else threshold.value
    images = ImageCounts.empty(choose_edges(defective, value), len(known))
    groups = [np.flatnonzero(chosen & known) for chosen in (~source.labels, *kinds.values())]
    counts = count_normal(source, groups, levels, images)
    of_normal = total = next(counts)
    of_kinds: dict[str, tuple[dict[str, float | None], dict[str, str]]] = {}
    for (name, of_kind), of_this in zip(kinds.items(), counts, strict=True):
        total += of_this
        alone, absence = defective.of_images(of_kind), _say_absence(of_kind & known)
        measured = measure_pixels(alone, levels, of_normal + of_this, limits=aupro_limits, absence=absence)
        of_kinds[name] = measured.values(), measured.undefined()
    for index in np.flatnonzero(~known):
        images.peak[index] = source.read_map(int(index)).max()
    absence = _say_absence(source.labels & known) if source.labels.any() else "no defective test image"
    overall = measure_pixels(defective, levels, total, limits=aupro_limits, absence=absence)
    return _PixelStudy(source.labels, known, value, defective, images, overall, of_kinds)


def _divide(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _say_absence(with_known_truth: Bools) -> str:
    """Why no pixel of some defective images is defective."""
    return (
        "no defective pixel in any mask"
        if with_known_truth.any()
        else "no ground truth mask for any defective test image"
    )


def _describe_threshold(threshold: Threshold | None, scores: Floats, labels: Bools) -> Metrics:
    """The threshold, its promise, and the rates it really had on the test set."""
    if threshold is None:
        return {"value": None, "undefined": "no threshold was given"}
    rates = {} if threshold.value is None else asdict(rates_at(scores, labels, threshold.value))
    return {**asdict(threshold), **rates}


def _describe_kind(
    scores: Floats, pixels: _PixelStudy, name: str, of_kind: Bools, threshold: Threshold | None
) -> Metrics:
    """Metrics of one defect type against all normal test images, and how often the threshold found it."""
    chosen = ~pixels.labels | of_kind
    images, (values, undefined) = measure_images(scores[chosen], pixels.labels[chosen]), pixels.kinds[name]
    value = None if threshold is None else threshold.value
    return {
        **images.values(),
        **values,
        "detections": None
        if value is None
        else asdict(rates_at(scores[of_kind], pixels.labels[of_kind], value).detections),
        "counts": pixels.count(chosen),
        "undefined": images.undefined() | undefined,
    }


def _estimate_intervals(images: Measured, pixels: _PixelStudy, scores: Floats, resamplings: int, seed: int) -> Metrics:
    """95 % intervals of all defined metrics, from the same resamplings of the images."""
    if resamplings == 0:
        return {}
    weights = draw_weights(pixels.labels, resamplings, np.random.default_rng(seed))
    resampler = PixelResampler.build(pixels.images, pixels.defective)
    return {
        **images.intervals(resample_images(scores, pixels.labels, weights)),
        **pixels.overall.intervals(resampler.resample(weights)),
    }


def _choose_on_test_set(images: Curve | None, pixels: Curve | None) -> Metrics:
    """What thresholds chosen on the test set itself would give: an upper bound that no user can reach knowingly."""
    chosen: Metrics = dict.fromkeys(
        ("oracle_image_threshold", "oracle_image_accuracy", "oracle_pixel_threshold", "oracle_pixel_iou")
    )
    if images is not None:
        right = np.append(images.true + images.normal - images.false, images.normal)  # the last: no alarm at all
        chosen["oracle_image_threshold"] = best_f1_level(images)
        chosen["oracle_image_accuracy"] = float(right.max() / (images.defective + images.normal))
    if pixels is not None:
        best = float(f1_max(pixels))
        chosen["oracle_pixel_threshold"] = best_f1_level(pixels)
        chosen["oracle_pixel_iou"] = best / (2.0 - best)
    return chosen


def _tabulate(images: Curve | None, pixels: Curve | None, limit: float) -> dict[str, pd.DataFrame]:
    roc, pr, pro = (pd.DataFrame(columns=names, dtype=float) for names in (ROC_COLUMNS, PR_COLUMNS, PRO_COLUMNS))
    return {
        "roc": tabulate_roc(pixels) if pixels else roc,
        "pr": tabulate_pr(pixels) if pixels else pr,
        "pro": tabulate_pro(pixels, limit) if pixels else pro,
        "image_roc": tabulate_roc(images) if images else roc,
        "image_pr": tabulate_pr(images) if images else pr,
    }
