"""metrics.json against answers by hand and scikit-learn: types, gaps, counts, thresholds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import EvaluateSettings
from almrr_pipeline.evaluation.evaluate import evaluate
from almrr_pipeline.evaluation.thresholds import conformal_threshold

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro_30", "aupro_05")
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")


def measure_with_scikit_learn(
    prefix: str, labels: np.ndarray, scores: np.ndarray
) -> dict[str, float]:
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        f"{prefix}_auroc": roc_auc_score(labels, scores),
        f"{prefix}_ap": average_precision_score(labels, scores),
        f"{prefix}_f1max": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-300)),
    }


def choose(case: Any, chosen: list[int]) -> Any:
    parts = (case.maps, case.masks, case.defect_types, case.scores)
    return type(case)(*([part[i] for i in chosen] for part in parts))


class Counting:
    """A list that knows how often each item was asked for."""

    def __init__(self, items: list[np.ndarray]) -> None:
        self.items = items
        self.reads = np.zeros(len(items), int)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> np.ndarray:
        self.reads[index] += 1
        return self.items[index]


def test_metrics_by_hand() -> None:
    maps = [np.float32([[0.1, 0.5]]), np.float32([[0.9, 0.5, 0.2, 0.3]]), np.float32([[0.3]])]
    masks = [None, np.array([[1, 1, 0, 0]], bool), None]  # the third image's truth is not known
    found = evaluate(
        maps,
        masks,
        [0.5, 0.9, 0.3],
        [False, True, True],
        ["good", "dent", "dent"],
        EvaluateSettings(bootstrap=0),
        thresholds=(None, None),
    ).metrics
    # images: one of two defective ones scores above the normal one. Precision 1 at recall 1/2, 2/3
    # at recall 1. F1 at the lowest score: 2 * 2 / (3 + 2)
    assert found["image_auroc"] == 0.5
    assert found["image_ap"] == 0.5 * 1 + 0.5 * (2 / 3)
    assert found["image_f1max"] == 0.8
    # pixels: 0.9 wins four pairs, 0.5 three and ties one, of 8. At 0.5: tp 2, fp 1
    assert found["pixel_auroc"] == 7.5 / 8
    assert found["pixel_ap"] == 0.5 * 1 + 0.5 * (2 / 3)
    assert found["pixel_f1max"] == 0.8
    # one region: overlap 1/2 at no false positive, then a line to 1 at 1/4; mean up to 0.3 and 0.05
    assert found["aupro_30"] == pytest.approx((0.25 * 0.75 + 0.05) / 0.3, abs=1e-15)
    assert found["aupro_05"] == pytest.approx(0.55, abs=1e-15)
    assert found["pixel_defective_fraction"] == 2 / 6
    assert found["counts"]["defective_images_without_mask"] == 1
    assert {
        name: found["defect_types"]["dent"][name] for name in IMAGE_METRICS + PIXEL_METRICS
    } == {name: found[name] for name in IMAGE_METRICS + PIXEL_METRICS}


@pytest.mark.parametrize("decimals", [1, 2, 8])
def test_metrics_equal_scikit_learn(draw_case: Callable[..., Any], decimals: int) -> None:
    case = draw_case(decimals, decimals=decimals)
    found = case.evaluate().metrics
    expected = measure_with_scikit_learn("image", case.labels, case.scores)
    expected |= measure_with_scikit_learn("pixel", *case.pixels)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_aupro_at_both_limits_equals_the_literal_one(
    case: Any, literal_aupro: Callable[..., float]
) -> None:
    found = case.evaluate().metrics
    assert found["aupro_30"] == pytest.approx(literal_aupro(case.maps, case.masks, 0.3), abs=1e-6)
    assert found["aupro_05"] == pytest.approx(literal_aupro(case.maps, case.masks, 0.05), abs=1e-6)


def test_a_defect_type_is_held_against_all_normal_images(case: Any) -> None:
    found = case.evaluate().metrics["defect_types"]
    for defect_type in ("crack", "scratch"):
        alone = (
            choose(
                case,
                [i for i, name in enumerate(case.defect_types) if name in ("good", defect_type)],
            )
            .evaluate()
            .metrics
        )
        for name in IMAGE_METRICS + PIXEL_METRICS:
            assert found[defect_type][name] == pytest.approx(alone[name], abs=1e-12), name
        assert found[defect_type]["counts"] == alone["counts"]
        assert found[defect_type]["undefined"] == {}


def test_the_order_of_the_images_does_not_matter(case: Any) -> None:
    order = np.random.default_rng(0).permutation(len(case.maps)).tolist()
    first, second = case.evaluate().metrics, choose(case, order).evaluate().metrics
    for name in IMAGE_METRICS + PIXEL_METRICS:
        assert first[name] == pytest.approx(second[name], abs=1e-12)


def test_the_same_test_set_gives_equal_numbers_to_the_last_digit(case: Any) -> None:
    first, second = (
        json.dumps(case.evaluate(bootstrap=100, oracle=True).metrics) for _ in range(2)
    )
    assert first == second


def test_metrics_survive_json(case: Any) -> None:
    metrics = case.evaluate(bootstrap=20, oracle=True).metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_each_map_is_read_at_most_twice(case: Any) -> None:
    maps = Counting(case.maps)
    evaluate(
        maps,
        case.masks,
        case.scores,
        case.labels,
        case.defect_types,
        EvaluateSettings(bootstrap=10),
        thresholds=(None, None),
    )
    assert maps.reads.tolist() == [1] * 4 + [2] * 6


def test_without_normal_images_only_image_metrics_are_undefined(
    draw_case: Callable[..., Any],
) -> None:
    case = draw_case(3, normal=0)
    found = case.evaluate(bootstrap=20).metrics
    assert {found[name] for name in IMAGE_METRICS} == {None}
    assert found["undefined"] == dict.fromkeys(IMAGE_METRICS, "no normal test image")
    expected = measure_with_scikit_learn("pixel", *case.pixels)
    assert found["pixel_auroc"] == pytest.approx(expected["pixel_auroc"], abs=1e-9)
    assert set(found["intervals"]) == set(PIXEL_METRICS)
    assert found["thresholds"]["image"]["false_alarms"]["rate"] is None


def test_without_masks_only_pixel_metrics_are_undefined(case: Any) -> None:
    found = evaluate(
        case.maps,
        None,
        case.scores,
        case.labels,
        case.defect_types,
        EvaluateSettings(bootstrap=10),
        thresholds=(None, None),
    )
    assert found.metrics["undefined"] == dict.fromkeys(
        PIXEL_METRICS, "no ground truth mask for any defective test image"
    )
    assert found.metrics["pixel_defective_fraction"] is None
    assert set(found.metrics["intervals"]) == set(IMAGE_METRICS)
    assert found.curves["roc"].empty
    assert list(found.curves["pro"].columns) == ["fpr", "pro"]
    assert len(found.curves["image_roc"]) > 2


def test_empty_masks_leave_pixel_metrics_undefined(case: Any) -> None:
    for mask in case.masks:
        mask[:] = False
    found = case.evaluate().metrics
    assert found["undefined"] == dict.fromkeys(PIXEL_METRICS, "no anomalous pixel in any mask")
    assert found["pixel_defective_fraction"] == 0.0
    assert found["image_auroc"] is not None


def test_a_defect_type_with_empty_masks_alone_is_undefined_alone(case: Any) -> None:
    for mask, name in zip(case.masks, case.defect_types, strict=True):
        mask[:] &= name != "crack"
    found = case.evaluate().metrics
    assert found["defect_types"]["crack"]["undefined"] == dict.fromkeys(
        PIXEL_METRICS, "no anomalous pixel in any mask"
    )
    assert found["defect_types"]["crack"]["image_auroc"] is not None
    assert found["defect_types"]["scratch"]["undefined"] == {}
    assert found["undefined"] == {}


def test_a_defective_image_with_an_empty_mask_counts_as_defective_image_and_normal_pixels(
    case: Any,
) -> None:
    case.masks[-1][:] = False
    found = case.evaluate().metrics
    expected = measure_with_scikit_learn("image", case.labels, case.scores)
    expected |= measure_with_scikit_learn("pixel", *case.pixels)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert found["counts"]["defective_images_with_empty_mask"] == 1


def test_a_defective_image_without_a_mask_is_left_out_of_pixel_metrics_only(case: Any) -> None:
    without = choose(case, list(range(len(case.maps) - 1))).evaluate().metrics
    whole = case.evaluate().metrics
    case.masks[-1] = None
    found = case.evaluate().metrics
    for name in PIXEL_METRICS:
        assert found[name] == pytest.approx(without[name], abs=1e-12)
    for name in IMAGE_METRICS:
        assert found[name] == whole[name]
    assert found["counts"]["defective_images_without_mask"] == 1
    assert found["thresholds"]["pixel"]["detections"] == whole["thresholds"]["pixel"]["detections"]


def test_without_defective_images_everything_is_undefined(draw_case: Callable[..., Any]) -> None:
    found = draw_case(0, defective=0).evaluate(bootstrap=10).metrics
    assert found["undefined"] == dict.fromkeys(
        IMAGE_METRICS + PIXEL_METRICS, "no defective test image"
    )
    assert found["intervals"] == {}
    assert found["defect_types"] == {}


def test_a_set_that_is_defective_everywhere_has_no_pixel_metrics() -> None:
    found = evaluate(
        [np.ones((2, 2), np.float32)],
        [np.ones((2, 2), bool)],
        [1.0],
        [True],
        ["rust"],
        EvaluateSettings(bootstrap=0),
        thresholds=(None, None),
    )
    assert found.metrics["undefined"]["pixel_auroc"] == "no normal pixel in any test image"
    assert found.metrics["pixel_defective_fraction"] == 1.0


def test_counts_say_what_took_part(case: Any) -> None:
    labels, _ = case.pixels
    counts = case.evaluate().metrics["counts"]
    assert counts["images"] == 10
    assert (counts["normal_images"], counts["defective_images"]) == (4, 6)
    assert (counts["normal_pixels"], counts["defective_pixels"]) == ((~labels).sum(), labels.sum())
    assert case.evaluate().metrics["pixel_defective_fraction"] == pytest.approx(labels.mean())


def test_thresholds_report_the_rates_they_really_had(case: Any) -> None:
    image, pixel = conformal_threshold([0.72] * 30, 0.05), conformal_threshold([0.65] * 30, 0.05)
    whole = case.evaluate(thresholds=(image, pixel)).metrics
    found = whole["thresholds"]
    alarms = np.array(case.scores) > 0.72
    assert found["image"]["value"] == 0.72
    assert 0 < alarms[case.labels].sum() < 6
    assert found["image"]["false_alarms"]["count"] == alarms[~case.labels].sum()
    assert found["image"]["detections"]["count"] == alarms[case.labels].sum()
    cracks = alarms[np.array(case.defect_types) == "crack"]
    detected = whole["defect_types"]["crack"]["detections"]
    assert (detected["count"], detected["of"]) == (cracks.sum(), len(cracks))
    labels, scores = case.pixels
    outlined = scores.astype(np.float64) > 0.65
    assert found["pixel"]["normal_pixels_outlined"] == pytest.approx(
        outlined[~labels].mean(), abs=1e-12
    )
    assert found["pixel"]["defective_pixels_outlined"] == pytest.approx(
        outlined[labels].mean(), abs=1e-12
    )
    images = np.array([(values.astype(np.float64) > 0.65).any() for values in case.maps])
    assert found["pixel"]["detections"]["count"] == images[case.labels].sum()


def test_a_threshold_that_is_undefined_has_no_rates(case: Any) -> None:
    found = case.evaluate(thresholds=(conformal_threshold([], 0.05), None)).metrics["thresholds"]
    assert found["image"]["value"] is None
    assert "detections" not in found["image"]
    assert found["pixel"]["undefined"] == "no threshold was given"
    assert found["pixel"]["normal_pixels_outlined"] is None


def test_columns_chosen_on_the_test_set_exist_only_on_demand(case: Any) -> None:
    assert not [name for name in case.evaluate().metrics if name.startswith("oracle")]
    found = case.evaluate(oracle=True).metrics
    accuracies = [
        ((np.array(case.scores) >= score) == case.labels).mean() for score in [*case.scores, np.inf]
    ]
    assert found["oracle_image_accuracy"] == pytest.approx(max(accuracies))
    labels, scores = case.pixels
    outlined = scores >= found["oracle_pixel_threshold"]
    assert found["oracle_pixel_iou"] == pytest.approx(
        (outlined & labels).sum() / (outlined | labels).sum()
    )


def test_intervals_hold_the_figures(draw_case: Callable[..., Any]) -> None:
    found = draw_case(2, normal=10, defective=20, decimals=8).evaluate(bootstrap=200).metrics
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high, name
        assert high > low, name


@pytest.mark.parametrize("field", ["scores", "labels", "defect_types", "masks"])
def test_lengths_that_differ_are_refused(case: Any, field: str) -> None:
    parts = {
        "masks": case.masks,
        "scores": case.scores,
        "labels": case.labels,
        "defect_types": case.defect_types,
    }
    parts[field] = parts[field][:-1]
    with pytest.raises(AlmrrError, match="does not fit together"):
        evaluate(
            case.maps,
            **parts,
            settings=EvaluateSettings(),
            thresholds=(None, None),
        )


def test_an_empty_test_set_leaves_every_metric_undefined_and_the_threshold_with_its_promise() -> (
    None
):
    threshold = conformal_threshold(np.linspace(0.1, 0.4, 30), 0.05)
    found = evaluate([], [], [], [], [], EvaluateSettings(), thresholds=(threshold, threshold))
    names = (*IMAGE_METRICS, *PIXEL_METRICS)
    assert [found.metrics[name] for name in names] == [None] * len(names)
    assert found.metrics["undefined"] == dict.fromkeys(names, "no defective test image")
    assert found.metrics["thresholds"]["image"]["value"] == threshold.value
    assert found.metrics["counts"]["images"] == 0


def test_a_score_that_is_not_finite_is_refused(case: Any) -> None:
    scores = list(case.scores)
    scores[3] = np.nan
    with pytest.raises(AlmrrError, match="score of test image 3 is nan"):
        evaluate(
            case.maps,
            case.masks,
            scores,
            case.labels,
            case.defect_types,
            EvaluateSettings(),
            thresholds=(None, None),
        )
