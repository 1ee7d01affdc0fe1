"""The page must stand on its own, show each number or a reason, and let in nothing but text."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from almrr_pipeline.config import Parameters, parse_parameters
from almrr_pipeline.evaluation.summary import summarize
from almrr_pipeline.reporting.examples import Overlay, pack_examples, read_examples
from almrr_pipeline.reporting.overlays import draw_panel, encode_image
from almrr_pipeline.reporting.page import Report, name_surfaces, render_report

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements with their attributes, their text, and what is not closed as it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words).replace("\N{NO-BREAK SPACE}", " "))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(report: Report) -> Page:
    return Page(render_report(report))


def alone(report: Report, **changes: Any) -> Report:
    """The report with its first category only, changed."""
    return replace(report, categories=[replace(report.categories[0], **changes)])


def with_parameters(report: Report, **sections: Any) -> Page:
    parameters = parse_parameters(report.parameters.model_dump(mode="json") | sections)
    return Page(render_report(replace(report, parameters=parameters)))


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


def test_nothing_is_fetched_and_only_the_own_script_runs(report: Report) -> None:
    text = render_report(report)
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        "http-equiv", ""
    )
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "@import" not in text
    page = Page(text)
    addresses = [
        v
        for _, a in page.elements
        for k, v in a.items()
        if k in {"src", "href", "srcset", "action"}
    ]
    assert addresses
    assert all(address is not None and address.startswith(("data:", "#")) for address in addresses)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def test_links_and_names_fit_together(page: Page) -> None:
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = {a["href"] for a in page.all("a")} | {use["href"] for use in page.all("use")}
    assert links == {f"#{name}" for name in names} - {"#zoom", "#zoom-name"}


def test_images_and_tables_can_be_read_aloud(page: Page) -> None:
    assert all(image["alt"] for image in page.all("img") if "src" in image)
    assert all("aria-label" in drawing or "aria-hidden" in drawing for drawing in page.all("svg"))
    assert "a.png · hole: image, ground truth" in str(
        [a.get("aria-label") for a in page.all("div")]
    )
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(head.get("scope") in {"row", "col", "colgroup"} for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def test_equal_input_gives_equal_bytes(report: Report) -> None:
    assert render_report(report) == render_report(replace(report))


HOSTILE = "<img src=x onerror=alert(1)>'\"&{{ 7 * 7 }}</script>"


def test_hostile_words_stay_words(report: Report) -> None:
    category = replace(
        report.categories[0],
        category=HOSTILE,
        license=HOSTILE,
        overlays=[replace(report.categories[0].overlays[0], caption=HOSTILE)],
        metrics=report.categories[0].metrics
        | {"defect_types": {HOSTILE: {}}, "undefined": {"image_ap": HOSTILE}},
    )
    values = report.parameters.model_dump(mode="json")
    values |= {"suite": HOSTILE, "categories": [HOSTILE], "report": {"title": HOSTILE}}
    hostile = replace(
        report,
        parameters=parse_parameters(values),
        categories=[category],
        versions={HOSTILE: HOSTILE},
        commit=f"0123abc{HOSTILE}",
    )
    text = render_report(hostile)
    page = Page(text)
    assert page.open == []
    assert all((image["href"] or "")[:5] == "data:" for image in page.all("image"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 8


def test_undefined_metrics_are_dashes_with_a_reason(page: Page) -> None:
    assert "no normal test image" in page.text
    assert page.text.count("\N{EN DASH}") >= 3


def test_numbers_of_record_are_on_the_page(report: Report, page: Page) -> None:
    metrics = report.categories[0].metrics
    for name in (
        "image_auroc",
        "image_ap",
        "image_f1max",
        "pixel_auroc",
        "pixel_ap",
        "pixel_f1max",
        "aupro_30",
    ):
        low, high = metrics["intervals"][name]
        assert f"{metrics[name]:.3f} {low:.3f} to {high:.3f}" in page.text
    mean = report.summary["mean"]["pixel_ap"]
    assert f"{mean:.3f} mean of 2 of 2 categories" in page.text


def test_thresholds_and_their_guarantee_are_on_the_page(report: Report, page: Page) -> None:
    threshold = report.categories[0].metrics["thresholds"]["image"]
    assert threshold["guarantee"] in page.text
    assert f"{threshold['false_alarms']['count']} of {threshold['false_alarms']['of']}" in page.text
    assert report.categories[1].metrics["thresholds"]["image"]["undefined"] in page.text


def test_counts_of_every_part_are_on_the_page(page: Page) -> None:
    assert "sample_brick 171 19 12 12 12" in page.text
    assert "nanotwice \N{EN DASH} \N{EN DASH} 0 12 12" in page.text


def test_one_category_opens_with_its_own_intervals(report: Report) -> None:
    page = Page(render_report(alone(report)))
    low, high = report.categories[0].metrics["intervals"]["pixel_ap"]
    assert (
        f"pixel AP {report.categories[0].metrics['pixel_ap']:.3f} {low:.3f} to {high:.3f}"
        in page.text
    )
    assert "mean of" not in page.text


def test_protocol_follows_the_parameters(report: Report, page: Page) -> None:
    assert "The result is that of the last step." in page.text
    assert "come from validation images: 10 % of the normal training images" in page.text
    assert "resized to 256 \N{MULTIPLICATION SIGN} 256 pixels" in page.text
    assert "1000 resamplings" in page.text
    changed = with_parameters(
        report,
        train={"selection": "validation"},
        data={"validation_fraction": 0.0, "tiling": {"enabled": True, "scale": 0.5}},
        evaluate={"bootstrap": 0},
    )
    assert "did best on validation images" in changed.text
    assert "last step" not in changed.text
    assert "data.validation_fraction is 0" in changed.text
    assert "scaled by 0.5 and cut into overlapping tiles" in changed.text
    assert "resamplings" not in changed.text


def test_protocol_names_where_a_dataset_has_validation_images_of_its_own(
    report: Report, page: Page
) -> None:
    assert "own validation images" not in page.text
    every = [replace(category, has_validation=True) for category in report.categories]
    text = Page(render_report(replace(report, categories=every))).text
    assert text.count("own validation images") == 1
    assert "of the normal training images" not in text
    some = Page(render_report(replace(report, categories=[every[0], *report.categories[1:]]))).text
    assert (
        "own validation images" in some.partition(f"{every[0].category} has values of its own:")[2]
    )
    assert "of the normal training images" in some


def test_a_category_with_values_of_its_own_has_a_protocol_of_its_own(
    report: Report, page: Page
) -> None:
    name = report.categories[0].category
    assert "has values of its own" not in page.text
    changed = with_parameters(report, overrides={name: {"data": {"image_size": [128, 192]}}})
    own = changed.text.partition(f"{name} has values of its own:")[2]
    assert "resized to 128 \N{MULTIPLICATION SIGN} 192 pixels" in own
    assert "resized to 256 \N{MULTIPLICATION SIGN} 256 pixels" in changed.text
    assert changed.text.count("has values of its own") == 1


def test_every_parameter_is_on_the_page(page: Page, parameters: Parameters) -> None:
    for name, value in parameters.redacted().items():
        assert name in page.text or not value
        for inner in value if isinstance(value, dict) else ():
            assert f"{inner}:" in page.text
    assert "learning_rate: 0.0001" in page.text


def test_commit_and_versions_are_on_the_page(report: Report, page: Page) -> None:
    assert "git checkout 0123abc dvc repro" in page.text
    assert "torch 2.6.0" in page.text
    assert "git checkout" not in render_report(replace(report, commit=None))


def test_only_a_hash_is_checked_out(report: Report, page: Page) -> None:
    changed = Page(render_report(replace(report, commit="0123abc with changes")))
    assert "git checkout 0123abc dvc repro" in changed.text
    assert "with uncommitted changes" in changed.text
    assert "with uncommitted changes" not in page.text
    assert "git checkout" not in render_report(replace(report, commit="unknown"))


def test_secrets_and_folders_stay_off_the_page(report: Report) -> None:
    text = with_parameters(
        report,
        data={
            "mirror": "https://user:password@example.org/data?token=abc",
            "paths": {"folder_tiles": "/home/somebody/tiles.zip"},
        },
        backbone={"weights": "/home/somebody/weights.pth"},
    ).text
    assert all(word in text for word in ("example.org/data", "tiles.zip", "weights.pth"))
    assert not any(word in text for word in ("password", "token", "somebody"))


def test_sections_without_content_are_left_out(report: Report) -> None:
    page = Page(render_report(report))
    assert "Over seeds" not in page.text
    assert "Chosen on the test set" not in page.text
    assert page.text.count("Found most clearly") == 1
    of_pixels = {name: report.categories[1].curves[name].iloc[:0] for name in ("roc", "pr", "pro")}
    bare = replace(
        report.categories[1],
        curves=of_pixels,
        history=pd.DataFrame({"step": [], "loss": []}),
    )
    text = Page(render_report(replace(report, categories=[bare]))).text
    assert "ROC, pixels" not in text
    assert "Training, 0 steps" in text


def test_seeds_and_oracle_are_shown_where_given(report: Report) -> None:
    summary = summarize({"mt": {0: {"pixel_ap": 0.5}, 1: {"pixel_ap": 0.7}}})
    category = replace(
        report.categories[0], metrics=report.categories[0].metrics | {"oracle_pixel_iou": 0.5}
    )
    page = Page(render_report(replace(report, summary=summary, categories=[category])))
    assert "± 0.141" in page.text
    assert "upper bounds, not results" in page.text


def test_runs_of_several_seeds_are_labelled_by_them(report: Report) -> None:
    first = report.categories[0]
    runs = [first, replace(first, seed=1), report.categories[1]]
    summary = summarize(
        {"sample_brick": {0: first.metrics, 1: first.metrics}, "nanotwice": {0: runs[2].metrics}}
    )
    page = Page(render_report(replace(report, categories=runs, summary=summary)))
    assert {"sample_brick, seed 0", "sample_brick, seed 1", "nanotwice"} <= {
        word.strip() for word in page.words
    }
    assert "nanotwice, seed" not in page.text
    assert "Over seeds" in page.text
    assert "one for each of 2 categories" in page.text
    assert page.text.count("sample_brick 171 19 12 12 12") == 1
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))


def test_one_category_of_several_seeds_opens_with_the_mean_over_them(report: Report) -> None:
    first = report.categories[0]
    summary = summarize({"sample_brick": {0: first.metrics, 1: first.metrics}})
    page = Page(
        render_report(replace(report, categories=[first, replace(first, seed=1)], summary=summary))
    )
    assert f"pixel AP {first.metrics['pixel_ap']:.3f} mean of 2 seeds" in page.text


def test_figures_hold_all_categories(report: Report) -> None:
    drawing = next(part for part in render_report(report).split("<figure") if "ROC, pixels" in part)
    assert "<title>sample_brick</title>" in drawing
    assert "<title>nanotwice</title>" in drawing


def test_the_overlap_curve_fills_its_frame(report: Report) -> None:
    assert report.categories[0].curves["pro"]["fpr"].max() == pytest.approx(0.3)
    drawing = next(
        part for part in render_report(report).split("<figure") if "Overlap with" in part
    )
    ends = re.findall(r'L([\d.]+) [\d.]+" style="[^"]*" /><title>', drawing)
    assert ends == ["340", "340"]


def test_a_panel_is_embedded_once_and_shown_as_four_tiles(report: Report) -> None:
    panel = encode_image(
        draw_panel(
            np.zeros((90, 60, 3), np.uint8), None, np.zeros((9, 6), np.float32), threshold=None
        )
    )
    page = Page(render_report(alone(report, overlays=[Overlay("best", "a", panel)])))
    (image,) = page.all("image")
    assert image["href"] == f"data:image/webp;base64,{base64.b64encode(panel).decode()}"
    assert [use["href"] for use in page.all("use")] == [f"#{image['id']}"] * 3
    boxes = [svg["viewbox"] for svg in page.all("svg") if "aria-hidden" in svg and "viewbox" in svg]
    assert boxes == [f"{6 + 278 * column} 6 272 272" for column in range(4)]


@pytest.mark.parametrize(
    ("categories", "title"),
    [
        (["sample_brick"], "Defects on brick"),
        (
            ["mvtec_carpet", "folder_my_parts", "mt_defect"],
            "Defects on carpet, my parts and mt defect",
        ),
        ([f"mvtec_{k}" for k in range(7)], "Defects on 7 surfaces"),
    ],
)
def test_the_title_names_the_surfaces(categories: list[str], title: str) -> None:
    assert name_surfaces(categories) == title


def test_a_title_of_ones_own_stands(report: Report, page: Page) -> None:
    assert "Defects on brick and nanotwice" in page.text
    values = report.parameters.model_dump(mode="json") | {"report": {"title": "Line 3"}}
    named = replace(report, parameters=parse_parameters(values))
    assert "Line 3" in Page(render_report(named)).text


def test_missed_defects_and_stopped_good_parts_come_before_metrics(report: Report) -> None:
    page = Page(render_report(alone(report)))
    image = report.categories[0].metrics["thresholds"]["image"]
    missed = f"{12 - image['detections']['count']} of 12 defective test images; 95 % interval"
    stopped = f"{image['false_alarms']['count']} of 12 normal test images; 95 % interval"
    places = [page.text.index(words) for words in (missed, stopped, "image AUROC")]
    assert places == sorted(places)


def test_images_that_were_on_disk_do_not_name_their_folder(report: Report, tmp_path: Any) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((10, 30, 3), 200, np.uint8)).save(stream, "PNG")
    for name, content in pack_examples([Overlay("typical", "on disk", stream.getvalue())]).items():
        (tmp_path / name).write_bytes(content)
    text = render_report(alone(report, overlays=read_examples(tmp_path)))
    assert "on disk" in text
    assert str(tmp_path) not in text


def test_baselines_are_beside_almrr_with_their_warnings(report: Report) -> None:
    blind = {"nearest_image_image_auroc": 0.984, "nearest_image_normal_with_twin": 0.97}
    bank = {"memory_bank_image_auroc": 0.9876, "memory_bank_pixel_ap": None}
    metrics = {"sample_brick": {0: {**report.categories[0].metrics, **bank, **blind}}}
    page = render_report(replace(report, summary=summarize(metrics)))
    assert "Beside two baselines" in page
    assert "0.988" in page
    assert "sample_brick: the split leaks" in page
    assert "Beside two baselines" not in render_report(report)
