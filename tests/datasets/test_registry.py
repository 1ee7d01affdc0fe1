"""Questions that are asked before any work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.datasets.registry import DATASETS, check_request, dataset_for, known_categories


@pytest.mark.parametrize(
    ("category", "dataset"),
    [
        ("mvtec_carpet", "mvtec_ad"),
        ("mt_defect", "mt_defect"),
        ("nanotwice", "nanotwice"),
        ("folder_my_tiles", "folder"),
        ("sample_brick", "sample"),
    ],
)
def test_a_category_knows_its_dataset(category: str, dataset: str) -> None:
    assert dataset_for(category).name == dataset


def test_a_mistyped_category_lists_the_known_ones_the_closest_first() -> None:
    with pytest.raises(AlmrrError, match=r"no 'mvtec_capret'. Known are mvtec_carpet, ") as caught:
        dataset_for("mvtec_capret")
    assert all(category in str(caught.value) for category in known_categories())


@pytest.mark.parametrize("category", ["folder_", "folder_../other", "folder_a/b", "folder_line.3"])
def test_a_folder_needs_a_name_that_stays_in_its_place(category: str) -> None:
    with pytest.raises(AlmrrError, match="folder_NAME"):
        dataset_for(category)


def test_every_dataset_states_its_license_and_is_found_by_its_name() -> None:
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.license.endswith(".")


def check(request: Any, *categories: str) -> None:
    check_request(categories, request=request)


def test_a_good_request_passes(workplace: Any, tmp_path: Path) -> None:
    request = workplace.request(
        mirror=str(tmp_path),
        paths={"folder_tiles": str(tmp_path), "dtd": str(tmp_path)},
        addresses={"mvtec_ad": ["https://example.org/a.tar.xz", "file:///srv/a.tar.xz"]},
        sha256={"mt_defect": "0" * 64},
    )

    check(request, "mvtec_carpet", "folder_tiles", "nanotwice")


@pytest.mark.parametrize(
    ("changes", "category", "said"),
    [
        ({}, "mvtec_capret", "no 'mvtec_capret'"),
        ({}, "folder_tiles", r"data\.paths\.folder_tiles: PATH"),
        ({"mirror": "/no/such/folder"}, "nanotwice", "data.mirror: there is no folder"),
        ({"mirror": "ftp://example.org"}, "nanotwice", "ftp://example.org: only http"),
        (
            {"paths": {"nanotwice": "/no/such.zip"}},
            "nanotwice",
            "data.paths.nanotwice: there is nothing at",
        ),
        ({"paths": {"nanotwise": "/"}}, "nanotwice", "no 'nanotwise'. Known are nanotwice,"),
        (
            {"addresses": {"mvtec": []}},
            "nanotwice",
            "data.addresses: there is no 'mvtec'. Known are mvtec_ad,",
        ),
        ({"sha256": {"dtdd": "0"}}, "nanotwice", "data.sha256: there is no 'dtdd'. Known are dtd,"),
        (
            {"addresses": {"dtd": ["s3://bucket/dtd.tar.gz"]}},
            "nanotwice",
            "s3://bucket/dtd.tar.gz: only http",
        ),
        ({"accept_licenses": []}, "mvtec_wood", "add CC-BY-NC-SA-4.0"),
    ],
)
def test_what_would_stop_the_work_is_said_before_it(
    workplace: Any, changes: dict[str, Any], category: str, said: str
) -> None:
    with pytest.raises(AlmrrError, match=said):
        check(workplace.request(**changes), category)
    assert not workplace.scratch.exists()
