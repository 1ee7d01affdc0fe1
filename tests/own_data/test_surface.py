from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.utils.hydra import compose_and_dump

from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.config import load_parameters
from almrr_pipeline.own_data.surface import (
    Surface,
    add_surface,
    category_of,
    find_surface,
    list_changes,
    parse_assignments,
    relative_path,
)

PARTS = Surface("parts", "photographs/parts", {"train": {"steps": 5}})


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """What of a project says which categories there are; of sample_brick there is a model."""
    shutil.copytree(project / "conf", tmp_path / "conf")
    shutil.copy(project / "params.yaml", tmp_path)
    (tmp_path / "data/06_models/sample_brick/seed_0").mkdir(parents=True)
    return tmp_path


def test_surfaces_are_added_to_what_has_data(copy: Path) -> None:
    add_surface(copy, PARTS)
    parameters = add_surface(copy, Surface("plain", "/photographs/plain"))
    assert parameters.categories == ["sample_brick", "folder_parts", "folder_plain"]
    assert parameters.data.paths == {
        "folder_parts": "photographs/parts",
        "folder_plain": "/photographs/plain",
    }
    assert parameters.for_category("folder_parts").train.steps == 5
    before = load_parameters(copy / "params.yaml")
    assert before.for_category("folder_plain").train.steps == before.train.steps
    assert find_surface(copy, "folder_parts") == PARTS
    assert find_surface(copy, "folder_other") is None


def test_the_next_composition_finds_the_same_surfaces(copy: Path) -> None:
    add_surface(copy, PARTS)
    add_surface(copy, Surface("plain", "/photographs/plain"))
    written = yaml.safe_load((copy / "params.yaml").read_text())
    compose_and_dump(str(copy / "again.yaml"), str(copy / "conf"), None, "config", "", [])
    assert yaml.safe_load((copy / "again.yaml").read_text()) == written


def test_a_known_surface_keeps_its_place_and_gets_new_values(copy: Path) -> None:
    add_surface(copy, PARTS)
    add_surface(copy, Surface("plain", "plain"))
    changed = Surface("parts", "photographs/parts", {"train": {"steps": 6}})
    assert list_changes(PARTS, changed) == ["train.steps: 5 -> 6"]
    parameters = add_surface(copy, changed)
    assert parameters.categories == ["sample_brick", "folder_parts", "folder_plain"]
    assert parameters.for_category("folder_parts").train.steps == 6


def test_wrong_values_write_nothing(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*.yaml")}
    for overrides in ({"train": {"stpes": 5}}, {"backbone": {"name": "resnet50"}}):
        with pytest.raises(AlmrrError, match=r"stpes|backbone"):
            add_surface(copy, Surface("parts", "photographs", overrides))
    assert {path: path.read_bytes() for path in copy.rglob("*.yaml")} == before


def test_another_suite_is_not_mixed_with_the_own_one(copy: Path) -> None:
    add_surface(copy, PARTS)
    path = copy / "params.yaml"
    path.write_text(path.read_text().replace("suite: own", "suite: paper"))
    with pytest.raises(AlmrrError, match="dvc exp run -S suite=own"):
        add_surface(copy, Surface("plain", "plain"))


def test_assignments_are_nested_values() -> None:
    values = parse_assignments(["train.steps=5", "data.image_size=[128, 160]", "train.flips=false"])
    assert values == {"train": {"steps": 5, "flips": False}, "data": {"image_size": [128, 160]}}
    for text in ("train.steps", "steps=5", "train..steps=5", "train.steps=["):
        with pytest.raises(AlmrrError, match=r"train\.steps=500|not YAML"):
            parse_assignments([text])


def test_names_and_paths(tmp_path: Path) -> None:
    assert category_of("parts") == category_of("folder_parts") == "folder_parts"
    with pytest.raises(AlmrrError, match="letters"):
        category_of("my parts")
    assert relative_path(tmp_path, tmp_path / "a/b") == "a/b"
    assert relative_path(tmp_path / "a", tmp_path / "b") == (tmp_path / "b").as_posix()
