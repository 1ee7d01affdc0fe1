"""All data sources by name, one line each, and the questions that are asked before any work begins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets import dtd
from almrr_pipeline.datasets.folder import PREFIX as FOLDER_PREFIX
from almrr_pipeline.datasets.folder import Folder
from almrr_pipeline.datasets.manifest import check_items
from almrr_pipeline.datasets.mt_defect import MtDefect
from almrr_pipeline.datasets.mvtec_ad import MvtecAd
from almrr_pipeline.datasets.nanotwice import Nanotwice
from almrr_pipeline.datasets.obtain import check_mirror, local_path
from almrr_pipeline.datasets.package_textures import write_package_textures
from almrr_pipeline.datasets.sample import Sample
from almrr_pipeline.datasets.base import FetchRequest, RetryPolicy, Source

__all__ = [
    "SOURCES",
    "FetchRequest",
    "RetryPolicy",
    "Source",
    "check_request",
    "fetch_category",
    "fetch_textures",
    "known_categories",
    "source_for",
]

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        MvtecAd(),
        MtDefect(),
        Nanotwice(),
        Sample(),
        Folder(),
    )
}


def known_categories() -> list[str]:
    """Return all category ids but the user's own (folder_NAME), sorted."""
    return sorted(category for source in SOURCES.values() for category in source.categories)


def source_for(category: str) -> Source:
    """Return the source that has a category.

    Raises:
        AlmrrError: no source has it; names the most similar ones first.
    """
    if re.fullmatch(rf"{FOLDER_PREFIX}[\w-]+", category):  # without dots, which the catalog's patterns split at
        return SOURCES["folder"]
    for source in SOURCES.values():
        if category in source.categories:
            return source
    raise AlmrrError(
        f"categories: there is no {category!r}. Known are {_similar_first(category, known_categories())}, and "
        f"{FOLDER_PREFIX}NAME (letters, digits, _ and -) for images of your own."
    )


def check_request(categories: Iterable[str], *, request: FetchRequest) -> None:
    """Find out before any work begins what would stop it half-way.

    Raises:
        AlmrrError: a category is unknown, a folder, archive or mirror is not there, an address is of a kind that cannot
            be read, a license is not accepted, or data.source, data.addresses or data.sha256 name an unknown source.
    """
    for category in categories:
        source_for(category).check(category, request)
    check_mirror(request.mirror)
    names = [*SOURCES, *known_categories(), dtd.NAME]
    for section, keys in (("source", request.local), ("addresses", request.addresses), ("sha256", request.sha256)):
        for key in keys:
            if key not in names and not key.startswith(FOLDER_PREFIX):
                raise AlmrrError(f"data.{section}: there is no {key!r}. Known are {_similar_first(key, names)}.")
    for key, place in request.local.items():
        if not Path(place).expanduser().exists():
            raise AlmrrError(f"data.source.{key}: there is nothing at {place}; correct the path.")
    for addresses in request.addresses.values():
        for address in addresses:
            local_path(address)


def fetch_category(category: str, *, target: Path, request: FetchRequest) -> None:
    """Fetch a category and open every image of it, so that nothing broken is ever renamed into place.

    Args:
        category: one of `known_categories`, or folder_NAME.
        target: an existing empty folder, which the caller renames when this returns, and removes when it raises.
        request: where to look.

    Raises:
        AlmrrError: nothing could be fetched, or an image or mask of what came is missing or broken.
    """
    source = source_for(category)
    source.fetch(category, target=target, request=request)
    check_items(source.items(category, target), root=target)


def fetch_textures(kind: Literal["package", "dtd"], *, target: Path, request: FetchRequest) -> None:
    """Fill the empty folder `target` with images that serve as textures.

    Raises:
        AlmrrError: they could not be fetched.
    """
    if kind == "dtd":
        dtd.fetch_dtd(target=target, request=request)
    else:
        write_package_textures(target)


def _similar_first(wanted: str, known: Iterable[str]) -> str:
    ranked = sorted(known, key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
    return ", ".join(ranked)
