"""The report: one page that stands on its own, with every number, image and style inside it."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from almrr_pipeline.config import Parameters
from almrr_pipeline.reporting import plots, tables
from almrr_pipeline.reporting.examples import ExampleKind, Overlay
from almrr_pipeline.reporting.overlays import encode_image
from almrr_pipeline.kedro_support.redaction import shown_parameters

_WEB_FORMATS = {"WEBP": "image/webp", "JPEG": "image/jpeg"}
_WIDEST = 1280
_KINDS: Mapping[ExampleKind, str] = {
    "best": "Found most clearly",
    "typical": "Typical",
    "worst": "Missed, false alarms, and what came nearest to either",
}
_HEADLINES = ("image_auroc", "pixel_auroc", "pixel_ap")


@dataclass(frozen=True)
class CategoryReport:
    """What is known of one category after its evaluation.

    Attributes:
        category: its id, such as sample_brick.
        metrics: the content of its metrics.json.
        history: training history: step, loss, reconstruction, refinement, learning_rate.
        scores: a row a test image: image, label, defect, score, is_anomalous.
        roc: of pixels: fpr, tpr; no rows where undefined, as for all curves.
        pr: of pixels: recall, precision.
        pro: of regions: fpr, pro.
        image_roc: of images: fpr, tpr; None leaves the figure out, as for all that follow.
        image_pr: of images: recall, precision.
        overlays: drawn examples.
        training_images: normal images that were trained on.
        held_out_images: normal images held out for the thresholds.
        has_validation: whether these are validation images of the data set's own.
        source: where the images come from, under which license, and what to cite.
    """

    category: str
    metrics: tables.Metrics
    history: pd.DataFrame
    scores: pd.DataFrame
    roc: pd.DataFrame
    pr: pd.DataFrame
    pro: pd.DataFrame
    image_roc: pd.DataFrame | None = None
    image_pr: pd.DataFrame | None = None
    overlays: Sequence[Overlay] = ()
    training_images: int | None = None
    validation_images: int | None = None
    has_validation: bool = False
    source: str = ""


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        parameters: the parameters of the run; title and suite are taken from here.
        categories: in the order in which they are to be shown.
        summary: means over the categories, as `evaluation.summary.summarize` gives them.
        seeds: mean and std over seeds, as `evaluation.summary.summarize_seeds` gives them.
        versions: package to version.
        commit: git commit, as "HASH" or "HASH with changes"; None where there is no repository.
    """

    parameters: Parameters
    categories: Sequence[CategoryReport]
    summary: tables.Spread
    seeds: Mapping[str, tables.Spread] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def render_report(report: Report) -> str:
    """Write the page: HTML5, no script, nothing fetched from anywhere, equal bytes for equal input."""
    metrics = {category.category: category.metrics for category in report.categories}
    links = {category.category: f"category-{place}" for place, category in enumerate(report.categories, start=1)}
    training = {c.category: (c.training_images, c.validation_images) for c in report.categories}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=report.parameters.report.title,
            parameters=report.parameters,
            headlines=_pick_headlines(report),
            results=tables.tabulate_results(metrics, report.summary, links=links),
            seeds=tables.tabulate_seeds(report.seeds),
            oracle=tables.tabulate_oracle(metrics),
            counts=tables.tabulate_counts(training, metrics),
            thresholds=tables.tabulate_thresholds(metrics),
            curves=_draw_curves(report.categories),
            categories=[
                _view_category(category, links[category.category], report.parameters.for_category(category.category))
                for category in report.categories
            ],
            definitions=_define_metrics(list(metrics.values())),
            dump=_dump_parameters(report.parameters),
            versions=report.versions,
            commit=_read_commit(report.commit),
        )
    )


@dataclass(frozen=True)
class _Commit:
    """What can be checked out, and whether the files differed from it."""

    hash: str
    is_changed: bool


@dataclass(frozen=True)
class _Headline:
    """A number that opens the page, with what it is and over what it was taken."""

    name: str
    value: str
    small: str


@dataclass(frozen=True)
class _Example:
    """An overlay as the page embeds it."""

    address: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class _CategoryView:
    """A category as the template shows it."""

    name: str
    link: str
    parameters: Parameters
    has_validation: bool
    source: str
    headlines: Sequence[_Headline]
    steps: int
    losses: Markup
    scores: Markup
    defects: tables.Table
    examples: Sequence[tuple[ExampleKind, str, Sequence[_Example]]]


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("almrr_pipeline.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read_commit(described: str | None) -> _Commit | None:
    """Take the hash out of "HASH" or "HASH with changes"; None for whatever does not begin with one."""
    found = re.fullmatch(r"([0-9a-f]{7,64})(.*)", described or "", re.DOTALL)
    return _Commit(found[1], is_changed=bool(found[2])) if found else None


def _pick_headlines(report: Report) -> list[_Headline]:
    """Means over the categories; of one category, its metrics with their intervals."""
    if len(report.categories) == 1:
        return _pick_category_headlines(report.categories[0].metrics)
    headlines = []
    for name in _headline_names([category.metrics for category in report.categories]):
        mean = report.summary.get(name, {})
        small = f"mean of {mean['categories']} of {mean['of']} categories" if mean else "not computed"
        headlines.append(_Headline(_name_metric(name), tables.format_metric(mean.get("mean")), small))
    return headlines


def _pick_category_headlines(metrics: tables.Metrics) -> list[_Headline]:
    return [
        _Headline(_name_metric(name), tables.format_metric(metrics.get(name)), _say_interval(metrics, name))
        for name in _headline_names([metrics])
    ]


def _headline_names(metrics: Sequence[tables.Metrics]) -> list[str]:
    """The metrics that open the page, and the first of the region metrics that there is."""
    regions = [name for name in tables.list_metrics(metrics) if tables.describe_metric(name).group == "regions"]
    return [*_HEADLINES, *regions[:1]]


def _say_interval(metrics: tables.Metrics, name: str) -> str:
    interval = metrics.get("intervals", {}).get(name)
    if interval is not None:
        return f"{interval[0]:.3f} to {interval[1]:.3f}"
    return str(metrics.get("undefined", {}).get(name, ""))


def _name_metric(name: str) -> str:
    head = tables.describe_metric(name)
    return head.text if head.group == "regions" else f"{head.group.removesuffix('s')} {head.text}"


def _define_metrics(metrics: Sequence[tables.Metrics]) -> list[tuple[str, str]]:
    return [(_name_metric(name), tables.describe_metric(name).meaning) for name in tables.list_metrics(metrics)]


def _draw_curves(categories: Sequence[CategoryReport]) -> list[tuple[str, Markup]]:
    """One figure a kind of curve, with all categories in it; those that nobody has are left out."""
    limit = max((float(c.pro["fpr"].max()) for c in categories if len(c.pro)), default=1.0)
    figures: list[tuple[str, plots.CurveKind, Callable[[CategoryReport], pd.DataFrame | None], float | None]] = [
        ("Precision and recall, pixels", "pr", lambda c: c.pr, None),
        ("Overlap with defective regions", "pro", lambda c: c.pro, limit),
        ("ROC, pixels", "roc", lambda c: c.roc, None),
        ("Precision and recall, images", "pr", lambda c: c.image_pr, None),
        ("ROC, images", "roc", lambda c: c.image_roc, None),
    ]
    drawn = []
    for title, kind, pick, end in figures:
        found = {c.category: points for c in categories if (points := pick(c)) is not None}
        if any(len(points) for points in found.values()):
            drawn.append((title, Markup(plots.draw_curves(kind, found, title=title, limit=end))))
    return drawn


def _view_category(category: CategoryReport, link: str, own: Parameters) -> _CategoryView:
    threshold = category.metrics.get("thresholds", {}).get("image", {}).get("value")
    name = category.category
    return _CategoryView(
        name=name,
        link=link,
        parameters=own,
        has_validation=category.has_validation,
        source=category.source,
        headlines=_pick_category_headlines(category.metrics),
        steps=int(category.history["step"].max()) if len(category.history) else 0,
        losses=Markup(plots.draw_losses(category.history, title=f"Training losses of {name}")),
        scores=Markup(plots.draw_scores(category.scores, threshold=threshold, title=f"Image scores of {name}")),
        defects=tables.tabulate_defects(category.metrics),
        examples=[
            (kind, words, [_embed(overlay) for overlay in category.overlays if overlay.kind == kind])
            for kind, words in _KINDS.items()
        ],
    )


def _embed(overlay: Overlay) -> _Example:
    """Turn an image into a data address; what is wide or not made for the web is compressed again."""
    content = overlay.image if isinstance(overlay.image, bytes) else overlay.image.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        format_, (width, height) = image.format or "", image.size
        if format_ not in _WEB_FORMATS or width > _WIDEST:
            scale = min(1.0, _WIDEST / width)
            width, height = round(width * scale), max(1, round(height * scale))
            smaller = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            format_, content = "WEBP", encode_image(np.asarray(smaller))
    address = f"data:{_WEB_FORMATS[format_]};base64,{base64.b64encode(content).decode('ascii')}"
    return _Example(address, overlay.caption, width, height)


def _dump_parameters(parameters: Parameters) -> list[tuple[str, str]]:
    """Sections of the parameters, the general ones first, a line a value; what may be secret is left out."""
    values = shown_parameters(parameters)
    general = {name: value for name, value in values.items() if not isinstance(value, dict)}
    sections = {"general": general} | {name: value for name, value in values.items() if isinstance(value, dict)}
    return [(name, _dump_lines(section)) for name, section in sections.items() if section]


def _dump_lines(section: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in section.items())
