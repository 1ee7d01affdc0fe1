"""Page about a folder of images: what would be used as what, with thumbnails."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from importlib import resources

import jinja2
import numpy as np
from PIL import Image

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.files import escape_name, escape_text
from almrr_pipeline.common.images import Reading, inspect_bytes, read_bytes, resize_image
from almrr_pipeline.common.masks import read_mask
from almrr_pipeline.datasets.account import show
from almrr_pipeline.datasets.doctor import Diagnosis
from almrr_pipeline.datasets.manifest import Opened, mask_reading

_OF_EACH_TYPE = 6  # thumbnails
_OF_FINDINGS = 24
_SIDE = 160  # pixels of a thumbnail's longer side
_RED = np.array([213, 94, 0], np.float32)


def render_diagnosis(diagnosis: Diagnosis) -> str:
    """Render a self-contained page: HTML5, no script, nothing fetched."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("almrr_pipeline.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = resources.files("almrr_pipeline.reporting") / "templates" / "report.css"
    page = environment.get_template("doctor.html.j2").render(
        folder=escape_name(diagnosis.account.folder),
        style=style.read_text(encoding="utf-8"),
        lines=list(diagnosis.lines()),
        findings=diagnosis.findings,
        unused=[
            (show(each.path, diagnosis.account.folder), each.reason)
            for each in diagnosis.account.unused
        ],
        thumbnails=list(_draw_thumbnails(diagnosis)),
    )
    return escape_text(page)  # names of folders, too, may be no text


def _draw_thumbnails(diagnosis: Diagnosis) -> Iterator[tuple[str, str, str]]:
    """File, caption and data URI of some images of each type, and of those with findings."""
    drawn: Counter[tuple[str, str]] = Counter()
    found = {path for finding in diagnosis.findings for path in finding.images[:_OF_FINDINGS]}
    for each in diagnosis.images:
        kind = each.item.split, each.item.defect_type
        drawn[kind] += 1
        if drawn[kind] > _OF_EACH_TYPE and not {each.item.image, each.item.mask} & found:
            continue
        coverage = f", {each.mask.coverage:.2%}" if each.mask else ""
        caption = f"{each.item.split}, {each.item.defect_type}{coverage}"
        yield (
            show(each.item.image, diagnosis.account.folder),
            caption,
            _encode(_draw(each, diagnosis)),
        )


def _draw(each: Opened, diagnosis: Diagnosis) -> ImageArray:
    """The image, small, its mask in color."""
    item, settings = each.item, diagnosis.settings
    reading = Reading(value_ranges=diagnosis.ranges, max_megapixels=settings.max_megapixels)
    _, pixels = inspect_bytes(read_bytes(item.image), item.image, reading)
    height, width = pixels.shape[:2]
    scale = _SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = resize_image(pixels, size)
    if each.mask is None or item.mask is None:
        return small
    mask = read_mask(item.mask, reading=mask_reading(settings))
    gray = np.repeat(255 * mask.astype(np.uint8)[..., None], 3, axis=2)
    alpha = np.minimum(resize_image(gray, size)[..., :1] / np.float32(255) * 2, 0.6)
    return np.asarray(small * (1 - alpha) + _RED * alpha, np.uint8)


def _encode(image: ImageArray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
