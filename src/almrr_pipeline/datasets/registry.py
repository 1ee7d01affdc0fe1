"""All datasets by name, one line each, and the checks that are made before any work begins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import DataSettings
from almrr_pipeline.datasets.base import Dataset, FetchRequest
from almrr_pipeline.datasets.doctor import report_doubts
from almrr_pipeline.datasets.folder import PREFIX as FOLDER_PREFIX
from almrr_pipeline.datasets.folder import Folder
from almrr_pipeline.datasets.folder_names import normalize
from almrr_pipeline.datasets.manifest import inspect_items
from almrr_pipeline.datasets.mt_defect import MtDefect
from almrr_pipeline.datasets.mvtec_ad import MvtecAd
from almrr_pipeline.datasets.nanotwice import Nanotwice
from almrr_pipeline.datasets.obtain import check_mirror, check_path, local_path
from almrr_pipeline.datasets.sample import Sample
from almrr_pipeline.datasets.textures import Dtd, write_package_textures

_ALL: tuple[Dataset, ...] = (MvtecAd(), MtDefect(), Nanotwice(), Sample(), Folder())
DATASETS = {dataset.name: dataset for dataset in _ALL}


def known_categories() -> list[str]:
    """Return all category ids except the user's own (folder_NAME), sorted."""
    return sorted(category for dataset in DATASETS.values() for category in dataset.categories)


def dataset_for(category: str, settings: DataSettings | None = None) -> Dataset:
    """Return a category's dataset; AlmrrError, with the most similar names, if there is none.

    Of the settings, `normal_names` and `strict` decide how the user's own folders are read.
    """
    if re.fullmatch(rf"{FOLDER_PREFIX}[\w-]+", category):  # no dots: Kedro's namespaces have them
        settings = settings or DataSettings()
        return Folder(settings.normal_names, strict=settings.strict)
    if normalize(category) != category:
        advice = "write it with composed letters (NFC)"
        raise AlmrrError(f"categories: {category!r} has its accents apart (NFD); {advice}.")
    for dataset in DATASETS.values():
        if category in dataset.categories:
            return dataset
    known = _similar_first(category, known_categories())
    own = f"{FOLDER_PREFIX}NAME (letters, digits, _ and -) for images of your own"
    raise AlmrrError(f"categories: there is no {category!r}. Known are {known}, and {own}.")


def check_request(categories: Iterable[str], *, request: FetchRequest) -> None:
    """Check beforehand what would stop the fetching half-way.

    Raises:
        AlmrrError: a category, or a key of data.paths, data.addresses or data.sha256 is unknown; a
            path or mirror does not exist; an address cannot be read; a license is not accepted.
    """
    for category in categories:
        dataset_for(category).check(category, request)
    check_mirror(request.settings.mirror)
    names = [*DATASETS, *known_categories(), Dtd.name]
    for section in ("paths", "addresses", "sha256"):
        for key in getattr(request.settings, section):
            if key not in names and not key.startswith(FOLDER_PREFIX):
                known = _similar_first(key, names)
                raise AlmrrError(f"data.{section}: there is no {key!r}. Known are {known}.")
    for key in request.settings.paths:
        check_path(key, request)
    for addresses in request.settings.addresses.values():
        for address in addresses:
            local_path(address)


def fetch_category(category: str, *, target: Path, request: FetchRequest) -> None:
    """Fetch a category into the empty folder `target`, and open and check every image of it.

    Raises:
        AlmrrError: nothing could be fetched; an image or mask is missing or broken; or, where
            `data.strict`, a folder of the user's would give wrong numbers. What is published is as
            it is: doubts about it are logged.
    """
    settings, dataset = request.settings, dataset_for(category, request.settings)
    dataset.fetch(category, target=target, request=request)
    images = inspect_items(dataset.items(category, target), root=target, settings=settings)
    strict = settings.strict and dataset.expected(category) is None
    report_doubts(images, target, settings, name=category, strict=strict)


def fetch_textures(name: Literal["package", "dtd"], *, target: Path, request: FetchRequest) -> None:
    """Fill the empty folder `target` with the textures that anomalies are made of; may raise."""
    if name == "dtd":
        Dtd().fetch(name, target=target, request=request)
    else:
        write_package_textures(target)


def _similar_first(wanted: str, known: Iterable[str]) -> str:
    matcher = difflib.SequenceMatcher
    return ", ".join(sorted(known, key=lambda name: -matcher(None, wanted, name).ratio()))
