"""The page in a browser: its controls work, nothing is logged, axe-core finds no serious fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from almrr_pipeline.reporting.examples import Overlay, Result
from almrr_pipeline.reporting.gallery import build_gallery
from almrr_pipeline.reporting.overlays import draw_panel, encode_image
from almrr_pipeline.reporting.page import Report, render_report

pytest.importorskip("playwright", reason="the page's controls are tested with playwright")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox, which containers seldom allow: it opens our own page alone.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def address(report: Report, tmp_path: Path) -> str:
    """A page whose first category has a gallery of 24 images, 60 x 40, defects in the second half.

    Map values are 0.1, in a defect 0.5 to 0.72; image k has the score of its map's maximum.
    """
    first = report.categories[0]
    peaks = [0.1] * 12 + [0.5 + 0.02 * k for k in range(12)]

    def load(name: str) -> Result:
        place = int(name.removesuffix(".png"))
        mask = np.zeros((40, 60), bool)
        mask[10:20, 20:40] = place >= 12
        heat = np.where(mask, peaks[place], 0.1).astype(np.float32)
        return np.full((40, 60, 3), 8 * place, np.uint8), mask, heat

    names = [f"{k}.png" for k in range(24)]
    scores = first.scores.assign(score=peaks, is_anomalous=np.array(peaks) > 0.4)
    metrics = dict(first.metrics)
    image = metrics["thresholds"]["image"] | {"value": 0.4}
    metrics["thresholds"] = metrics["thresholds"] | {"image": image}
    panel = encode_image(draw_panel(*load("20.png"), threshold=0.4))
    category = replace(
        first,
        scores=pd.DataFrame(scores),
        metrics=metrics,
        gallery=build_gallery(names, load, largest=0.72, threshold=0.4),
        overlays=[Overlay("best", "20.png", panel)],
    )
    path = tmp_path / "report.html"
    path.write_text(render_report(replace(report, categories=[category, *report.categories[1:]])))
    return path.as_uri()


def opened(browser: Browser, address: str, **options: Any) -> Page:
    """Open the page in a new context, which notes in `page.faults` whatever goes wrong."""
    page = browser.new_context(**options).new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.faults = faults  # type: ignore[attr-defined]
    page.goto(address)
    return page


def slide(page: Page, name: str, value: float) -> None:
    set_value = "(e, v) => {e.value = v; e.dispatchEvent(new Event('input', {bubbles: true}))}"
    page.locator(f"[name={name}]").evaluate(set_value, value)


def visible(page: Page, attribute: str) -> list[str | None]:
    return [tile.get_attribute(attribute) for tile in page.locator(".tile:visible").all()]


def test_filters_orders_and_thresholds_change_tiles_counts_and_outlines(
    browser: Browser, address: str
) -> None:
    page = opened(browser, address)
    assert visible(page, "data-name")[0] == "23.png"
    counts = " ".join(page.locator(".counts").inner_text().split())
    assert counts == "Missed defects 0 of 12 (0.0 %) Good parts stopped 0 of 12 (0.0 %)"
    outline = page.locator('.tile[data-name="23.png"] .found')
    before = outline.get_attribute("d")
    slide(page, "image", 0.6)  # moves the outlines' threshold to 0.6 too
    assert "Missed defects 6 of 12 (50.0 %)" in " ".join(
        page.locator(".counts").inner_text().split()
    )
    page.wait_for_function(
        "d => document.querySelector('.found').getAttribute('d') !== d", arg=before
    )
    assert page.locator('.tile[data-name="13.png"] .outcome').inner_text() == "missed"
    page.select_option("[name=outcome]", "missed")
    page.select_option("[name=order]", "low")
    assert visible(page, "data-score") == [str(0.5 + 0.02 * k) for k in range(6)]
    page.select_option("[name=type]", "hole")
    assert set(visible(page, "data-type")) == {"hole"}
    page.locator("[type=reset]").click()
    page.wait_for_function("document.querySelectorAll('.tile:not([hidden])').length === 24")
    assert outline.get_attribute("d") == before
    page.locator("[name=heat]").check()
    page.wait_for_selector(".tile canvas")
    assert page.faults == []  # type: ignore[attr-defined]


def test_one_image_at_a_time_with_the_arrow_keys(browser: Browser, address: str) -> None:
    page = opened(browser, address)
    page.locator('.tile[data-name="23.png"] .view').press("Enter")
    title = page.locator("#zoom h3")
    assert title.inner_text() == "23.png · thread"
    center, corner = page.locator("#zoom canvas").evaluate(
        "c => [[30, 15], [2, 2]].map(([x, y]) => "
        "[...c.getContext('2d').getImageData(x, y, 1, 1).data])"
    )
    assert center[0] > 200  # above the threshold: orange or paler
    assert sum(corner[:3]) < 200
    for key, name in (("ArrowRight", "22.png"), ("ArrowLeft", "23.png"), ("ArrowLeft", "9.png")):
        page.keyboard.press(key)
        page.wait_for_function(
            "n => document.querySelector('#zoom h3').innerText.startsWith(n)", arg=name
        )
    faults = Axe().run(page, context="#zoom").response["violations"]
    assert [fault["id"] for fault in faults if fault["impact"] in {"serious", "critical"}] == []
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    assert page.faults == []  # type: ignore[attr-defined]


def test_axe_finds_no_serious_fault(browser: Browser, address: str) -> None:
    for options in ({}, {"color_scheme": "dark"}, {"viewport": PHONE}):
        page = opened(browser, address, **options)
        faults = Axe().run(page).response["violations"]
        assert [fault["id"] for fault in faults if fault["impact"] in {"serious", "critical"}] == []
        assert page.faults == []  # type: ignore[attr-defined]


def test_a_phone_shows_panels_two_by_two_and_nothing_is_cut_off(
    browser: Browser, address: str
) -> None:
    page = opened(browser, address, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    boxes = [svg.bounding_box() for svg in page.locator(".panel svg").all()]
    assert all(box is not None and box["x"] + box["width"] <= PHONE["width"] for box in boxes)
    assert len({box["x"] for box in boxes if box}) == len({box["y"] for box in boxes if box}) == 2


def test_without_script_every_image_is_there_with_its_outlines(
    browser: Browser, address: str
) -> None:
    page = opened(browser, address, java_script_enabled=False)
    assert page.locator(".tile").count() == 24
    assert page.locator(".tile").last.is_visible()
    assert not page.locator(".gallery form").is_visible()
    assert page.locator('.tile[data-name="23.png"] .found').get_attribute("d")
