"""Tables must print numbers as they are, a reason where there is none, and only what is known."""

from __future__ import annotations

from typing import Any

import pytest

from almrr_pipeline.evaluation.summary import summarize
from almrr_pipeline.reporting.tables import (
    DASH,
    Table,
    average_metric,
    describe_metric,
    format_count,
    format_fraction,
    list_metrics,
    tabulate_counts,
    tabulate_defect_types,
    tabulate_oracle,
    tabulate_results,
    tabulate_seeds,
    tabulate_thresholds,
)


@pytest.fixture
def metrics() -> dict[str, dict[str, Any]]:
    first = {
        "image_auroc": 0.9,
        "pixel_ap": 0.5004,
        "aupro_30": 0.8,
        "pixel_defective_fraction": 0.0123,
    }
    first |= {"intervals": {"pixel_ap": [0.4, 0.6]}, "undefined": {}}
    second = {
        "image_auroc": None,
        "pixel_ap": 0.7,
        "aupro_30": 0.6,
        "pixel_defective_fraction": 0.2,
    }
    second |= {"intervals": {}, "undefined": {"image_auroc": "no normal test image"}}
    return {"brick": first, "nano": second}


def by_seed(metrics: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """The metrics as those of one seed per category."""
    return {category: {0: values} for category, values in metrics.items()}


def column(table: Table, text: str, group: str) -> list[Any]:
    """Cells below the head with these words."""
    place = next(
        k for k, head in enumerate(table.heads) if (head.text, head.group) == (text, group)
    )
    return [row.cells[place] for row in table.rows]


def test_results_have_a_row_a_category_and_their_mean(metrics: dict[str, Any]) -> None:
    table = tabulate_results(metrics, summarize(by_seed(metrics)), links={"brick": "category-1"})
    assert [row.head for row in table.rows] == ["brick", "nano", "mean"]
    assert [cell.text for cell in column(table, "AP", "pixels")] == ["0.500", "0.700", "0.600"]
    assert [cell.text for cell in column(table, "AUPRO 30 %", "regions")] == [
        "0.800",
        "0.600",
        "0.700",
    ]
    assert [cell.text for cell in column(table, "anomalous", "pixels")] == ["1.2 %", "20 %", ""]
    assert all(len(row.cells) == len(table.heads) for row in table.rows)
    assert table.rows[0].link == "category-1"


def test_intervals_stand_in_small_print(metrics: dict[str, Any]) -> None:
    table = tabulate_results(metrics, {}, links={})
    assert column(table, "AP", "pixels")[0].small == "0.400 to 0.600"
    assert column(table, "AP", "pixels")[1].small == ""


def test_an_undefined_metric_is_a_dash_with_its_reason(metrics: dict[str, Any]) -> None:
    table = tabulate_results(metrics, summarize(by_seed(metrics)), links={})
    cell = column(table, "AUROC", "images")[1]
    assert cell.text == DASH
    assert table.notes[ord(cell.note) - ord("a")] == "no normal test image"
    assert column(table, "AUROC", "images")[2].small == "1 of 2"
    assert column(table, "AP", "pixels")[2].small == ""


def test_a_metric_that_nobody_computed_is_marked_as_such(metrics: dict[str, Any]) -> None:
    table = tabulate_results(metrics, {}, links={})
    assert table.notes[ord(column(table, "F1-max", "pixels")[0].note) - ord("a")] == "not computed"


def test_a_mean_names_how_many_categories_define_the_metric() -> None:
    summary = summarize({"a": {0: {"x": None, "y": 0.5}}, "b": {0: {"x": None, "y": None}}})
    assert average_metric(summary, "x") == (DASH, "0 of 2")
    assert average_metric(summary, "y") == ("0.500", "1 of 2")


def test_the_highest_of_each_column_is_marked(metrics: dict[str, Any]) -> None:
    table = tabulate_results(metrics, summarize(by_seed(metrics)), links={})
    assert [cell.best for cell in column(table, "AP", "pixels")] == [False, True, False]
    alone = tabulate_results({"brick": metrics["brick"]}, {}, links={})
    assert not any(cell.best for row in alone.rows for cell in row.cells)


def test_one_category_has_no_mean(metrics: dict[str, Any]) -> None:
    assert [
        row.head for row in tabulate_results({"brick": metrics["brick"]}, {}, links={}).rows
    ] == ["brick"]


def test_footnotes_go_on_after_z() -> None:
    table = Table("", [])
    letters = [table.mark(str(k)) for k in range(28)]
    assert letters[:2] + letters[25:] == ["a", "b", "z", "aa", "ab"]
    assert table.mark("26") == "aa"
    assert len(table.notes) == 28


@pytest.mark.parametrize(
    ("name", "text"),
    [("aupro_30", "AUPRO 30 %"), ("aupro_05", "AUPRO 5 %"), ("aupro_12_5", "AUPRO 12.5 %")],
)
def test_region_metrics_are_named_by_their_limit(name: str, text: str) -> None:
    assert describe_metric(name).text == text
    assert list_metrics([{name: 0.1, "aupro": 1, "counts": {}}])[-1] == name


def test_defect_types_come_with_their_number(full: tuple[Any, Any]) -> None:
    metrics = full[0].metrics
    table = tabulate_defect_types(metrics)
    assert [row.head for row in table.rows] == ["hole", "thread"]
    assert [row.cells[0].text for row in table.rows] == ["6", "6"]
    assert (
        column(table, "AP", "pixels")[0].text
        == f"{metrics['defect_types']['hole']['pixel_ap']:.3f}"
    )


def test_the_memory_bank_stands_below_each_defect_type(full: tuple[Any, Any]) -> None:
    metrics = full[0].metrics
    own = metrics["defect_types"]["hole"]["pixel_ap"]
    for rival, best in ((own - 0.01, True), (own + 0.01, False)):
        bank = {"memory_bank": {"defect_types": {"hole": {"pixel_ap": rival}}}}
        table = tabulate_defect_types(metrics, bank)
        hole, thread = column(table, "AP", "pixels")
        assert (hole.text, hole.small, hole.best) == (f"{own:.3f}", f"bank {rival:.3f}", best)
        assert (thread.small, thread.best) == ("", False)
        assert table.caption.endswith("; below, the memory bank")
    assert "bank" not in tabulate_defect_types(metrics).caption


def test_thresholds_state_guarantee_and_what_happened(full: tuple[Any, Any]) -> None:
    metrics = full[0].metrics
    image = metrics["thresholds"]["image"]
    table = tabulate_thresholds({"brick": metrics})
    assert [row.cells[0].text for row in table.rows] == ["image", "pixel"]
    cells = [cell.text for cell in table.rows[0].cells]
    assert cells[1:4] == [f"{image['value']:.4g}", "5 %", "5 %"]
    assert cells[4] == f"{100 * image['false_alarms']['rate']:.1f} %"
    assert f"{image['detections']['count']} of 12" in table.rows[0].cells[5].small
    assert image["guarantee"] in table.notes


def test_a_threshold_that_could_not_be_set_has_a_reason(bare: tuple[Any, Any]) -> None:
    table = tabulate_thresholds({"nano": bare[0].metrics})
    assert [row.cells[1].text for row in table.rows] == [DASH, DASH]
    assert table.notes == [bare[0].metrics["thresholds"]["image"]["undefined"]]
    assert all(len(row.cells) == len(table.heads) for row in table.rows)


def test_counts_name_the_missing_masks() -> None:
    counts = {
        "normal_images": 1191,
        "defective_images": 392,
        "regions": 500,
        "defective_images_with_empty_mask": 4,
    }
    table = tabulate_counts({"mt": (684, None)}, {"mt": {"counts": counts}})
    narrow = "\N{NARROW NO-BREAK SPACE}"
    assert [cell.text for cell in table.rows[0].cells] == [
        "684",
        DASH,
        f"1{narrow}191",
        "392",
        "500",
    ]
    assert table.rows[0].cells[3].note == "a"
    assert table.notes == ["of these, 4 with an empty mask"]


def test_seeds_show_mean_and_std_of_repeated_runs_alone() -> None:
    runs = {"mt": {0: {"pixel_ap": 0.5}, 1: {"pixel_ap": 0.7}}, "brick": {0: {"pixel_ap": 0.9}}}
    table = tabulate_seeds(summarize(runs))
    assert [row.head for row in table.rows] == ["mt"]
    assert table.rows[0].cells[0].text == "2"
    cell = column(table, "AP", "pixels")[0]
    assert (cell.text, cell.small) == ("0.600", "± 0.141")


def test_oracle_columns_exist_only_if_requested(metrics: dict[str, Any]) -> None:
    assert tabulate_oracle(metrics).rows == []
    metrics["brick"]["oracle_pixel_iou"] = 0.4567
    table = tabulate_oracle(metrics)
    assert [row.cells[0].text for row in table.rows] == ["0.457", DASH]
    assert "not results" in table.caption


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (0.0, "0 %"),
        (0.00456, "0.46 %"),
        (0.05, "5 %"),
        (0.999, "100 %"),
        (1.0, "100 %"),
    ],
)
def test_fractions_are_short(value: float | None, text: str) -> None:
    assert format_fraction(value) == text


def test_an_unknown_count_is_a_dash() -> None:
    assert (format_count(None), format_count(0)) == (DASH, "0")
