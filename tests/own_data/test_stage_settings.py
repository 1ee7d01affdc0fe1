from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.own_data.stage_settings import FOLDER, write_settings


@pytest.fixture
def values(project: Path, tmp_path: Path) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((project / "params.yaml").read_text())
    read["categories"] = ["sample_brick", "folder_parts"]
    read["data"]["paths"] = {"folder_parts": "parts"}
    read["overrides"] = {"folder_parts": {"train": {"steps": 5}}}
    (tmp_path / "parts").mkdir()
    (tmp_path / "plain").mkdir()
    return read


def _write(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    write_settings(folder)
    return {
        path.relative_to(folder / FOLDER).as_posix(): json.loads(path.read_text())
        for path in (folder / FOLDER).rglob("*.json")
    }


def test_a_further_category_changes_the_files_of_no_other(
    values: dict[str, Any], tmp_path: Path
) -> None:
    before = _write(tmp_path, values)
    values["categories"].append("folder_plain")
    values["data"]["paths"]["folder_plain"] = "plain"
    values["overrides"]["folder_plain"] = {"train": {"steps": 7}}
    after = _write(tmp_path, values)
    assert {name: after[name] for name in before} == before
    assert before["folder_parts/source.json"]["paths"] == {"folder_parts": "parts"}
    assert after["folder_plain/overrides.json"] == {"train": {"steps": 7}}
    assert before["sample_brick/source.json"]["paths"] == {}
    assert set(after) - set(before) == {
        "folder_plain/source.json",
        "folder_plain/overrides.json",
    }


@pytest.mark.parametrize("own", [{"normal_names": ["gut"]}, {"value_range": [0, 4095]}])
def test_what_decides_how_a_folder_is_read_is_part_of_its_source(
    values: dict[str, Any], tmp_path: Path, own: dict[str, Any]
) -> None:
    before = _write(tmp_path, values)
    values["overrides"]["folder_parts"]["data"] = own
    after = _write(tmp_path, values)
    assert after["folder_parts/source.json"] != before["folder_parts/source.json"]
    assert after["shared/source.json"] == before["shared/source.json"]


def test_a_wrong_path_ends_the_stage_and_removes_nothing(
    values: dict[str, Any], tmp_path: Path
) -> None:
    before = _write(tmp_path, values)
    values["data"]["paths"]["folder_parts"] = "prats"
    with pytest.raises(AlmrrError, match=r"data\.paths\.folder_parts: there is nothing at .*prats"):
        _write(tmp_path, values)
    kept = {path.relative_to(tmp_path / FOLDER).as_posix() for path in tmp_path.rglob("*.json")}
    assert kept == set(before)


def test_an_override_out_of_its_range_ends_the_stage(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["overrides"]["folder_parts"] = {"train": {"steps": 0}}
    with pytest.raises(AlmrrError, match="steps"):
        _write(tmp_path, values)
