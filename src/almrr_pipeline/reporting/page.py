"""The report: one HTML page that holds every number, image and style."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from almrr_pipeline.baselines.findings import list_warnings
from almrr_pipeline.config import Parameters
from almrr_pipeline.reporting import charts, overlays, tables, verdicts
from almrr_pipeline.reporting.examples import Overlay
from almrr_pipeline.reporting.gallery import Gallery, show_gallery, split_budget
from almrr_pipeline.reporting.verdicts import Headline

_MANY = 6  # surfaces, beyond which the title counts instead of naming them
_HEADLINES = ("image_auroc", "pixel_auroc", "pixel_ap")
_FIGURES: Sequence[tuple[str, str, charts.CurveKind]] = (
    ("Precision and recall, pixels", "pr", "pr"),
    ("Overlap with anomalous regions", "pro", "pro"),
    ("ROC, pixels", "roc", "roc"),
    ("Precision and recall, images", "image_pr", "pr"),
    ("ROC, images", "image_roc", "roc"),
)


@dataclass(frozen=True)
class CategoryReport:
    """Results of one category and seed; metrics are the content of metrics.json."""

    category: str  # id, such as sample_brick
    seed: int  # of the training
    metrics: tables.Metrics
    history: pd.DataFrame  # step, loss, reconstruction, refinement, learning_rate
    scores: pd.DataFrame  # a row per test image, as evaluation.maps.tabulate_scores gives them
    curves: Mapping[str, pd.DataFrame]  # as in Evaluation; missing or without rows if undefined
    overlays: Sequence[Overlay] = ()  # drawn examples
    gallery: Gallery | None = None  # every test image, as gallery.build_gallery returns it
    training_images: int | None = None  # normal images that were trained on; None if unknown
    validation_images: int | None = None  # normal images for the thresholds
    has_validation: bool = False  # whether these are the dataset's own validation images
    license: str = ""  # origin and license of the images, and what to cite
    baselines: tables.Metrics = field(default_factory=dict)  # content of baselines.json


@dataclass(frozen=True)
class Report:
    """Content of the page; the suite is taken from the run's parameters, and a title if given."""

    parameters: Parameters
    categories: Sequence[CategoryReport]  # of each category and seed, in the order of the page
    summary: tables.Metrics  # means and stds, as evaluation.summary.summarize returns them
    versions: Mapping[str, str] = field(default_factory=dict)  # by package
    commit: str | None = None  # "HASH" or "HASH with changes"; None where there is no repository


def render_report(report: Report) -> str:
    """Render the page: HTML5, nothing fetched, complete without its script.

    Equal input gives equal bytes. The content security policy lets in the page's own script alone.
    """
    runs = {_label(run, report): run for run in report.categories}
    links = {label: f"category-{place}" for place, label in enumerate(runs, start=1)}
    metrics = {label: run.metrics for label, run in runs.items()}
    categories: dict[str, CategoryReport] = {}  # what does not depend on the seed
    for run in report.categories:
        categories.setdefault(run.category, run)
    training = {name: (c.training_images, c.validation_images) for name, c in categories.items()}
    first_metrics = {name: first.metrics for name, first in categories.items()}
    commit = re.fullmatch(r"([0-9a-f]{7,64})(.*)", report.commit or "", re.DOTALL)
    names = tables.list_metrics(metrics.values())
    script = _read_script()
    shown = split_budget(_first_galleries(runs))
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=report.parameters.report.title or name_surfaces(list(categories)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        heat=_sample_heat(),
        heat_top=overlays.HEAT_TOP,
        parameters=report.parameters,
        verdict_headlines=verdicts.list_verdict_headlines(
            list(metrics.values()), repeated=len(runs) > len(categories)
        ),
        verdicts=verdicts.tabulate_verdicts(metrics, links),
        promises=verdicts.list_broken_promises(metrics),
        headlines=_list_headlines(report.categories, report.summary),
        results=tables.tabulate_results(metrics, report.summary, links=links),
        warnings=list_warnings(report.summary.get("categories", {})),
        baselines=tables.tabulate_baselines(report.summary),
        seeds=tables.tabulate_seeds(report.summary),
        oracle=tables.tabulate_oracle(metrics),
        protocols=[
            (name, report.parameters.for_category(name), first.has_validation)
            for name, first in categories.items()
        ],
        counts=tables.tabulate_counts(training, first_metrics),
        thresholds=tables.tabulate_thresholds(metrics),
        curves=_draw_curves(runs),
        runs=[
            _show_run(label, run, has_gallery=label in shown) | {"link": links[label]}
            for label, run in runs.items()
        ],
        definitions=[(_name_metric(n), tables.describe_metric(n).meaning) for n in names],
        dump=_dump_parameters(report.parameters),
        versions=report.versions,
        commit=commit and commit[1],
        is_changed=bool(commit and commit[2]),
    )


def _read_script() -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), "report.js")[0]


def _first_galleries(runs: Mapping[str, CategoryReport]) -> dict[str, Gallery]:
    """Of each category the gallery of its first seed, by label."""
    seeds: dict[str, int] = {}
    for run in runs.values():
        seeds[run.category] = min(run.seed, seeds.get(run.category, run.seed))
    return {
        label: run.gallery
        for label, run in runs.items()
        if run.gallery and run.seed == seeds[run.category]
    }


def name_surfaces(categories: Sequence[str]) -> str:
    """Return a title from the categories' ids: "Defects on brick, grass and gravel"."""
    names = [_name_surface(category) for category in categories]
    if len(names) > _MANY:
        return f"Defects on {len(names)} surfaces"
    *first, last = names
    return f"Defects on {', '.join(first)} and {last}" if first else f"Defects on {last}"


def _name_surface(category: str) -> str:
    """The id without the dataset's prefix; a dataset of one surface is called by its id."""
    for prefix in ("sample_", "mvtec_", "folder_"):
        category = category.removeprefix(prefix)
    return category.replace("_", " ")


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("almrr_pipeline.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _label(run: CategoryReport, report: Report) -> str:
    seeds = {other.seed for other in report.categories if other.category == run.category}
    return f"{run.category}, seed {run.seed}" if len(seeds) > 1 else run.category


def _list_headlines(runs: Sequence[CategoryReport], summary: tables.Metrics) -> list[Headline]:
    """Opening metrics with their means; of one run with their intervals, or why there is none."""
    metrics = [run.metrics for run in runs]
    count = len({run.category for run in runs})
    regions = [name for name in tables.list_metrics(metrics) if name.startswith("aupro")]
    headlines = []
    for name in (*_HEADLINES, *regions[:1]):
        if len(runs) == 1:
            value, interval, reason = tables.show_metric(metrics[0], name)
            small = interval or reason
        else:
            value, few = tables.average_metric(summary, name)
            of_categories = f"{few or f'{count} of {count}'} categories"
            small = f"mean of {of_categories if count > 1 else f'{len(runs)} seeds'}"
        headlines.append((_name_metric(name), value, small))
    return headlines


def _name_metric(name: str) -> str:
    head = tables.describe_metric(name)
    return head.text if head.group == "regions" else f"{head.group.removesuffix('s')} {head.text}"


def _draw_curves(runs: Mapping[str, CategoryReport]) -> list[tuple[str, Markup]]:
    """Draw one figure per kind of curve, with all runs in it; those without any are left out."""
    drawn = []
    for title, name, kind in _FIGURES:
        curves = {label: run.curves.get(name, pd.DataFrame()) for label, run in runs.items()}
        drawable = [points for points in curves.values() if len(points)]
        if drawable:
            limit = max(points["fpr"].max() for points in drawable) if kind == "pro" else None
            chart = charts.draw_curves(kind, curves, title=title, limit=limit)
            drawn.append((title, Markup(chart)))
    return drawn


def _show_run(label: str, run: CategoryReport, *, has_gallery: bool) -> dict[str, Any]:
    """Values of a run's section as the template takes them."""
    threshold = run.metrics.get("thresholds", {}).get("image", {}).get("value")
    losses = charts.draw_losses(run.history, title=f"Training losses of {label}")
    scores = charts.draw_scores(run.scores, threshold=threshold, title=f"Image scores of {label}")
    gallery = run.gallery if has_gallery else None
    return {
        "name": label,
        "license": run.license,
        "verdicts": verdicts.list_verdict_headlines([run.metrics]),
        "headlines": _list_headlines([run], {}),
        "steps": int(run.history["step"].max()) if len(run.history) else 0,
        "losses": Markup(losses),
        "scores": Markup(scores),
        "defect_types": tables.tabulate_defect_types(run.metrics, run.baselines),
        "examples": [_embed(overlay) for overlay in run.overlays],
        "gallery": gallery and show_gallery(gallery, run.scores, threshold),
        "images": len(run.scores),
    }


def _embed(overlay: Overlay) -> dict[str, Any]:
    """Turn a panel into a data address, with the place of each of its tiles."""
    with Image.open(io.BytesIO(overlay.image)) as image:
        (width, height), format_ = image.size, str(image.format).lower()
    address = f"data:image/{format_};base64,{base64.b64encode(overlay.image).decode('ascii')}"
    tall = height - overlays.PANEL_TILES[0][1] - overlays.PANEL_FOOT
    boxes = [f"{left} {top} {wide} {tall}" for left, top, wide in overlays.PANEL_TILES]
    return {
        "overlay": overlay,
        "address": address,
        "width": width,
        "height": height,
        "boxes": boxes,
    }


def _sample_heat() -> str:
    """Seventeen colors of the heat's scale, evenly spaced, for the page's script and its key."""
    colors = overlays.color_map(np.linspace(0.0, 1.0, 17)[None])[0]
    return " ".join("#" + bytes(color).hex() for color in colors)


def _dump_parameters(parameters: Parameters) -> list[tuple[str, str]]:
    """Sections of the redacted parameters, general ones first, a line per value."""
    values = parameters.redacted()
    general = {name: value for name, value in values.items() if not isinstance(value, dict)}
    sections = {"general": general} | {name: values[name] for name in values if name not in general}
    return [
        (name, "\n".join(f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in section.items()))
        for name, section in sections.items()
        if section
    ]
