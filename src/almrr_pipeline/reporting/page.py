"""The report: one HTML page that holds every number, image and style."""

from __future__ import annotations

import base64
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
from almrr_pipeline.reporting import charts, tables
from almrr_pipeline.reporting.examples import Overlay
from almrr_pipeline.reporting.overlays import encode_image

_Headline = tuple[str, str, str]  # name, value and small print
_WEB_FORMATS = {"WEBP", "JPEG"}  # embedded as they are
_WIDEST = 1280  # pixels; a panel has 1118
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
    training_images: int | None = None  # normal images that were trained on; None if unknown
    validation_images: int | None = None  # normal images for the thresholds
    has_validation: bool = False  # whether these are the dataset's own validation images
    license: str = ""  # origin and license of the images, and what to cite
    baselines: tables.Metrics = field(default_factory=dict)  # content of baselines.json


@dataclass(frozen=True)
class Report:
    """Content of the page; title and suite are taken from the run's parameters."""

    parameters: Parameters
    categories: Sequence[CategoryReport]  # of each category and seed, in the order of the page
    summary: tables.Metrics  # means and stds, as evaluation.summary.summarize returns them
    versions: Mapping[str, str] = field(default_factory=dict)  # by package
    commit: str | None = None  # "HASH" or "HASH with changes"; None where there is no repository


def render_report(report: Report) -> str:
    """Render the page: HTML5, no script, nothing fetched, equal bytes for equal input."""
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
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=report.parameters.report.title,
        parameters=report.parameters,
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
        runs=[_show_run(label, run) | {"link": links[label]} for label, run in runs.items()],
        definitions=[(_name_metric(n), tables.describe_metric(n).meaning) for n in names],
        dump=_dump_parameters(report.parameters),
        versions=report.versions,
        commit=commit and commit[1],
        is_changed=bool(commit and commit[2]),
    )


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


def _list_headlines(runs: Sequence[CategoryReport], summary: tables.Metrics) -> list[_Headline]:
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


def _show_run(label: str, run: CategoryReport) -> dict[str, Any]:
    """Values of a run's section as the template takes them."""
    threshold = run.metrics.get("thresholds", {}).get("image", {}).get("value")
    losses = charts.draw_losses(run.history, title=f"Training losses of {label}")
    scores = charts.draw_scores(run.scores, threshold=threshold, title=f"Image scores of {label}")
    return {
        "name": label,
        "license": run.license,
        "headlines": _list_headlines([run], {}),
        "steps": int(run.history["step"].max()) if len(run.history) else 0,
        "losses": Markup(losses),
        "scores": Markup(scores),
        "defect_types": tables.tabulate_defect_types(run.metrics),
        "examples": [_embed(overlay) for overlay in run.overlays],
    }


def _embed(overlay: Overlay) -> dict[str, Any]:
    """Turn an image into a data address; too wide ones and other formats are encoded again."""
    content = overlay.image
    with Image.open(io.BytesIO(content)) as image:
        format_, size = str(image.format), image.size
        if format_ not in _WEB_FORMATS or image.width > _WIDEST:
            smaller = image.convert("RGB")
            smaller.thumbnail((_WIDEST, image.height), Image.Resampling.LANCZOS)
            format_, size, content = "WEBP", smaller.size, encode_image(np.asarray(smaller))
    address = f"data:image/{format_.lower()};base64,{base64.b64encode(content).decode('ascii')}"
    width, height = size
    return {"overlay": overlay, "address": address, "width": width, "height": height}


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
